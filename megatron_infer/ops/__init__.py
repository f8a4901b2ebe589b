"""What a model may ask of the hardware: the abstract class of all ops, and the records that they take.

Owns the signatures, the K-chunk rule and the packed weight's description. Knows no implementation: dispatch.select
chooses one of ops.reference, ops.vendor and the kernels. On the CPU every activation is fp32 and contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class BatchView:
    """Where a step's tokens stand: T packed tokens of S sequences, B blocks in the longest block table.

    Sequence s has the query rows query_start_S1[s] .. query_start_S1[s + 1], which are its last positions.
    """

    token_ids_T: Tensor
    """int64; -1 - j stands for the j-th sample of the step before"""
    positions_T: Tensor
    """int32"""
    slots_T: Tensor
    """int64: block * block_size + offset, where each token's key and value are written"""
    query_start_S1: Tensor
    """int32"""
    context_lens_S: Tensor
    """int32: positions of each sequence, this step's included"""
    block_tables_SB: Tensor
    """int32"""
    max_query_len: int
    """Most query rows of a sequence, which the host would have to wait for."""


class LayerKV(NamedTuple):
    """One layer's paged cache, keys and values: each [num_blocks, G, block_size, H]."""

    k: Tensor
    v: Tensor

    def clone(self) -> LayerKV:
        """A copy of both."""
        return LayerKV(self.k.clone(), self.v.clone())


class Rope(NamedTuple):
    """Rotary tables, fp32 [positions, head_dim / 2]."""

    cos_PH: Tensor
    sin_PH: Tensor


class Heads(NamedTuple):
    """A rank's query heads and KV heads, and what their scores are multiplied by."""

    num: int
    num_kv: int
    scale: float


class NormWeight(NamedTuple):
    """An RMSNorm: its weight in fp32, and what is added to the mean square."""

    weight_D: Tensor
    eps: float


@dataclass(eq=False, slots=True)
class Stream:
    """The residual stream, and what half a layer left to be added to it; None: nothing is.

    Whoever reads the stream next adds it, in the same pass over memory; it stays the residual's shape.
    """

    residual_TD: Tensor
    pending_TD: Tensor | None = None

    def take_pending(self) -> Tensor | None:
        """What is to be added, by the caller."""
        pending_TD, self.pending_TD = self.pending_TD, None
        return pending_TD

    def settle(self) -> Tensor:
        """The residual, to which everything has been added."""
        pending_TD = self.take_pending()
        return self.residual_TD if pending_TD is None else self.residual_TD.add_(pending_TD)


class Ops(ABC):
    """One implementation of every op, chosen once at load; the abstract methods are the single ops.

    The halves of a decoder layer are made of them here; a subclass that can launch one at once overrides it.

    Attributes:
        report: a line per single op, how it was chosen. chosen: the candidate that most of them are of.
        is_recordable: a step of equally long queries can be a CUDA graph and is worth it: nothing in it waits for the
            host, and it reads no more of the KV cache than the lengths on the device say, however wide the tables.
    """

    report: tuple[str, ...] = ()
    chosen: str = ""
    is_recordable = False

    @abstractmethod
    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        """Storage for a weight, its contents undefined until every row has been packed."""

    @abstractmethod
    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """Store rows row_start .. row_start + N of any floating dtype."""

    @abstractmethod
    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """Store rows of an int8 or int4 weight: int8 values, within [-127, 127] or [-8, 7], and bf16 scales."""

    @abstractmethod
    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """y_TN: fp32 sums over ascending k inside each chunk, the chunks added in a binary tree, the bias last.

        An int8 or int4 weight sums group by group, dot * (weight scale * row scale): the row's group is rounded to 12
        bits (int8) or 8 (int4) of its largest magnitude, so that dot, a sum of integers, is exact.
        """

    @abstractmethod
    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight."""

    @abstractmethod
    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        """Adds x to the residual in place and returns the norm of the sum."""

    @abstractmethod
    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        """Rotate q and k (half-split), write k and v into the paged cache, return q_TNH.

        qkv_TC has the columns [q heads | k heads | v heads].
        """

    @abstractmethod
    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """Causal grouped-query attention, o_TNH. Head n reads KV head n // (N / G)."""

    @abstractmethod
    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) * up of the columns [gate | up]."""

    @abstractmethod
    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """(values_S fp32, indices_S int64): first index of the largest value; value NaN for a row with NaN or Inf."""

    @abstractmethod
    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of an embedding table, on the CPU as fp32."""

    def normed(self, stream: Stream, norm: NormWeight) -> Tensor:
        """The norm of the stream, to which what is pending is added first."""
        pending_TD = stream.take_pending()
        if pending_TD is None:
            return self.rms_norm(stream.residual_TD, norm)
        return self.add_rms_norm(pending_TD, stream.residual_TD, norm)

    def attention_layer(
        self, stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView,
        kv: LayerKV, heads: Heads, completes_sum: bool,
    ) -> None:  # fmt: skip
        """The first half of a decoder layer, up to where ranks add their products: the last one is left pending.

        An override gives the same, on the CPU to the bit. Where the product completes the sum (neither other ranks'
        nor a bias are to be added), it may add it to the residual itself instead.
        """
        q_TNH = self.rope_store_kv(self.linear(self.normed(stream, norm), qkv), rope, batch, kv, heads)
        stream.pending_TD = self.linear(self.paged_attention(q_TNH, batch, kv, heads.scale).flatten(1), out)

    def feed_forward_layer(
        self, stream: Stream, norm: NormWeight, gate_up: PackedLinear, down: PackedLinear, completes_sum: bool
    ) -> None:
        """The second half, likewise."""
        hidden_TF = self.silu_mul(self.linear(self.normed(stream, norm), gate_up))
        stream.pending_TD = self.linear(hidden_TF, down)


class SingleOps(Ops):
    """The single ops of another implementation, and halves of a layer made of them, whatever that one overrides.

    For whoever wants to see each op, or to replace some.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.report, self.is_recordable = ops.report, ops.is_recordable

    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        return self.ops.allocate_linear(out_dim, in_dim, chunk_bounds, dtype, device)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        self.ops.pack_rows(packed, row_start, weight_NK)

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        self.ops.pack_quantized(packed, row_start, values_NK, scales_NG)

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        return self.ops.linear(x_TK, packed)

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        return self.ops.rms_norm(x_TD, norm)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        return self.ops.add_rms_norm(x_TD, residual_TD, norm)

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        return self.ops.rope_store_kv(qkv_TC, rope, batch, kv, heads)

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        return self.ops.paged_attention(q_TNH, batch, kv, scale)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return self.ops.silu_mul(gate_up_T2F)

    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.argmax(logits_SV)

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        return self.ops.gather_rows(table_VD, ids_T)


OP_NAMES = tuple(name for name in vars(Ops) if name in Ops.__abstractmethods__)
"""The single ops, in the order of their declaration."""
