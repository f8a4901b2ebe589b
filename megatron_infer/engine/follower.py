"""Ranks 1.. of this host as processes that this package starts itself, where no launcher did.

A follower loads its share of the model, executes rank 0's steps, and dies with its parent, however that dies. They
meet in a file without a name: nothing listens anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from megatron_infer.config import EngineConfig
from megatron_infer.engine import worker
from megatron_infer.engine.bring_up import bring_up
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World

_MAIN = "import sys; sys.path[:] = filter(None, sys.path); from megatron_infer.engine import follower; follower.main()"
"""What a follower runs: not `-m`, which would import from the current directory first."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class FollowerSpec:
    """What a follower needs to know, as one JSON argument.

    parent: process id of rank 0. store_fd: inherited descriptor of the file where the ranks meet.
    """

    parent: int
    store_fd: int
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
        # Readable by those who inherit the descriptor, and by nobody else: a port would be open to the whole host.
        store_fd = os.memfd_create("megatron_infer-store", os.MFD_CLOEXEC)
        self._store = _store_in(store_fd)
        weakref.finalize(self._store, os.close, store_fd)
        self._config = config
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
        specs = [
            FollowerSpec(os.getpid(), store_fd, rank, size, str(model_dir), model_name, config, gaps)
            for rank in range(1, size)
        ]
        self._is_over = threading.Event()
        started: Future[list[subprocess.Popen[bytes]]] = Future()
        arguments = (specs, env, started, self._is_over)
        threading.Thread(target=_start_and_stay, args=arguments, daemon=True, name="megatron_infer-parent").start()
        self.processes = started.result()

    def join(self, device: torch.device) -> TPGroup:
        """Rank 0's group with them."""
        return TPGroup.connect(
            self._store, 0, self._size, device, "local",
            deterministic=self._config.deterministic, timeout_seconds=self._config.start_timeout_seconds,
            is_alive=self._is_alive,
        )  # fmt: skip

    def _is_alive(self, rank: int) -> bool:
        return rank == 0 or self.processes[rank - 1].poll() is None

    def close(self, patience_seconds: float = 5.0) -> None:
        """Wait for them, who have been told that it is over; kill those that do not end. Idempotent."""
        deadline = time.monotonic() + patience_seconds
        for process in self.processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a process in the kernel goes when that is done
                    process.wait(timeout=5)
        self._is_over.set()


def main() -> None:
    """Serve until rank 0 closes the engine; the one argument is a FollowerSpec."""
    spec = FollowerSpec.from_json(sys.argv[1])
    _die_with_parent(spec.parent)
    store = _store_in(spec.store_fd)
    world = World(spec.rank, spec.size, spec.rank, spec.size)

    def join(device: torch.device) -> TPGroup:
        return TPGroup.connect(
            store, spec.rank, spec.size, device, "local",
            deterministic=spec.config.deterministic, timeout_seconds=spec.config.start_timeout_seconds,
        )  # fmt: skip

    with open_checkpoint(spec.model_dir, spec.model_name) as checkpoint:
        runner = bring_up(checkpoint, spec.config, world, join, gaps=spec.gaps)
    worker.serve(runner)


def _store_in(fd: int) -> FileStore:
    return FileStore(f"/proc/self/fd/{fd}", -1)


def _start_and_stay(
    specs: Sequence[FollowerSpec], env: dict[str, str], started: Future[list[subprocess.Popen[bytes]]],
    is_over: threading.Event,
) -> None:  # fmt: skip
    """Start the followers, and live as long as they may: the kernel kills them when this very thread ends."""
    try:
        # A session of their own: Ctrl-C in a terminal or notebook is for rank 0 to handle.
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": env, "start_new_session": True}
        commands = [[sys.executable, "-c", _MAIN, spec.to_json()] for spec in specs]
        started.set_result([subprocess.Popen(c, pass_fds=[specs[0].store_fd], **settings) for c in commands])
    except BaseException as error:
        started.set_exception(error)
    else:
        is_over.wait()


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the parent ends. It does so even while this process is stopped."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl: cannot follow the parent in its end")
    if os.getppid() != parent:  # it ended before
        os._exit(1)
