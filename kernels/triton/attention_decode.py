"""Split-KV attention of 1 to 16 queries per sequence (decode, draft verification) over the paged cache.

A program takes the rows (query, head) of one KV head and a stretch of keys, and leaves a partial softmax; a second
kernel folds the partials in order. It is no atomic counter and "the last program merges": a counter must be zeroed
before each launch, which is a launch as well, and one program would then merge what a whole grid can.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_QUERIES = 16
"""Of a sequence that the decode kernel takes; longer ones are the prefill kernel's."""
FOLD = 8
"""Tiles whose partials are folded to one before any other is added, wherever that happens."""
LOG2_E = 1.4426950408889634


@triton.jit
def _fold(max_M, sum_M, o_MH, new_max_M, new_sum_M, new_o_MH):
    """Add a later stretch of keys to a partial softmax: maxima in log2 units, sums, unnormalised outputs.

    Every product and sum is an explicit FMA, so that it rounds alike in both kernels that fold. A stretch that a row
    does not see (-inf, 0, 0) changes no bit.
    """
    top_M = tl.maximum(max_M, new_max_M)
    finite_M = tl.where(top_M == float("-inf"), 0.0, top_M)
    old_M, new_M = tl.exp2(max_M - finite_M), tl.exp2(new_max_M - finite_M)
    sum_M = tl.fma(sum_M, old_M, new_sum_M * new_M)
    o_MH = tl.fma(o_MH, old_M[:, None], new_o_MH * new_M[:, None])
    return top_M, sum_M, o_MH


