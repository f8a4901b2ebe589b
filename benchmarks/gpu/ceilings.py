"""What the device can do at best: reading, copying and multiplying matrices, timed in this very run."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.workload import Workload

_REPEATS = 12
_LOAD_PRODUCTS = 500
"""Of 8192^3 they take an H100 most of a second, in which its clocks can be asked for."""
Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Call, device: torch.device, repeats: int = _REPEATS) -> float:
    """Median seconds of `work`, after two runs that do not count; on a GPU by the device's own clock."""
    samples = [_once(work, device) for _ in range(repeats + 2)]
    return statistics.median(samples[2:])


def _once(work: Call, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(work: Workload, device: torch.device) -> dict[str, Any]:
    """GB/s of reading (the best of several ways) and of copying (read and written bytes), TFLOP/s of bf16 products.

    The products: of square matrices, and of a prefill step with the four linear layers of a decoder layer.
    """
    source = torch.ones(work.ceiling_bytes // 4, dtype=torch.float32, device=device)
    ways = {name: work.ceiling_bytes / seconds_of(read, device) / 1e9 for name, read in _ways_to_read(source)}
    copied = seconds_of(partial(torch.empty_like(source).copy_, source), device)
    del source
    clocks = _clocks_under_load(work.matmul, device) if device.type == "cuda" else "not told"
    return {
        "read_gb_per_second": max(ways.values()),
        "read_gb_per_second_by_way": ways,
        "copy_gb_per_second": 2 * work.ceiling_bytes / copied / 1e9,
        "matmul_tflop_per_second": _products([(work.matmul,) * 3], device),
        "prefill_matmul_tflop_per_second": _products(_prefill_shapes(work), device),
        "clocks_under_load": clocks,
    }


def _clocks_under_load(size: int, device: torch.device) -> str:
    """SM clock, memory clock, power and temperature while the GPU multiplies matrices; idle, it would clock down."""
    x = torch.randn(size, size, device=device).bfloat16()
    for _ in range(_LOAD_PRODUCTS):
        x @ x
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run([*query, "--id=0"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not told: {error}"
    finally:
        synchronize(device)


def _ways_to_read(source: Tensor) -> Iterator[tuple[str, Call]]:
    yield "torch sum", source.sum
    yield "torch max", source.max
    if source.device.type != "cuda":
        return
    # Here alone, so that a machine without a GPU never loads triton.
    from benchmarks.gpu import read_kernel

    for block, num_warps in read_kernel.TILES:
        read = partial(read_kernel.read, source, block, num_warps)
        total = float(read().double().sum())
        assert total == source.numel(), f"the reading kernel saw {total} of {source.numel()} numbers"
        yield f"triton, {block} x {read_kernel.STEPS} per program, {num_warps} warps", read


def _prefill_shapes(work: Workload) -> list[tuple[int, int, int]]:
    """(tokens, in, out) of the qkv, output, gate and up, and down projections."""
    model, rows = work.model, work.prefill_rows
    query, kv = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    return [
        (rows, model.hidden_size, query + 2 * kv),
        (rows, query, model.hidden_size),
        (rows, model.hidden_size, 2 * model.intermediate_size),
        (rows, model.intermediate_size, model.hidden_size),
    ]


def _products(shapes: list[tuple[int, int, int]], device: torch.device) -> float:
    """TFLOP/s over all x[m, k] @ w[n, k]^T together."""
    seconds = 0.0
    for m, k, n in shapes:
        x, w = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
        seconds += seconds_of(partial(torch.nn.functional.linear, x, w), device)
    return 2 * sum(m * k * n for m, k, n in shapes) / seconds / 1e12
