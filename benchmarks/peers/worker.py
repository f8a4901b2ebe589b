"""An engine in a process of its own: the loop inside it, and the handle that the benchmark holds.

They talk in JSON lines, a command on stdin and an answer on stdout. A worker ends when its stdin closes, so none
outlives the benchmark however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

from peers.engines import Runner, make_runner
from peers.model_files import ModelFiles
from peers.plan import Engine


class WorkerError(Exception):
    """A worker could not do what it was asked, or died."""


def serve(engine: Engine, files: ModelFiles, threads: int, isa: str) -> NoReturn:
    """Answer commands; never returns, but the process ends when stdin closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mingle with the answers
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    runner: Runner | None = None
    while True:
        command = json.loads(commands.get())
        operation = command.pop("operation")
        try:
            if runner is None:
                assert operation == "load", "the first command must be load"
                runner = make_runner(engine, files, threads, isa)
                answer = _load(runner, **command)
            else:
                answer = _OPERATIONS[operation](runner, **command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(commands: queue.SimpleQueue[str]) -> None:
    """Pass commands on; when the benchmark is gone, end at once, even in the middle of a long computation."""
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)


def _load(runner: Runner, prompt: list[int]) -> dict[str, Any]:
    """Load and answer one short prompt: engines that map their file read it only then."""
    baseline = _memory()["resident_bytes"]
    started = time.perf_counter()
    runner.load()
    loaded = time.perf_counter()
    runner.generate([prompt], 1)
    answered = time.perf_counter()
    return {
        "baseline_bytes": baseline,
        "load_seconds": loaded - started,
        "ready_seconds": answered - started,
        "facts": runner.facts(),
    }


def _time(runner: Runner, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    out = runner.generate(prompts, new_tokens)
    seconds = time.perf_counter() - started
    if any(len(ids) != new_tokens for ids in out) or len(out) != len(prompts):
        raise RuntimeError("the engine gave another number of tokens than asked for")
    return {"seconds": seconds}


def _use_memory(runner: Runner, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    runner.generate([prompt], new_tokens)
    return {**_memory(), "kv_bytes": runner.kv_bytes(len(prompt) + new_tokens)}


def _tune(runner: Runner, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    return {"setting": runner.tune(prompts, new_tokens)}


def _score(runner: Runner, prompts: list[list[int]]) -> dict[str, Any]:
    return {"top": [sorted(runner.top_logprobs(prompt).items(), key=lambda item: -item[1]) for prompt in prompts]}


_OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "time": _time,
    "memory": _use_memory,
    "tune": _tune,
    "score": _score,
}


def _memory() -> dict[str, int]:
    """Memory of this process and its children (other ranks), from /proc."""
    total = {"peak_bytes": 0, "resident_bytes": 0, "anonymous_bytes": 0}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        for name, field in zip(total, ("VmHWM", "VmRSS", "RssAnon"), strict=True):
            total[name] += int(fields[field].split()[0]) * 1024
    return total


class Worker:
    """The benchmark's end of one worker process."""

    def __init__(self, engine: Engine, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.engine = engine
        self._log = log
        with log.open("w") as stderr:
            # A session of its own: Ctrl-C is for the benchmark, which then closes the workers in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer.

        Raises:
            WorkerError: the worker reported an error or is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.engine.name} died during {operation!r}; its log ends with:\n{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.engine.name} failed at {operation!r}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])

    def cpu_seconds(self) -> float:
        """Processor time that the worker and its children have used so far."""
        try:
            process = psutil.Process(self._process.pid)
            times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return 0.0
        return sum(t.user + t.system for t in times)

    def hang_up(self) -> None:
        """Close its stdin, upon which it ends. Idempotent."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def close(self) -> None:
        """Hang up, wait, and kill its session if it does not end."""
        self.hang_up()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
