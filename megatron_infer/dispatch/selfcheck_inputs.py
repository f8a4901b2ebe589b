"""Random inputs of a model's own shape for dispatch.selfcheck: activations, packed weights, paged caches.

Draws from a generator of its own, so that nobody else's random numbers change. Knows no bounds and no results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_infer.ops import (
    GROUP,
    NUM_CHUNKS,
    QUANTIZED,
    BatchView,
    Heads,
    LayerKV,
    NormWeight,
    Ops,
    PackedLinear,
    Rope,
    chunk_bounds,
)
from megatron_infer.ops.fp8 import FP8, UNIT

Lengths = list[tuple[int, int]]
"""(query length, context length) of each sequence."""


@dataclass(frozen=True)
class CheckShape:
    """What the layers of a tensor-parallel rank look like.

    Attributes:
        hidden_size, intermediate_size: of the model. tp: the degree that divides it.
        num_heads, num_kv_heads, vocab_size: this rank's share.
        dtype: of activations and plain weights. kv_dtype: of the cache.
        linear_dtype, head_dtype: of the blocks' linear layers and of the head, as stored.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    tp: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    linear_dtype: torch.dtype
    head_dtype: torch.dtype


def tokens_at(positions_T: Tensor, slots_T: Tensor) -> BatchView:
    """Tokens of one sequence at any positions and slots, for ops that read nothing else."""
    count = torch.tensor([0, len(slots_T)], dtype=torch.int32, device=slots_T.device)
    nothing_SB = torch.zeros(1, 0, dtype=torch.int32, device=slots_T.device)
    return BatchView(torch.zeros_like(slots_T), positions_T, slots_T, count, count[1:], nothing_SB, len(slots_T))


def last_queries(q_TNH: Tensor, batch: BatchView, s: int, most: int) -> tuple[Tensor, BatchView]:
    """Sequence s alone, as if only its last queries, at most `most`, were computed now."""
    start, stop = batch.query_start_S1[s : s + 2].tolist()
    start = max(start, stop - most)
    alone = BatchView(
        token_ids_T=batch.token_ids_T[start:stop],
        positions_T=batch.positions_T[start:stop],
        slots_T=batch.slots_T[start:stop],
        query_start_S1=(batch.query_start_S1[s : s + 2] - start).clamp(min=0),
        context_lens_S=batch.context_lens_S[s : s + 1],
        block_tables_SB=batch.block_tables_SB[s : s + 1],
        max_query_len=stop - start,
    )
    return q_TNH[start:stop], alone


