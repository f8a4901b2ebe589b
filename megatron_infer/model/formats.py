"""How the weights of a linear layer are stored and multiplied.

A format knows its storage, where the K dimension may be cut, and its matmul. Layers hold a format and never ask which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_infer.ops import GROUP, INT4, QUANTIZED, Ops, PackedLinear, chunk_bounds

_BLOCK_ELEMENTS = 1 << 20
"""Weights quantised at a time: the temporaries stay in the cache."""


class WeightFormat(Protocol):
    """Storage and arithmetic of a weight matrix [out_dim, in_dim]."""

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        """The 9 bounds of the 8 K-chunks of the numerics contract; a tensor-parallel cut falls on one of them."""
        ...

    def allocate(self, out_dim: int, bounds: tuple[int, ...]) -> PackedLinear:
        """Empty storage for the K range and chunks that `bounds` (starting at 0) describe."""
        ...

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """Store rows row_start .. row_start + N."""
        ...

    def matmul(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """y_TN = x_TK @ W^T (+ bias), accumulated as the numerics contract says."""
        ...


@dataclass(frozen=True)
class PlainFormat:
    """bf16 or fp32 weights as they are, packed once into the layout the kernels read."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        return chunk_bounds(in_dim)

    def allocate(self, out_dim: int, bounds: tuple[int, ...]) -> PackedLinear:
        return self.ops.allocate_linear(out_dim, bounds[-1], bounds, self.dtype, self.device)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        self.ops.pack_rows(packed, row_start, weight_NK)

    def matmul(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        return self.ops.linear(x_TK, packed)


@dataclass(frozen=True)
class GroupedFormat(PlainFormat):
    """int8 or int4 weights with a scale per output row and GROUP of k, rounded to nearest while loading.

    K is cut at multiples of GROUP, so that every tensor-parallel degree rounds the same groups to the same numbers.
    """

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        return chunk_bounds(in_dim, GROUP)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        step = max(1, _BLOCK_ELEMENTS // max(1, weight_NK.shape[1]))
        for start in range(0, weight_NK.shape[0], step):
            values_NK, scales_NG = quantize(weight_NK[start : start + step], self.dtype)
            self.ops.pack_quantized(packed, row_start + start, values_NK, scales_NG)


def stored_dtypes(dtype: torch.dtype, quantization: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the blocks' linear layers and of the head. int4 leaves the head int8: its errors go straight to the logits."""
    quantized = {"none": (dtype, dtype), "int8": (torch.int8, torch.int8), "int4": (INT4, torch.int8)}
    return quantized[quantization]


def make_format(ops: Ops, dtype: torch.dtype, device: torch.device) -> WeightFormat:
    """The format that stores weights as `dtype`."""
    return (GroupedFormat if dtype in QUANTIZED else PlainFormat)(ops, dtype, device)


def bytes_per_weight(dtype: torch.dtype) -> float:
    """Storage of one weight, its share of the scale included."""
    return {torch.int8: 1 + 2 / GROUP, INT4: 0.5 + 2 / GROUP}.get(dtype, float(dtype.itemsize))


def quantize(weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a weight to nearest, symmetrically, in groups of GROUP along K.

    int8 maps a group's largest magnitude to 127. int4 maps the value of largest magnitude to -8, whatever its sign, as
    llama.cpp's Q4_0 does: the 16 steps have no positive counterpart of it.

    Args:
        weight_NK: [N, K], floating. dtype: torch.int8 or INT4.
    Returns:
        values_NK: int8 within [-127, 127] or [-8, 7]. scales_NG: bf16, ceil(K / GROUP) per row, NaN for a group with
        NaN or infinity; the weight is about value * scale.
    """
    num_rows, in_dim = weight_NK.shape
    num_groups = -(-in_dim // GROUP)
    w_NGK = torch.nn.functional.pad(weight_NK.float(), (0, -in_dim % GROUP)).view(num_rows, num_groups, GROUP)
    if dtype == torch.int8:
        low, high = -127, 127
        scales_NG = w_NGK.abs().amax(dim=2) / high
    else:
        low, high = -8, 7
        smallest_NG, largest_NG = w_NGK.amin(dim=2), w_NGK.amax(dim=2)
        scales_NG = torch.where(largest_NG > -smallest_NG, largest_NG, smallest_NG) / low
    scales_NG = torch.where(scales_NG.isfinite(), scales_NG, float("nan")).to(torch.bfloat16)
    steps_NG1 = scales_NG.float()[..., None]
    values_NGK = (w_NGK / torch.where(steps_NG1 == 0, 1.0, steps_NG1)).round_().clamp_(low, high)
    values_NK = values_NGK.nan_to_num_(0.0).to(torch.int8).view(num_rows, num_groups * GROUP)[:, :in_dim]
    return values_NK, scales_NG