# The batch's index tensors are cut from one buffer and its shapes change from step to step; compiling for each
# alignment or divisor would stop the engine now and then.
@triton.jit(
    do_not_specialize=["table_width", "num_partials", "tiles_per_partial"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "context_ptr"],
)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    context_ptr,
    partial_o_ptr,
    partial_softmax_ptr,
    scale_log2,
    table_width,
    num_kv_heads,
    num_partials,
    tiles_per_partial,
    MAX_QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (row tiles * G, partials, S). One partial: `tiles_per_partial` tiles of keys of one sequence and KV head."""
    kv_head, row_tile = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads
    partial, s = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_ptr + s)
    num_queries = tl.load(query_start_ptr + s + 1) - start
    context = tl.load(context_ptr + s)
    first_tile = partial * tiles_per_partial
    if (num_queries > MAX_QUERIES) | (row_tile * ROWS >= num_queries * GROUP) | (first_tile * TILE >= context):
        return
    packed_M = row_tile * ROWS + tl.arange(0, ROWS)
    query_M, head_M = packed_M // GROUP, kv_head * GROUP + packed_M % GROUP
    h, j = tl.arange(0, BLOCK_H), tl.arange(0, TILE)
    num_heads = num_kv_heads * GROUP
    mask_MH = (query_M < num_queries)[:, None] & (h < H)[None, :]
    row_M = (start + query_M).to(tl.int64) * num_heads + head_M
    q_MH = tl.load(q_ptr + row_M[:, None] * H + h[None, :], mask=mask_MH, other=0.0)
    position_M = context - num_queries + query_M

    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    o_MH = tl.zeros([ROWS, BLOCK_H], tl.float32)
    last_tile = tl.minimum(first_tile + tiles_per_partial, tl.cdiv(context, TILE))
    for tile in tl.range(first_tile, last_tile):
        position_J = tile * TILE + j
        written_J = position_J < context
        block_J = tl.load(table_ptr + s * table_width + position_J // BLOCK_SIZE, mask=written_J, other=0)
        slot_J = (block_J.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + position_J % BLOCK_SIZE
        offset_JH = slot_J[:, None] * H + h[None, :]
        mask_JH = written_J[:, None] & (h < H)[None, :]
        # Zeros where nothing is written: a NaN there would pass through a weight of zero.
        k_JH = tl.load(k_ptr + offset_JH, mask=mask_JH, other=0.0).to(q_MH.dtype)
        v_JH = tl.load(v_ptr + offset_JH, mask=mask_JH, other=0.0).to(q_MH.dtype)
        # fp32 takes three TF32 products, which fit the registers; full precision on the plain cores does not.
        score_MJ = tl.dot(q_MH, tl.trans(k_JH), input_precision="tf32x3") * scale_log2
        score_MJ = tl.where(position_J[None, :] <= position_M[:, None], score_MJ, float("-inf"))
        tile_max_M = tl.max(score_MJ, axis=1)
        finite_M = tl.where(tile_max_M == float("-inf"), 0.0, tile_max_M)
        p_MJ = tl.exp2(score_MJ - finite_M[:, None])
        tile_o_MH = tl.dot(p_MJ.to(q_MH.dtype), v_JH, input_precision="tf32x3")
        max_M, sum_M, o_MH = _fold(max_M, sum_M, o_MH, tile_max_M, tl.sum(p_MJ, axis=1), tile_o_MH)

    # At most min(T, 16 S) rows, and no two sequences of up to 16 queries overlap.
    first_row = tl.minimum(start, s * MAX_QUERIES)
    slot_M = ((first_row + query_M).to(tl.int64) * num_heads + head_M) * num_partials + partial
    tl.store(partial_softmax_ptr + 2 * slot_M, max_M, mask=query_M < num_queries)
    tl.store(partial_softmax_ptr + 2 * slot_M + 1, sum_M, mask=query_M < num_queries)
    tl.store(partial_o_ptr + slot_M[:, None] * H + h[None, :], o_MH, mask=mask_MH)


@triton.jit
def _fold_stored(max_1, sum_1, o_1H, o_ptr, softmax_ptr, first_slot, count, H: tl.constexpr, FOLD: tl.constexpr):
    """Fold up to FOLD stored partials of one row in ascending order; all their loads are in flight at once."""
    h = tl.arange(0, o_1H.shape[1])[None, :]
    for i in tl.static_range(FOLD):
        slot_1 = first_slot + i + tl.arange(0, 1)
        new_max_1 = tl.load(softmax_ptr + 2 * slot_1, mask=i < count, other=float("-inf"))
        new_sum_1 = tl.load(softmax_ptr + 2 * slot_1 + 1, mask=i < count, other=0.0)
        new_o_1H = tl.load(o_ptr + slot_1[:, None] * H + h, mask=(h < H) & (i < count), other=0.0)
        max_1, sum_1, o_1H = _fold(max_1, sum_1, o_1H, new_max_1, new_sum_1, new_o_1H)
    return max_1, sum_1, o_1H


@triton.jit(do_not_specialize=["num_partials"], do_not_specialize_on_alignment=["query_start_ptr", "context_ptr"])
def _merge_kernel(
    o_ptr,
    partial_o_ptr,
    partial_softmax_ptr,
    query_start_ptr,
    context_ptr,
    num_partials,
    MAX_QUERIES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTIAL: tl.constexpr,
    IS_TILE: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Grid (N, queries, S). Folds the partials of one row.

    Partials that are single tiles are first folded FOLD by FOLD, as the decode kernel does where it takes FOLD tiles.
    """
    head, query, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_ptr + s)
    num_queries = tl.load(query_start_ptr + s + 1) - start
    if (num_queries > MAX_QUERIES) | (query >= num_queries):
        return
    used = tl.cdiv(tl.load(context_ptr + s), PARTIAL)
    num_heads = tl.num_programs(0)
    first_slot = ((tl.minimum(start, s * MAX_QUERIES) + query).to(tl.int64) * num_heads + head) * num_partials
    empty_1, zero_1 = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    zero_1H = tl.zeros([1, BLOCK_H], tl.float32)
    max_1, sum_1, o_1H = empty_1, zero_1, zero_1H
    for first in range(0, used, FOLD):
        slot, count = first_slot + first, used - first
        if IS_TILE:
            span_max_1, span_sum_1, span_o_1H = _fold_stored(
                empty_1, zero_1, zero_1H, partial_o_ptr, partial_softmax_ptr, slot, count, H, FOLD
            )
            max_1, sum_1, o_1H = _fold(max_1, sum_1, o_1H, span_max_1, span_sum_1, span_o_1H)
        else:
            max_1, sum_1, o_1H = _fold_stored(
                max_1, sum_1, o_1H, partial_o_ptr, partial_softmax_ptr, slot, count, H, FOLD
            )
    h = tl.arange(0, BLOCK_H)[None, :]
    row = (start + query).to(tl.int64) * num_heads + head
    tl.store(o_ptr + row * H + h, (o_1H / sum_1[:, None]).to(o_ptr.dtype.element_ty), mask=h < H)


