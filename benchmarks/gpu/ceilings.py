"""What the device can do at best: copying, reading and multiplying matrices, timed in this very run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_REPEATS = 12


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median seconds of `work`, after two runs that do not count."""
    samples = []
    for i in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if i >= 2:
            samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def measure(device: torch.device, num_bytes: int, size: int) -> dict[str, float]:
    """GB/s of copying (read and written bytes) and of reading, TFLOP/s of a square bf16 matrix product of `size`."""
    copied, read = _memory(device, num_bytes)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    multiplied = seconds_of(lambda: a @ b, device)
    return {
        "copy_gb_per_second": 2 * num_bytes / copied / 1e9,
        "read_gb_per_second": num_bytes / read / 1e9,
        "matmul_tflop_per_second": 2 * size**3 / multiplied / 1e12,
    }


def _memory(device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Seconds of copying and of reading `num_bytes`."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device), seconds_of(lambda: source.sum(), device)
