"""A Triton kernel that only reads: the bandwidth of a stream of weights at its best."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((2048, 4), (4096, 8), (8192, 8), (16384, 16))
"""(fp32 numbers per program and step, warps) worth trying."""
STEPS = 8
"""Tiles that a program reads one after the other."""


@triton.jit
def read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(source_ptr + offsets + step * BLOCK)
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


def read(source: Tensor, block: int, num_warps: int) -> Tensor:
    """Sums of consecutive STEPS * block numbers each.

    Args:
        source: fp32, contiguous, of a multiple of STEPS * block numbers.
    """
    num_programs, rest = divmod(source.numel(), STEPS * block)
    assert rest == 0, f"{source.numel()} numbers cannot be divided into tiles of {STEPS * block}"
    sums = torch.empty(num_programs, dtype=torch.float32, device=source.device)
    read_kernel[(num_programs,)](source, sums, BLOCK=block, STEPS=STEPS, num_warps=num_warps)
    return sums
