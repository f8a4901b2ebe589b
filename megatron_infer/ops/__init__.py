"""The op table: what a model may ask of the hardware, as one frozen record of callables.

Owns the signatures, the K-chunk rule and the packed weight's description. Knows no implementation: ops.dispatch
chooses one of ops.reference, ops.vendor and the kernels. On the CPU every activation is fp32 and contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

NUM_CHUNKS = 8
GROUP = 32
"""Consecutive k of one output row that share a scale in the int8 and int4 formats."""
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not list it
QUANTIZED = (torch.int8, INT4)


def chunk_bounds(in_dim: int, unit: int = 1) -> tuple[int, ...]:
    """The 9 bounds of the 8 chunks of K in which a linear layer sums; all but the last are multiples of `unit`."""
    bounds = [unit * ((in_dim // unit) * chunk // NUM_CHUNKS) for chunk in range(NUM_CHUNKS)]
    return (*bounds, in_dim)


@dataclass(eq=False)
class PackedLinear:
    """A weight matrix [out_dim, in_dim] in the storage of whoever allocated it.

    Attributes:
        data: opaque; only the ops of the same table read it.
        dtype: of the weights as stored: floating (float8_e4m3fn with an fp32 scale per row), torch.int8 or torch.int4
            (with a bf16 scale per row and GROUP of k).
        chunk_bounds: of the chunks of K this rank owns, from 0 to in_dim; 8, 4, 2 or 1 chunks.
        bias: fp32 [out_dim], added last; None where it is added after the all-reduce.
        layout: whatever the owner keeps about `data`.
        name: what it is in the network ("attention.qkv"), for profiles.
    """

    data: Tensor
    out_dim: int
    in_dim: int
    dtype: torch.dtype
    chunk_bounds: tuple[int, ...]
    bias: Tensor | None = None
    layout: Any = None
    name: str = "linear"

    def __post_init__(self) -> None:
        owned = len(self.chunk_bounds) - 1
        assert owned in (1, 2, 4, 8), f"{owned} chunks are not a subtree of {NUM_CHUNKS}"
        assert self.chunk_bounds[0] == 0 and self.chunk_bounds[-1] == self.in_dim
        assert list(self.chunk_bounds) == sorted(self.chunk_bounds)


class AllocateLinear(Protocol):
    def __call__(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        """Storage for a weight, its contents undefined until every row has been packed."""
        ...


class PackRows(Protocol):
    def __call__(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """Store rows row_start .. row_start + N of any floating dtype."""
        ...


class PackQuantized(Protocol):
    def __call__(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """Store rows of an int8 or int4 weight: int8 values, within [-127, 127] or [-8, 7], and bf16 scales."""
        ...


class Linear(Protocol):
    def __call__(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """y_TN: fp32 sums over ascending k inside each chunk, the chunks added in a binary tree, the bias last.

        An int8 or int4 weight sums group by group, dot * (weight scale * row scale): the row's group is rounded to 12
        bits (int8) or 8 (int4) of its largest magnitude, so that dot, a sum of integers, is exact.
        """
        ...


class RmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...


class AddRmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Adds x to the residual in place and returns the norm of the sum."""
        ...


class RopeStoreKV(Protocol):
    def __call__(
        self,
        qkv_TC: Tensor,
        cos_PH: Tensor,
        sin_PH: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        """Rotate q and k (half-split), write k and v into the paged cache, return q_TNH.

        qkv_TC has the columns [q heads | k heads | v heads]; cos and sin are fp32 [positions, head_dim / 2]; positions
        are int32; slots are int64, block * block_size + offset; caches are [num_blocks, G, block_size, H].
        """
        ...


class PagedAttention(Protocol):
    def __call__(
        self,
        q_TNH: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_SB: Tensor,
        query_start_S1: Tensor,
        context_lens_S: Tensor,
        max_query_len: int,
        scale: float,
    ) -> Tensor:
        """Causal grouped-query attention, o_TNH.

        Sequence s has the query rows query_start[s] .. query_start[s + 1], its last positions; context_lens[s] counts
        all positions, these included. Index tensors are int32; max_query_len, the most query rows of a sequence, spares
        the host from reading them. Head n reads KV head n // (N / G).
        """
        ...


class SiluMul(Protocol):
    def __call__(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) * up of the columns [gate | up]."""
        ...


class Argmax(Protocol):
    def __call__(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """(values_S fp32, indices_S int64): first index of the largest value; value NaN for a row with NaN or Inf."""
        ...


class GatherRows(Protocol):
    def __call__(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of an embedding table, on the CPU as fp32."""
        ...


class AttentionLayer(Protocol):
    def __call__(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        norm_D: Tensor,
        eps: float,
        qkv: PackedLinear,
        out: PackedLinear,
        cos_PH: Tensor,
        sin_PH: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables_SB: Tensor,
        query_start_S1: Tensor,
        context_lens_S: Tensor,
        max_query_len: int,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        is_whole: bool,
    ) -> Tensor | None:
        """The first half of a decoder layer up to where ranks add their sums: add_rms_norm (rms_norm of the residual
        where x is None), linear, rope_store_kv, paged_attention, linear; on the CPU to the bit what those ops give.

        is_whole: the last product is the whole sum, neither other ranks' nor a bias missing. Then the op may add it to
        the residual itself, and returns None.
        """
        ...


class FeedForwardLayer(Protocol):
    def __call__(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        norm_D: Tensor,
        eps: float,
        gate_up: PackedLinear,
        down: PackedLinear,
        is_whole: bool,
    ) -> Tensor | None:
        """The second half, alike: add_rms_norm or rms_norm, linear, silu_mul, linear."""
        ...


@dataclass(frozen=True)
class Ops:
    """One callable per op, chosen once, and the report of how they were chosen.

    A table may also have the halves of a decoder layer as single launches; None: they are made of the ops above.
    is_recordable: a step of equally long queries can be a CUDA graph and is worth it: nothing in it waits for the host,
    and it reads no more of the KV cache than the lengths on the device say, however wide the block tables.
    """

    allocate_linear: AllocateLinear
    pack_rows: PackRows
    pack_quantized: PackQuantized
    linear: Linear
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rope_store_kv: RopeStoreKV
    paged_attention: PagedAttention
    silu_mul: SiluMul
    argmax: Argmax
    gather_rows: GatherRows
    attention_layer: AttentionLayer | None = None
    feed_forward_layer: FeedForwardLayer | None = None
    is_recordable: bool = False
    report: tuple[str, ...] = ()
