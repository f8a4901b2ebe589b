"""Random inputs for the ops, and what they should give in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_infer.model.formats import quantize
from megatron_infer.ops import GROUP, QUANTIZED, PackedLinear, chunk_bounds

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


@dataclass
class Paged:
    """A batch of sequences, each with its keys and values scattered over the blocks of one cache."""

    q_TNH: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables_SB: Tensor
    query_start_S1: Tensor
    context_lens_S: Tensor
    scale: float

    def arguments(self) -> tuple:
        tables = (self.block_tables_SB, self.query_start_S1, self.context_lens_S)
        return (self.q_TNH, self.k_cache, self.v_cache, *tables, self.max_query_len, self.scale)

    @property
    def max_query_len(self) -> int:
        return int(self.query_start_S1.diff().max())

    def rows(self, s: int) -> slice:
        return slice(int(self.query_start_S1[s]), int(self.query_start_S1[s + 1]))

    def part(self, s: int, first: int, last: int) -> Paged:
        """Sequence s alone, as if only its query rows first .. last were computed now."""
        rows = self.rows(s)
        length = rows.stop - rows.start
        return Paged(
            self.q_TNH[rows.start + first : rows.start + last].contiguous(),
            self.k_cache,
            self.v_cache,
            self.block_tables_SB[s : s + 1].contiguous(),
            torch.tensor([0, last - first], dtype=torch.int32),
            (self.context_lens_S[s : s + 1] - (length - last)).contiguous(),
            self.scale,
        )

    def heads(self, first_kv: int, last_kv: int) -> Paged:
        """Only some KV heads and their query heads, as a tensor-parallel rank has them."""
        group = self.q_TNH.shape[1] // self.k_cache.shape[1]
        q_TNH = self.q_TNH[:, first_kv * group : last_kv * group].contiguous()
        k, v = (cache[:, first_kv:last_kv].contiguous() for cache in (self.k_cache, self.v_cache))
        return Paged(q_TNH, k, v, self.block_tables_SB, self.query_start_S1, self.context_lens_S, self.scale)


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
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    tables = torch.full((len(lengths), max(blocks)), 2**30, dtype=torch.int32)  # padding is never looked up
    taken = 0
    for s, (_, context) in enumerate(lengths):
        tables[s, : blocks[s]] = order[taken : taken + blocks[s]]
        taken += blocks[s]
        keys = normal(2, context, num_kv_heads, head_dim, seed=seed + 1 + s).to(dtype)
        for position in range(context):
            block, offset = int(tables[s, position // block_size]), position % block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = keys[0, position], keys[1, position]
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0).to(torch.int32)
    q_TNH = 2 * normal(int(starts[-1]), num_heads, head_dim, seed=seed + 100)
    context_lens_S = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    return Paged(q_TNH, k_cache, v_cache, tables, starts, context_lens_S, head_dim**-0.5)


def attention_float64(case: Paged) -> Tensor:
    """Softmax attention of every row in double precision."""
    num_kv_heads, block_size = case.k_cache.shape[1:3]
    group = case.q_TNH.shape[1] // num_kv_heads
    o_TNH = torch.empty_like(case.q_TNH, dtype=torch.float64)
    for s, context in enumerate(case.context_lens_S.tolist()):
        table = case.block_tables_SB[s, : -(-context // block_size)].long()
        k, v = (cache[table].transpose(1, 2).flatten(0, 1)[:context].double() for cache in (case.k_cache, case.v_cache))
        rows = case.rows(s)
        length = rows.stop - rows.start
        scores = torch.einsum("qnh,pnh->nqp", case.q_TNH[rows].double(), k.repeat_interleave(group, 1)) * case.scale
        hidden = torch.arange(context) > torch.arange(context - length, context)[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        o_TNH[rows] = torch.einsum("nqp,pnh->qnh", weights, v.repeat_interleave(group, 1))
    return o_TNH
