"""How the weights of a linear layer are stored and multiplied.

A format knows its storage, where the K dimension may be cut, and its matmul. Layers hold a format and never ask which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_infer.ops import Ops, PackedLinear, chunk_bounds


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
