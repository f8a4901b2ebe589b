"""Argmax over the vocabulary in two launches: the largest value of every 2048 columns of a row, then of those.

The first index of the largest value wins, so the result is exact and knows no order of summation. Nothing is read on
the host. Reads V x element size bytes per row and moves 8 more per 2048 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _argmax_part_kernel(logits_ptr, values_ptr, indices_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(logits_ptr + row * WIDTH + columns, mask=inside, other=float("-inf")).to(tl.float32)
    # False for NaN as well.
    is_finite = tl.abs(x) < float("inf")
    non_finite = tl.max((inside & (is_finite == 0)).to(tl.int32), axis=0)
    largest = tl.max(tl.where(is_finite, x, float("-inf")), axis=0)
    index = tl.min(tl.where(x == largest, columns, WIDTH), axis=0)
    place = row * tl.num_programs(1) + part
    tl.store(values_ptr + place, tl.where(non_finite != 0, float("nan"), largest))
    tl.store(indices_ptr + place, index)


@triton.jit
def _argmax_whole_kernel(
    part_values_ptr, part_indices_ptr, values_ptr, indices_ptr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    inside = parts < PARTS
    values = tl.load(part_values_ptr + row * PARTS + parts, mask=inside, other=float("-inf"))
    indices = tl.load(part_indices_ptr + row * PARTS + parts, mask=inside, other=0)
    is_nan = values != values
    non_finite = tl.max(is_nan.to(tl.int32), axis=0) != 0
    largest = tl.max(tl.where(is_nan, float("-inf"), values), axis=0)
    # Parts are in ascending order, and so are their indices.
    index = tl.min(tl.where(inside & (values == largest), indices, 2147483647), axis=0)
    tl.store(values_ptr + row, tl.where(non_finite, float("nan"), largest))
    tl.store(indices_ptr + row, tl.where(non_finite, 0, index).to(tl.int64))


def argmax(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(values_S fp32, indices_S int64): first index of the largest value; value NaN, index 0 with NaN or Inf."""
    assert logits_SV.is_contiguous()
    num_rows, width = logits_SV.shape
    values_S = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    indices_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    if width == 0:
        return values_S.fill_(float("-inf")), indices_S.zero_()
    parts = triton.cdiv(width, _BLOCK)
    part_values = torch.empty(num_rows, parts, dtype=torch.float32, device=logits_SV.device)
    part_indices = torch.empty(num_rows, parts, dtype=torch.int32, device=logits_SV.device)
    _argmax_part_kernel[(num_rows, parts)](logits_SV, part_values, part_indices, WIDTH=width, BLOCK=_BLOCK, num_warps=4)
    _argmax_whole_kernel[(num_rows,)](
        part_values, part_indices, values_S, indices_S, PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1
    )
    return values_S, indices_S
