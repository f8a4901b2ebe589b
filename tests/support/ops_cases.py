"""Random inputs for the ops, and what they should give in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_infer.dispatch.selfcheck_inputs import last_queries
from megatron_infer.model.formats import quantize
from megatron_infer.ops import GROUP, QUANTIZED, BatchView, LayerKV, Ops, PackedLinear, chunk_bounds

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than torch.equal: tells -0.0 from 0.0 and takes NaN for equal to itself."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def bounds_of(in_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Where weights stored as `dtype` cut K."""
    return chunk_bounds(in_dim, GROUP if dtype in QUANTIZED else 1)


def packed(ops, weight_NK: Tensor, dtype: torch.dtype = torch.float32, bounds: tuple[int, ...] = ()) -> PackedLinear:
    out_dim, in_dim = weight_NK.shape
    weight = ops.allocate_linear(out_dim, in_dim, bounds or bounds_of(in_dim, dtype), dtype, CPU)
    if dtype in QUANTIZED:
        ops.pack_quantized(weight, 0, *quantize(weight_NK, dtype))
    else:
        ops.pack_rows(weight, 0, weight_NK)
    return weight


def changed(made: type[Ops], **functions: Callable) -> Ops:
    """Ops of a class, but for functions in place of some of its methods."""
    return type("Changed", (made,), {name: staticmethod(function) for name, function in functions.items()})()


@dataclass
class Paged:
    """Queries of a batch of sequences, each with its keys and values scattered over the blocks of one cache."""

    q_TNH: Tensor
    batch: BatchView
    kv: LayerKV
    scale: float

    def arguments(self) -> tuple[Tensor, BatchView, LayerKV, float]:
        return self.q_TNH, self.batch, self.kv, self.scale

    def rows(self, s: int) -> slice:
        return slice(*self.batch.query_start_S1[s : s + 2].tolist())

    def part(self, s: int, first: int, last: int) -> Paged:
        """Sequence s alone, as if only its query rows first .. last were computed now."""
        rows = self.rows(s)
        left_out = rows.stop - rows.start - last
        q_TNH, batch = last_queries(self.q_TNH, self.batch, s, rows.stop - rows.start - first)
        kept = slice(0, last - first)
        batch = replace(
            batch,
            token_ids_T=batch.token_ids_T[kept],
            positions_T=batch.positions_T[kept],
            slots_T=batch.slots_T[kept],
            query_start_S1=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens_S=batch.context_lens_S - left_out,
            max_query_len=last - first,
        )
        return replace(self, q_TNH=q_TNH[kept].contiguous(), batch=batch)

    def heads(self, first_kv: int, last_kv: int) -> Paged:
        """Only some KV heads and their query heads, as a tensor-parallel rank has them."""
        group = self.q_TNH.shape[1] // self.kv.k.shape[1]
        q_TNH = self.q_TNH[:, first_kv * group : last_kv * group].contiguous()
        kv = LayerKV(*(cache[:, first_kv:last_kv].contiguous() for cache in self.kv))
        return replace(self, q_TNH=q_TNH, kv=kv)


def paged_case(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Paged:
    """`lengths`: (query length, context length) of each sequence. Slots that no sequence owns hold NaN."""
    blocks = [-(-context // block_size) for _, context in lengths]
    order = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    shape = (sum(blocks) + 1, num_kv_heads, block_size, head_dim)
    kv = LayerKV(*(torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)))
    tables = torch.full((len(lengths), max(blocks)), 2**30, dtype=torch.int32)  # padding is never looked up
    taken, positions, slots = 0, [], []
    for s, (query, context) in enumerate(lengths):
        tables[s, : blocks[s]] = order[taken : taken + blocks[s]]
        taken += blocks[s]
        own = torch.arange(context)
        own_blocks, offsets = tables[s, own // block_size].long(), own % block_size
        for cache, values in zip(kv, normal(2, context, num_kv_heads, head_dim, seed=seed + 1 + s), strict=True):
            cache[own_blocks, :, offsets] = values.to(dtype)
        positions.append(own[context - query :])
        slots.append((own_blocks * block_size + offsets)[context - query :])
    batch = BatchView(
        token_ids_T=torch.zeros(sum(query for query, _ in lengths), dtype=torch.int64),
        positions_T=torch.cat(positions).to(torch.int32),
        slots_T=torch.cat(slots),
        query_start_S1=torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0).to(torch.int32),
        context_lens_S=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        block_tables_SB=tables,
        max_query_len=max(query for query, _ in lengths),
    )
    q_TNH = 2 * normal(len(batch.token_ids_T), num_heads, head_dim, seed=seed + 100)
    return Paged(q_TNH, batch, kv, head_dim**-0.5)


def attention_float64(case: Paged) -> Tensor:
    """Softmax attention of every row in double precision."""
    num_kv_heads, block_size = case.kv.k.shape[1:3]
    group = case.q_TNH.shape[1] // num_kv_heads
    o_TNH = torch.empty_like(case.q_TNH, dtype=torch.float64)
    for s, context in enumerate(case.batch.context_lens_S.tolist()):
        table = case.batch.block_tables_SB[s, : -(-context // block_size)].long()
        k, v = (cache[table].transpose(1, 2).flatten(0, 1)[:context].double() for cache in case.kv)
        rows = case.rows(s)
        length = rows.stop - rows.start
        scores = torch.einsum("qnh,pnh->nqp", case.q_TNH[rows].double(), k.repeat_interleave(group, 1)) * case.scale
        hidden = torch.arange(context) > torch.arange(context - length, context)[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        o_TNH[rows] = torch.einsum("nqp,pnh->qnh", weights, v.repeat_interleave(group, 1))
    return o_TNH
