"""The process that runs the sections, and the handle that the suite holds.

A kernel that faults leaves its process's GPU context useless, and one that hangs never returns: then the process is
replaced, and the sections left are run in a new one. They talk in lines: a section's name, and its figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.ceilings import synchronize
from benchmarks.gpu.sections import Bench, plan
from benchmarks.gpu.weights import SharedWeights
from benchmarks.gpu.workload import workload_for

_ROOT = Path(__file__).resolve().parents[2]


class SectionError(Exception):
    """A section failed; the message is its traceback, or what became of its process. warnings: logged before that."""

    def __init__(self, message: str, warnings: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.warnings = list(warnings)


class Answer(NamedTuple):
    """A section's figures, and what was logged meanwhile: faults of ops, with their tracebacks."""

    figures: Any
    warnings: list[str]


class Worker:
    """Starts the process when it is first needed, and again after it was lost."""

    def __init__(self, device_type: str, gpt_fast: Path | None, *, is_checked: bool = True) -> None:
        self._command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", device_type]
        if not is_checked:
            self._command.append("--unproven")
        if gpt_fast is not None:
            self._command += ["--gpt_fast", str(gpt_fast.resolve())]
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, timeout_seconds: float) -> Answer:
        """Run a section.

        Raises:
            SectionError: it failed, ended its process, or took longer.
        """
        if self._process is None:
            # A session of its own, so that the processes a section starts can be ended with it.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=_ROOT,
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either, which is told below
            self._process.stdin.write(f"{name}\n".encode())
        if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
            self.close()
            raise SectionError(f"not done after {timeout_seconds:.0f} s, its process was ended")
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SectionError("its process ended; see its output above")
        answer = json.loads(line)
        if not answer["is_usable"]:
            self.close()
        if "error" in answer:
            raise SectionError(answer["error"], answer["warnings"])
        return Answer(answer["figures"], answer["warnings"])

    def close(self) -> None:
        """End the process and whatever it started. Idempotent."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class _Kept(logging.Handler):
    """Keeps what the engine warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def serve(device: torch.device, gpt_fast: Path | None, *, is_checked: bool) -> None:
    """Run the sections named on stdin until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mingle with the answers
    if device.type == "cpu":
        torch.set_num_threads(1)  # all that the small size has work for
    work = workload_for(device.type)
    logging.basicConfig(format="%(message)s")
    kept = _Kept()
    logging.getLogger("megatron_infer").addHandler(kept)
    bench = Bench(SharedWeights.random(work.model, device), work, device, is_checked)
    sections = {section.name: section for section in plan(device.type, work, gpt_fast)}
    for line in sys.stdin:
        answer: dict[str, Any]
        kept.told.clear()
        try:
            answer = {"figures": sections[line.strip()].run(bench)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        is_usable = _is_usable(device)
        if is_usable and device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the next section may need it, or measure what it takes
        answers.write(json.dumps({**answer, "warnings": kept.told, "is_usable": is_usable}) + "\n")
        answers.flush()


def _is_usable(device: torch.device) -> bool:
    """Whether the device still does what it is told."""
    try:
        synchronize(device)
        return bool(torch.ones(2, device=device).sum() == 2)
    except RuntimeError:
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--gpt_fast", type=Path)
    parser.add_argument("--unproven", action="store_true")
    options = parser.parse_args()
    on = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    serve(on, options.gpt_fast, is_checked=not options.unproven)
