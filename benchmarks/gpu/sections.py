"""What the suite does, in the order of its worth: each section's name, a guess at its seconds, and the call.

Knows which sections a device can have; neither a budget nor a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, engine, single_kernels, two_ranks
from benchmarks.gpu.engine import Variant
from benchmarks.gpu.weights import SharedWeights
from benchmarks.gpu.workload import Workload

_HAS_XDIST = find_spec("xdist") is not None
TESTS = ("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_engine.py", "tests/tensor_parallel/test_group_cuda.py")
"""Files of tests that need a GPU."""
_PEER_PATIENCE = 1.0
"""Others' speed is worth less than what comes after it."""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bench:
    """What every section works with. is_checked: faulty ops are replaced; see engine.Variant."""

    weights: SharedWeights
    work: Workload
    device: torch.device
    is_checked: bool = True


@dataclass(frozen=True)
class Section:
    """estimate_seconds: on an H100, what is compiled on the way included. patience: times the estimate, and half a
    minute more, it may take before it counts as hanging."""

    name: str
    estimate_seconds: float
    run: Callable[[Bench], Any]
    patience: float = 3


def plan(device_type: str, work: Workload, gpt_fast: Path | None) -> list[Section]:
    """All sections for "cuda" or "cpu"; gpt_fast: a checkout of it, if there is one."""
    return list(_cuda(work, gpt_fast) if device_type == "cuda" else _cpu(work, gpt_fast))


def _cuda(work: Workload, gpt_fast: Path | None) -> Iterator[Section]:
    plain = Variant("none", "triton")
    first, *others = work.peer_contexts
    yield Section("ceilings", 30, _ceilings)
    yield Section("bf16", 70, partial(_engine, plain))
    yield Section("kernels bf16", 15, partial(_kernels, "none"))
    yield Section("int4", 40, partial(_engine, Variant("int4", "triton")))
    yield Section("kernels int4", 15, partial(_kernels, "int4"))
    yield Section("bf16 batches", 40, partial(_batches, plain))
    yield Section("tests", 100 if _HAS_XDIST else 250, _tests)
    yield Section("transformers eager", 45, partial(_transformers, work.peer_contexts, False), _PEER_PATIENCE)
    yield Section("int8", 40, partial(_engine, Variant("int8", "triton")))
    yield Section("kernels int8", 15, partial(_kernels, "int8"))
    yield Section("two ranks", 60, _two_ranks)
    yield Section("fp8", 40, partial(_engine, Variant("fp8", "triton")))
    yield Section("kernels fp8", 15, partial(_kernels, "fp8"))
    yield Section("transformers compiled", 75, partial(_transformers, (first,), True), _PEER_PATIENCE)
    if gpt_fast is not None:
        yield Section("gpt-fast", 75, partial(_gpt_fast, gpt_fast), _PEER_PATIENCE)
    yield Section("bf16 no dependent launch", 25, partial(_engine, Variant("none", "triton", has_overlap=False)))
    yield Section("bf16 no graphs", 25, partial(_engine, Variant("none", "triton", has_graphs=False)))
    yield Section("bf16 vendor", 40, partial(_engine, Variant("none", "vendor")))
    more = partial(_transformers, tuple(others), True)
    yield Section("transformers compiled, more contexts", 60, more, _PEER_PATIENCE)


def _cpu(work: Workload, gpt_fast: Path | None) -> Iterator[Section]:
    plain = Variant("none", "native")
    yield Section("ceilings", 2, _ceilings)
    yield Section("bf16", 3, partial(_engine, plain))
    yield Section("kernels bf16", 3, partial(_kernels, "none"))
    yield Section("int4", 3, partial(_engine, Variant("int4", "native")))
    yield Section("kernels int4", 3, partial(_kernels, "int4"))
    yield Section("bf16 batches", 3, partial(_batches, plain))
    yield Section("tests", 20, _tests)
    yield Section("transformers eager", 5, partial(_transformers, work.peer_contexts, False))
    yield Section("int8", 3, partial(_engine, Variant("int8", "native")))
    yield Section("kernels int8", 3, partial(_kernels, "int8"))
    yield Section("two ranks", 30, _two_ranks)
    if gpt_fast is not None:
        yield Section("gpt-fast", 5, partial(_gpt_fast, gpt_fast))
    yield Section("bf16 vendor", 3, partial(_engine, Variant("none", "vendor")))


def _ceilings(bench: Bench) -> dict[str, Any]:
    return ceilings.measure(bench.work, bench.device)


def _engine(variant: Variant, bench: Bench) -> dict[str, Any]:
    return engine.measure(bench.weights, bench.work, bench.device, replace(variant, is_checked=bench.is_checked))


def _kernels(quantization: str, bench: Bench) -> dict[str, Any]:
    return single_kernels.measure(bench.work, bench.device, quantization)


def _batches(variant: Variant, bench: Bench) -> dict[str, Any]:
    variant = replace(variant, is_checked=bench.is_checked)
    return engine.measure_batches(bench.weights, bench.work, bench.device, variant)


def _transformers(contexts: tuple[int, ...], is_compiled: bool, bench: Bench) -> dict[str, Any]:
    # Here and not at the top: without transformers the other sections still run.
    from benchmarks.gpu import peers

    return peers.measure(bench.weights, bench.work, bench.device, contexts, is_compiled=is_compiled)


def _gpt_fast(checkout: Path, bench: Bench) -> dict[str, Any]:
    from benchmarks.gpu import gpt_fast

    return gpt_fast.measure(bench.weights, bench.work, bench.device, checkout)


def _two_ranks(bench: Bench) -> dict[str, Any]:
    return two_ranks.compare(bench.device.type)


def _tests(bench: Bench) -> dict[str, str]:
    """The tests that need a GPU, file by file at the same time: most of it is compiling.

    Raises:
        RuntimeError: one failed; with the end of the output.
    """
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rfs", "--tb=short", "--durations=5"]
    if _HAS_XDIST:
        command += ["-n", str(max(2, min(16, len(os.sched_getaffinity(0))) // len(TESTS)))]
    running = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT)
        for name in TESTS
    }
    outputs = {name: process.communicate()[0].strip() for name, process in running.items()}
    failed = [name for name, process in running.items() if process.returncode]
    summaries = {name: output.splitlines()[-1] for name, output in outputs.items()}
    if failed:
        told = "\n\n".join(f"{name}\n{outputs[name][-12000:]}" for name in failed)
        raise RuntimeError(f"{told}\n{'; '.join(f'{name}: {summary}' for name, summary in summaries.items())}")
    return summaries
