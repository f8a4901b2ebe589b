"""Builds and runs tests/cpu/native/, a program that exercises the kernels and reports a checksum per op.

The compiler's flags are those of setup.py, which is loaded as a module for its build functions.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
"""Object files are kept there: only what changed since the last run is compiled again."""

_HEADERS = ["-I", str(ROOT / "kernels" / "cpu")]


def load_build() -> ModuleType:
    """setup.py without its setup() call."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_compiler() -> list[str]:
    """The compiler's command; skips the test where there is none."""
    compiler = load_build().find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler found; install g++ (or set CXX)")
    return compiler


def require_working(compiler: list[str], flags: Sequence[str], tmp_path: Path, runner: Sequence[str] = ()) -> None:
    """Skip the test unless an empty program can be built with these flags and run."""
    source, program = tmp_path / "empty.cpp", tmp_path / "empty"
    source.write_text("int main() {}\n")
    for command in ([*compiler, *flags, str(source), "-o", str(program)], [*runner, str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command[:-2])} fails: {done.stderr.strip()[-300:]}")


def build_exercise(
    name: str, compiler: list[str], flags: Sequence[str] = (), *, library: Path | None = None, machine: str = ""
) -> Path:
    """The program build/NAME/exercise, linked with `library` or with kernels compiled with the same flags."""
    build, folder = load_build(), BUILD / name
    kernels = [] if library else build.kernel_sources()  # first: they take longest
    sources = [*kernels, *sorted((ROOT / "tests" / "cpu" / "native").glob("*.cpp"))]
    target = {"machine": machine} if machine else {}
    objects = build.compile_sources(compiler, sources, folder, [*_HEADERS, *flags], **target)
    program = folder / "exercise"
    linked = [*map(str, objects), *([str(library), f"-Wl,-rpath,{library.parent}"] if library else [])]
    build.replace_by([*compiler, *flags, "-pthread", *linked], program)
    return program


def report_of(command: Sequence[str]) -> list[str]:
    """The lines that the program printed: the instruction sets it found, then one for each op."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # leaks are looked for with ptrace, often forbidden
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-10000:]}"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("variants ") and len(lines) == 13, lines
    return lines