def decode_tiles(head_dim: int, group: int, itemsize: int) -> tuple[int, int]:
    """(rows per program, keys per tile): what 8 warps hold without spilling. A property of the model, not the batch.

    32 KiB of K per tile or, where a product takes more registers, 16 KiB. Rows for at least four queries, in fp32 two.
    """
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile_bytes = 32768 if itemsize == 2 and row_bytes <= 256 else 16384
    rows = (4 if itemsize == 2 else 2) * triton.next_power_of_2(group)
    return max(16, rows), min(128, tile_bytes // row_bytes)


def tiles_per_partial(num_sequences: int, num_kv_heads: int, table_tiles: int, num_sms: int) -> int:
    """1, or FOLD where that leaves 3 programs for every 2 SMs: fewer partials to write and read, the same bits."""
    num_programs = num_sequences * num_kv_heads * triton.cdiv(table_tiles, FOLD)
    return FOLD if 2 * num_programs >= 3 * num_sms else 1


def decode_attention(
    o_TNH: Tensor,
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    *,
    max_query_len: int,
    num_sms: int,
) -> None:
    """Fill the rows of o of the sequences with 1 to 16 queries, and touch no other.

    A row's bits depend on its own sequence alone: keys are split at absolute positions, and the programs' row tile,
    key tile and order of folding depend only on head_dim, dtype and N / G. More rows than one tile has read the keys
    again, from the L2 cache: a larger tile for longer drafts would sum in another order.

    It allocates min(T, 16 S) * N * (head_dim + 2) floats per partial, and a partial per 1 or 8 tiles of the table.

    Args:
        max_query_len: an upper bound of the query lengths that matter here; more than 16 means 16.
        num_sms: of the device.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_sequences, table_width = block_tables_SB.shape
    group, max_queries = num_heads // num_kv_heads, min(max_query_len, MAX_QUERIES)
    rows, tile = decode_tiles(head_dim, group, max(q_TNH.element_size(), k_cache.element_size()))
    table_tiles = triton.cdiv(table_width * block_size, tile)
    tiles = tiles_per_partial(num_sequences, num_kv_heads, table_tiles, num_sms)
    num_partials = triton.cdiv(table_tiles, tiles)
    block_h = max(16, triton.next_power_of_2(head_dim))
    shape = (min(num_tokens, MAX_QUERIES * num_sequences), num_heads, num_partials)
    partial_o = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_TNH.device)
    partial_softmax = torch.empty((*shape, 2), dtype=torch.float32, device=q_TNH.device)
    _decode_kernel[(triton.cdiv(max_queries * group, rows) * num_kv_heads, num_partials, num_sequences)](
        q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, partial_o, partial_softmax,
        scale * LOG2_E, table_width, num_kv_heads, num_partials, tiles,
        MAX_QUERIES=MAX_QUERIES, GROUP=group, H=head_dim, BLOCK_H=block_h, BLOCK_SIZE=block_size, ROWS=rows, TILE=tile,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(num_heads, max_queries, num_sequences)](
        o_TNH, partial_o, partial_softmax, query_start_S1, context_lens_S, num_partials,
        MAX_QUERIES=MAX_QUERIES, H=head_dim, BLOCK_H=block_h, PARTIAL=tiles * tile, IS_TILE=tiles == 1, FOLD=FOLD,
        num_warps=1,
    )  # fmt: skip
