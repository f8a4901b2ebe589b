"""Commands that run beside a test: started and ended with all they start, and waited for until something is so."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], bool]) -> None:
    """Give up after a time that decides nothing but how long a failure takes."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[psutil.Popen]:
    """A command with its standard input open, ended with all its descendants."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = psutil.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        for one in [process, *process.children(recursive=True)]:
            one.kill()
        process.communicate()


def ranks_of(process: psutil.Popen) -> list[psutil.Process]:
    """What the command line started, without torchrun itself."""
    tree = [process, *process.children(recursive=True)]
    return [one for one in tree if "torch.distributed.run" not in one.cmdline()]


def wait_for_progress(process: psutil.Popen, out: Path) -> None:
    """Until `eval run` has written a line."""

    def is_written() -> bool:
        assert process.poll() is None
        return any(path.stat().st_size for path in out.glob("parts/*.jsonl"))

    wait_until(is_written)
