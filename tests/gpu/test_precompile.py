"""The cache that benchmarks.gpu.precompile fills is the one that a run looks into: keys do not depend on contents.

Tensors in the CPU's memory stand in for a GPU's: like these they have addresses, of which Triton's keys hold the
alignment. What only a GPU machine can tell: that its Triton is the one that filled the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
import torch
from triton import knobs
from benchmarks.gpu import precompile
from benchmarks.gpu.absent import compiling
from benchmarks.gpu.workload import SMALL
from megatron_infer.dispatch.triton_ops import TritonOps

device, found = torch.device(sys.argv[1]), {True: [], False: []}
knobs.compilation.listener = lambda *, src, cache_hit, **_: found[cache_hit].append(src.name)
with compiling(90):
    shape = precompile.shape_of(SMALL.model, sys.argv[2])
    precompile.compile_selfcheck(TritonOps(132, device), shape, device, lambda op: op in sys.argv[3:])
print(json.dumps([found[True], found[False]]))
"""


def compiled(cache: Path, *arguments: str) -> tuple[list[str], list[str]]:
    """Kernels found in the cache, and those that were missing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    hits, misses = json.loads(done.stdout.splitlines()[-1])
    return hits, misses


@pytest.mark.slow
def test_a_run_finds_every_kernel_that_was_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    ops = ("linear", "paged_attention", "rope_store_kv")
    _, ahead = compiled(tmp_path, "meta", "int4", *ops)
    hits, misses = compiled(tmp_path, "cpu", "int4", *ops)
    assert not misses and sorted(hits) == sorted(ahead) and len(ahead) >= 5
    _, other = compiled(tmp_path, "cpu", "none", "linear")
    assert other, "what was not compiled ahead is missed"
