"""The process of a follower rank that this package started itself (launch.Followers).

Loads its share of the model, executes rank 0's steps, and dies with its parent, however that dies.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from torch._C._distributed_c10d import TCPStore

from megatron_infer.config import EngineConfig
from megatron_infer.engine.launch import build_runner
from megatron_infer.engine.topology import rank_device
from megatron_infer.engine.worker import serve_follower
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.tensor_parallel.group import TPGroup


def main() -> None:
    """Serve until rank 0 closes the engine; the one argument is what launch.Followers wrote."""
    _die_with_parent()
    spec: dict[str, Any] = json.loads(sys.argv[1])
    config = EngineConfig(**spec["config"])
    size, rank = config.tensor_parallel_size or 1, spec["rank"]
    store = TCPStore("127.0.0.1", spec["port"], is_master=False)
    device = rank_device(config, rank)
    group = TPGroup.connect(store, rank, size, device, "local", deterministic=config.deterministic)
    try:
        with open_checkpoint(spec["model_dir"], spec["model_name"]) as checkpoint:
            runner = build_runner(checkpoint, config, group)
    except Exception as error:
        group.abort(f"{type(error).__name__}: {error}")
        raise
    serve_follower(runner)
    runner.close()


def _die_with_parent() -> None:
    """End as soon as stdin closes, which the system does when the parent ends."""

    def wait() -> None:
        # Not sys.stdin: its lock, held by this thread, would trip the interpreter's own shutdown.
        while os.read(0, 4096):
            continue
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="die-with-parent").start()
