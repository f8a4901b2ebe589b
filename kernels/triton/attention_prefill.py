"""Causal attention of long query spans (prefill, chunk by chunk) over the paged cache, for any mixture of sequences.

A program takes the rows (query, head) of one KV head and walks over the keys with an online softmax. Which sequence a
program belongs to is searched for on the device, so the grid needs only T and S.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tiles(
    max_M, sum_M, o_MH, q_MH, position_M, k_ptr, v_ptr, table_ptr, first_tile, last_tile, context,
    scale_log2, num_kv_heads, kv_head,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add tiles of keys to the online softmax. Without MASKED every row must see all of them."""
    h, j = tl.arange(0, BLOCK_H), tl.arange(0, TILE)
    for tile in tl.range(first_tile, last_tile):
        position_J = tile * TILE + j
        mask_JH = (h < H)[None, :] & (position_J < context)[:, None] if MASKED else (h < H)[None, :]
        if MASKED:
            block_J = tl.load(table_ptr + position_J // BLOCK_SIZE, mask=position_J < context, other=0)
        else:
            block_J = tl.load(table_ptr + position_J // BLOCK_SIZE)
        slot_J = (block_J.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + position_J % BLOCK_SIZE
        offset_JH = slot_J[:, None] * H + h[None, :]
        # Zeros where nothing is written: a NaN there would pass through a weight of zero.
        k_JH = tl.load(k_ptr + offset_JH, mask=mask_JH, other=0.0).to(q_MH.dtype)
        v_JH = tl.load(v_ptr + offset_JH, mask=mask_JH, other=0.0).to(q_MH.dtype)
        score_MJ = tl.dot(q_MH, tl.trans(k_JH), input_precision="tf32x3")
        if MASKED:
            score_MJ = tl.where(position_J[None, :] <= position_M[:, None], score_MJ, float("-inf"))
        # Rows see position 0, which is in the first tile: the maximum is finite from there on.
        top_M = tl.maximum(max_M, tl.max(score_MJ, axis=1) * scale_log2)
        p_MJ = tl.exp2(tl.fma(score_MJ, scale_log2, -top_M[:, None]))
        old_M = tl.exp2(max_M - top_M)
        sum_M = sum_M * old_M + tl.sum(p_MJ, axis=1)
        o_MH = tl.dot(p_MJ.to(q_MH.dtype), v_JH, o_MH * old_M[:, None], input_precision="tf32x3")
        max_M = top_M
    return max_M, sum_M, o_MH


@triton.jit
def _sequence_of(query_start_ptr, query_tile, num_sequences, QUERIES: tl.constexpr):
    """The last sequence s with query_start[s] // QUERIES + s <= query_tile: there its tiles begin, room for all."""
    low, high = query_tile * 0, num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start_ptr + middle) // QUERIES + middle <= query_tile:
            low = middle
        else:
            high = middle - 1
    return low


# As in attention_decode: no variants for the alignment of the batch's index tensors, nor for its shapes.
@triton.jit(
    do_not_specialize=["table_width", "num_sequences"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "context_ptr"],
)
def _prefill_kernel(
    o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    context_ptr,
    scale_log2,
    table_width,
    num_sequences,
    MIN_QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (G, query tiles). The last queries, which see most keys, start first."""
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    query_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    s = _sequence_of(query_start_ptr, query_tile, num_sequences, QUERIES)
    start = tl.load(query_start_ptr + s)
    num_queries = tl.load(query_start_ptr + s + 1) - start
    first_query = (query_tile - start // QUERIES - s) * QUERIES
    if (num_queries < MIN_QUERIES) | (first_query >= num_queries):
        return
    context = tl.load(context_ptr + s)
    packed_M, h = tl.arange(0, ROWS), tl.arange(0, BLOCK_H)
    query_M, head_M = first_query + packed_M // GROUP, kv_head * GROUP + packed_M % GROUP
    valid_M = (query_M < num_queries) & (packed_M < QUERIES * GROUP)
    mask_MH = valid_M[:, None] & (h < H)[None, :]
    row_M = (start + query_M).to(tl.int64) * (num_kv_heads * GROUP) + head_M
    offset_MH = row_M[:, None] * H + h[None, :]
    q_MH = tl.load(q_ptr + offset_MH, mask=mask_MH, other=0.0)
    position_M = context - num_queries + query_M

    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    o_MH = tl.zeros([ROWS, BLOCK_H], tl.float32)
    first_position = context - num_queries + first_query
    full_tiles = (first_position + 1) // TILE
    last_tile = tl.cdiv(tl.minimum(first_position + QUERIES, context), TILE)
    tables = table_ptr + s * table_width
    max_M, sum_M, o_MH = _attend_tiles(
        max_M, sum_M, o_MH, q_MH, position_M, k_ptr, v_ptr, tables, 0, full_tiles, context,
        scale_log2, num_kv_heads, kv_head, H, BLOCK_H, BLOCK_SIZE, TILE, MASKED=False,
    )  # fmt: skip
    max_M, sum_M, o_MH = _attend_tiles(
        max_M, sum_M, o_MH, q_MH, position_M, k_ptr, v_ptr, tables, full_tiles, last_tile, context,
        scale_log2, num_kv_heads, kv_head, H, BLOCK_H, BLOCK_SIZE, TILE, MASKED=True,
    )  # fmt: skip
    tl.store(o_ptr + offset_MH, (o_MH / sum_M[:, None]).to(o_ptr.dtype.element_ty), mask=mask_MH)


def prefill_tiles(head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """(rows per program, keys per tile, num_warps, num_stages), from what a row of K takes."""
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    if itemsize == 4:  # products in full fp32, without tensor cores
        return (32, 32, 8, 1) if row_bytes > 256 else (64, 32, 4, 2)
    if row_bytes > 256:
        return 64, 64, 8, 2
    # The loads of K and V wait for that of the block table: five stages leave three tiles of them under way.
    return 128, 64, 8, 5


def prefill_attention(
    o_TNH: Tensor,
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    *,
    min_query_len: int,
) -> None:
    """Fill the rows of o of the sequences with at least `min_query_len` queries, and touch no other.

    A row's bits depend on its own sequence alone, and not on how its prompt was cut into chunks: every row takes the
    same tiles of keys, at absolute positions, in ascending order.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_sequences, table_width = block_tables_SB.shape
    group = num_heads // num_kv_heads
    rows, tile, num_warps, num_stages = prefill_tiles(head_dim, max(q_TNH.element_size(), k_cache.element_size()))
    block_h = max(16, triton.next_power_of_2(head_dim))
    _prefill_kernel[(num_kv_heads, num_tokens // (rows // group) + num_sequences)](
        o_TNH, q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, scale * LOG2_E, table_width,
        num_sequences,
        MIN_QUERIES=min_query_len, GROUP=group, H=head_dim, BLOCK_H=block_h, BLOCK_SIZE=block_size, ROWS=rows,
        TILE=tile, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
