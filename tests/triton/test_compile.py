"""Every Triton kernel compiles for the GPUs it is meant for and fits their shared memory; decode spills no register.

Nothing runs and no GPU is needed: compiling.py compiles what the launches of launches_*.py ask for.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Not imported: other tests in this process may want it with its interpreter.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("launches_*.py"))
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory a block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

LEAST_REGISTERS = 12
"""Of a kernel that does anything."""


def kernels_launched_by(path: Path) -> set[str]:
    """Names X of calls X[grid](...)."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return {func.value.id for func in calls if isinstance(func, ast.Subscript) and isinstance(func.value, ast.Name)}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """Family -> what compiling it printed; the families are compiled at the same time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def start(family: str) -> subprocess.Popen:
        archs = ["--arch", "90", "--sampled", "80", "100"]
        command = [sys.executable, "-m", "tests.triton.compiling", f"tests.triton.{family}", *archs]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    running = {family: start(family) for family in FAMILIES}
    printed = {family: process.communicate()[0] for family, process in running.items()}
    assert not [family for family, process in running.items() if process.returncode]
    return {family: [json.loads(line) for line in text.splitlines()] for family, text in printed.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit(compiled: dict[str, list[dict]], family: str) -> None:
    lines = compiled[family]
    assert {line["arch"] for line in lines} == set(SHARED_BYTES)
    assert not [line for line in lines if line["shared_bytes"] > SHARED_BYTES[line["arch"]]]
    # Triton 3.6 makes an empty kernel of some large products for compute capability 10.0, and says nothing.
    assert not [line for line in lines if line["registers"] < LEAST_REGISTERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_kernels_spill_nothing(compiled: dict[str, list[dict]], family: str) -> None:
    """A launch named "decode ..." may stand for a mixture, of which a prefill kernel takes its part."""
    lines = [line for line in compiled[family] if line["launch"].startswith("decode")]
    decode = [line for line in lines if "prefill" not in line["kernel"]]
    spills = [(line["launch"], line["kernel"], line["arch"]) for line in decode if line["stack_bytes"]]
    assert decode and not spills


def test_no_kernel_is_left_out(compiled: dict[str, list[dict]]) -> None:
    launched = set().union(*(kernels_launched_by(path) for path in (ROOT / "kernels" / "triton").glob("*.py")))
    assert launched == {line["kernel"] for lines in compiled.values() for line in lines}
