"""Ranks 1.. of this host as processes that this package starts itself, where no launcher did.

A follower loads its share of the model, executes rank 0's steps, and dies with its parent, however that dies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from megatron_infer.config import EngineConfig
from megatron_infer.engine import worker
from megatron_infer.engine.bring_up import bring_up
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World

_MAIN = "import sys; sys.path[:] = filter(None, sys.path); from megatron_infer.engine import follower; follower.main()"
"""What a follower runs: not `-m`, which would import from the current directory first."""


@dataclass(frozen=True)
class FollowerSpec:
    """What a follower needs to know, as one JSON argument. `port`: of rank 0's store on this host."""

    port: int
    rank: int
    size: int
    model_dir: str
    model_name: str
    config: EngineConfig
    gaps: Sequence[tuple[int, int]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FollowerSpec:
        raw = json.loads(text)
        return cls(**{**raw, "config": EngineConfig(**raw["config"])})


class Followers:
    """The other ranks of a session as child processes; they die with this process, which is rank 0."""

    def __init__(self, model_dir: Path, model_name: str, config: EngineConfig, gaps: Sequence[tuple[int, int]]) -> None:
        self._size = size = config.tensor_parallel_size or 1
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._deterministic = config.deterministic
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            spec = FollowerSpec(self._store.port, rank, size, str(model_dir), model_name, config, gaps)
            command = [sys.executable, "-c", _MAIN, spec.to_json()]
            # A session of its own: Ctrl-C in a terminal or notebook is for rank 0 to handle.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)
            self.processes.append(process)

    def join(self, device: torch.device) -> TPGroup:
        """Rank 0's group with them."""
        return TPGroup.connect(
            self._store, 0, self._size, device, "local",
            deterministic=self._deterministic, is_alive=self._is_alive,
        )  # fmt: skip

    def _is_alive(self, rank: int) -> bool:
        return rank == 0 or self.processes[rank - 1].poll() is None

    def close(self) -> None:
        """Close their stdin, upon which they end; kill what does not."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """Serve until rank 0 closes the engine; the one argument is a FollowerSpec."""
    _die_with_parent()
    spec = FollowerSpec.from_json(sys.argv[1])
    store = TCPStore("127.0.0.1", spec.port, is_master=False)
    world = World(spec.rank, spec.size, spec.rank, spec.size)

    def join(device: torch.device) -> TPGroup:
        deterministic = spec.config.deterministic
        return TPGroup.connect(store, spec.rank, spec.size, device, "local", deterministic=deterministic)

    with open_checkpoint(spec.model_dir, spec.model_name) as checkpoint:
        runner = bring_up(checkpoint, spec.config, world, join, gaps=spec.gaps)
    worker.serve(runner)


def _die_with_parent() -> None:
    """End as soon as stdin closes, which the system does when the parent ends."""

    def wait() -> None:
        # Not sys.stdin: its lock, held by this thread, would trip the interpreter's own shutdown.
        while os.read(0, 4096):
            continue
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="die-with-parent").start()