class CheckInputs:
    """Inputs of any number of tokens, drawn one after the other from a fixed seed.

    inner: the dtype of activations between norms.
    """

    def __init__(self, device: torch.device, shape: CheckShape, inner: torch.dtype) -> None:
        self.device, self.shape, self.inner = device, shape, inner
        self.heads = Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim**-0.5)
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device).to(dtype)

    def integers(self, stop: int, *size: int) -> Tensor:
        """int64 in [0, stop)."""
        return torch.randint(stop, size, generator=self.generator, device=self.device)

    def shuffled(self, count: int) -> Tensor:
        """0 .. count in random order, int64."""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def norm_weight(self) -> NormWeight:
        return NormWeight(1 + 0.1 * self.normal(self.shape.hidden_size), 1e-5)

    def linears(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Rows, bounds of K and dtype of a layer's linear layers on the first rank, and of the head."""
        shape, stored = self.shape, self.shape.linear_dtype

        def bounds(in_dim: int, dtype: torch.dtype, tp: int = 1) -> tuple[int, ...]:
            unit = GROUP if dtype in QUANTIZED else UNIT if dtype == FP8 else 1
            return chunk_bounds(in_dim, unit)[: NUM_CHUNKS // tp + 1]

        whole, query = bounds(shape.hidden_size, stored), shape.num_heads * shape.head_dim
        down = bounds(shape.intermediate_size, stored, shape.tp)
        return {
            "qkv": (query + 2 * shape.num_kv_heads * shape.head_dim, whole, stored),
            "out": (shape.hidden_size, bounds(query * shape.tp, stored, shape.tp), stored),
            "gate_up": (2 * down[-1], whole, stored),
            "down": (shape.hidden_size, down, stored),
            "head": (shape.vocab_size, bounds(shape.hidden_size, shape.head_dtype), shape.head_dtype),
        }

    def packed(self, name: str, *tables: Ops) -> list[PackedLinear]:
        """The same random weight packed by each of the tables, in two pieces; qkv has a bias. Products are near 1."""
        out_dim, bounds, dtype = self.linears()[name]
        in_dim = bounds[-1]
        weights = [table.allocate_linear(out_dim, in_dim, bounds, dtype, self.device) for table in tables]
        for start, stop in ((0, out_dim // 3), (out_dim // 3, out_dim)):
            size = stop - start
            if dtype in QUANTIZED:
                low, high = (-127, 127) if dtype == torch.int8 else (-8, 7)
                values = self.integers(high - low + 1, size, in_dim) + low
                scales = (1 + 0.3 * self.normal(size, -(-in_dim // GROUP)).clamp(-2, 2)) / (high * in_dim**0.5)
                for table, weight in zip(tables, weights, strict=True):
                    table.pack_quantized(weight, start, values.to(torch.int8), scales.bfloat16())
            else:
                rows = self.normal(size, in_dim, dtype=self.shape.dtype) / in_dim**0.5
                for table, weight in zip(tables, weights, strict=True):
                    table.pack_rows(weight, start, rows)
        if name == "qkv":
            bias = self.normal(out_dim)
            for weight in weights:
                weight.bias = bias
        return weights

    def cache(self, num_blocks: int) -> LayerKV:
        """Keys and values, written everywhere."""
        shape = self.shape
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        return LayerKV(self.normal(*size, dtype=shape.kv_dtype), self.normal(*size, dtype=shape.kv_dtype))

    def paged(self, lengths: Lengths) -> tuple[Tensor, BatchView, LayerKV]:
        """q_TNH and a batch of sequences scattered over the blocks. What none of them owns, and pads the tables, is
        NaN."""
        shape, device = self.shape, self.device
        blocks = [-(-context // shape.block_size) for _, context in lengths]
        order = self.shuffled(sum(blocks) + 1).to(torch.int32)
        tables_SB = order[-1].repeat(len(lengths), max(blocks))
        kv = self.cache(sum(blocks) + 1)
        is_owned = torch.zeros(sum(blocks) + 1, shape.block_size, dtype=torch.bool, device=device)
        taken, positions, slots = 0, [], []
        for row, ((query, context), count) in enumerate(zip(lengths, blocks, strict=True)):
            tables_SB[row, :count] = order[taken : taken + count]
            taken += count
            own = torch.arange(context, device=device)
            own_slots = tables_SB[row, own // shape.block_size].long() * shape.block_size + own % shape.block_size
            is_owned.view(-1)[own_slots] = True
            positions.append(own[context - query :])
            slots.append(own_slots[context - query :])
        for cache in kv:
            cache.masked_fill_(~is_owned[:, None, :, None], float("nan"))
        queries = [query for query, _ in lengths]
        batch = BatchView(
            token_ids_T=torch.zeros(sum(queries), dtype=torch.int64, device=device),
            positions_T=torch.cat(positions).to(torch.int32),
            slots_T=torch.cat(slots),
            query_start_S1=torch.tensor([0, *queries]).cumsum(0).to(device, torch.int32),
            context_lens_S=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
            block_tables_SB=tables_SB,
            max_query_len=max(queries),
        )
        return 2 * self.normal(sum(queries), shape.num_heads, shape.head_dim, dtype=self.inner), batch, kv

    def rope(self, num_positions: int) -> Rope:
        angles_PH = 3 * self.normal(num_positions, self.shape.head_dim // 2)
        return Rope(angles_PH.cos(), angles_PH.sin())

    def scattered(self, num_tokens: int, num_blocks: int) -> BatchView:
        """Tokens at any of 200 positions and in any slots."""
        positions_T = self.integers(200, num_tokens).to(torch.int32)
        return tokens_at(positions_T, self.shuffled(num_blocks * self.shape.block_size)[:num_tokens].contiguous())
