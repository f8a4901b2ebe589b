"""Attention over the paged cache, keys cut at fixed positions: decode, draft verification, prompts to the same bits.

A program takes the rows (query, head) of one KV head and a stretch of keys. Where others share its rows it leaves a
partial softmax and adds 1 to a counter; whoever comes last folds the partials in order and sets the counter back to 0,
where the next launch needs it. So one launch does all, and nothing has to be cleared before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from megatron_infer.kernels.triton import target

MAX_QUERIES = 16
"""Of a sequence whose keys several programs share: each writes that many rows of partial results at most."""
FOLD = 8
"""Tiles whose softmaxes are folded to one, a span, before any other is added, wherever that happens."""
NUM_COUNTERS = 16384
"""Row tiles x KV heads x sequences of a launch for which make_counters has room: 64 KiB."""
LOG2_E = 1.4426950408889634


@triton.jit
def _fold(max_M, sum_M, o_MH, new_max_M, new_sum_M, new_o_MH):
    """Add a later stretch of keys to a partial softmax: maxima in log2 units, sums, unnormalised outputs.

    A stretch that a row does not see (-inf, 0, 0) changes no bit, and the first one becomes the sum as it is.
    """
    top_M = tl.maximum(max_M, new_max_M)
    finite_M = tl.where(top_M == float("-inf"), 0.0, top_M)
    old_M, new_M = tl.exp2(max_M - finite_M), tl.exp2(new_max_M - finite_M)
    sum_M = tl.fma(sum_M, old_M, new_sum_M * new_M)
    o_MH = tl.fma(o_MH, old_M[:, None], new_o_MH * new_M[:, None])
    return top_M, sum_M, o_MH


@triton.jit
def _attend(
    q_MH, position_M, first_tile, last_tile, k_ptr, v_ptr, table_ptr, context, scale_log2, num_kv_heads, kv_head,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
    HAS_SPANS: tl.constexpr,
):  # fmt: skip
    """Partial softmax of tiles of keys, folded span by span where there may be more than one span."""
    ROWS: tl.constexpr = q_MH.shape[0]
    h = tl.arange(0, BLOCK_H)
    empty_M, zero_M = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    zero_MH = tl.zeros([ROWS, BLOCK_H], tl.float32)
    max_M, sum_M, o_MH = empty_M, zero_M, zero_MH
    span_max_M, span_sum_M, span_o_MH = empty_M, zero_M, zero_MH
    for tile in tl.range(first_tile, last_tile):
        position_J = tile * TILE + tl.arange(0, TILE)
        written_J = position_J < context
        block_J = tl.load(table_ptr + position_J // BLOCK_SIZE, mask=written_J, other=0)
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
        span_max_M, span_sum_M, span_o_MH = _fold(
            span_max_M, span_sum_M, span_o_MH, tile_max_M, tl.sum(p_MJ, axis=1), tile_o_MH
        )
        if HAS_SPANS:
            ends_span = tile % FOLD == FOLD - 1
            if ends_span:
                max_M, sum_M, o_MH = _fold(max_M, sum_M, o_MH, span_max_M, span_sum_M, span_o_MH)
                span_max_M, span_sum_M, span_o_MH = empty_M, zero_M, zero_MH
    return _fold(max_M, sum_M, o_MH, span_max_M, span_sum_M, span_o_MH)


@triton.jit
def _leave_partial(
    max_M, sum_M, o_MH, partial_o_ptr, partial_softmax_ptr, counter_ptr, slot_M, valid_M,
    H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store a partial softmax for whoever merges; how many had done so before."""
    h = tl.arange(0, BLOCK_H)[None, :]
    tl.store(partial_softmax_ptr + 2 * slot_M, max_M, mask=valid_M)
    tl.store(partial_softmax_ptr + 2 * slot_M + 1, sum_M, mask=valid_M)
    tl.store(partial_o_ptr + slot_M[:, None].to(tl.int64) * H + h, o_MH, mask=valid_M[:, None] & (h < H))
    tl.debug_barrier()  # the atomic is one thread's, and releases what all have stored
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _merge(
    partial_o_ptr, partial_softmax_ptr, slot_M, valid_M, used, is_tile,
    H: tl.constexpr, BLOCK_H: tl.constexpr, FOLD: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Fold the stored partials of a row tile in ascending order; those that are single tiles first FOLD by FOLD.

    BATCH of them are loaded before the first is used, so that their loads are in flight together.
    """
    h = tl.arange(0, BLOCK_H)[None, :]
    max_M = tl.full([slot_M.shape[0]], float("-inf"), tl.float32)
    sum_M, o_MH = tl.zeros([slot_M.shape[0]], tl.float32), tl.zeros([slot_M.shape[0], BLOCK_H], tl.float32)
    for first in range(0, used, FOLD):
        span_max_M = tl.where(is_tile, float("-inf"), max_M)
        span_sum_M, span_o_MH = tl.where(is_tile, 0.0, sum_M), tl.where(is_tile, 0.0, o_MH)
        for batch in tl.static_range(0, FOLD, BATCH):
            partials = ()
            for i in tl.static_range(batch, batch + BATCH):
                mask_M = valid_M & (first + i < used)
                softmax_M = partial_softmax_ptr + 2 * (slot_M + first + i)
                o_ptr_MH = partial_o_ptr + (slot_M + first + i)[:, None].to(tl.int64) * H + h
                # .cg: other SMs wrote them, and the L1 cache would not know.
                partials += (
                    tl.load(softmax_M, mask=mask_M, other=float("-inf"), cache_modifier=".cg"),
                    tl.load(softmax_M + 1, mask=mask_M, other=0.0, cache_modifier=".cg"),
                    tl.load(o_ptr_MH, mask=mask_M[:, None] & (h < H), other=0.0, cache_modifier=".cg"),
                )
            for i in tl.static_range(BATCH):
                span_max_M, span_sum_M, span_o_MH = _fold(
                    span_max_M, span_sum_M, span_o_MH, partials[3 * i], partials[3 * i + 1], partials[3 * i + 2]
                )
        if is_tile:
            max_M, sum_M, o_MH = _fold(max_M, sum_M, o_MH, span_max_M, span_sum_M, span_o_MH)
        else:
            max_M, sum_M, o_MH = span_max_M, span_sum_M, span_o_MH
    return max_M, sum_M, o_MH


@triton.jit
def _extent(
    query_start_ptr, context_ptr, s, row_tile, single_tiles, tiles_per_partial,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """First query row of sequence s, its queries, its positions; tiles that the row tile sees, tiles of a partial."""
    start = tl.load(query_start_ptr + s)
    num_queries = tl.load(query_start_ptr + s + 1) - start
    context = tl.load(context_ptr + s)
    end_query = tl.minimum(num_queries, tl.cdiv((row_tile + 1) * ROWS, GROUP))
    num_tiles = tl.cdiv(context - num_queries + end_query, TILE)
    tiles = tl.where(num_tiles > single_tiles, tiles_per_partial, 1)
    return start, num_queries, context, num_tiles, tiles


# The batch's index tensors are cut from one buffer and its shapes change from step to step; compiling for each
# alignment or divisor would stop the engine now and then. tiles_per_partial is no constant because the compiler would
# make a loop of its own for the other value, 1, and take half as many registers again.
@triton.jit(
    do_not_specialize=["table_width", "num_partials", "tiles_per_partial", "single_tiles", "max_queries"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "context_ptr"],
)
def _decode_kernel(
    o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    context_ptr,
    partial_o_ptr,
    partial_softmax_ptr,
    counter_ptr,
    scale_log2,
    table_width,
    num_kv_heads,
    num_partials,
    tiles_per_partial,
    single_tiles,
    max_queries,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    BATCH: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (row tiles * G, partials, S).

    A partial is `tiles_per_partial` tiles of keys, in sequences of at most `single_tiles` tiles one. Without IS_SPLIT
    there is one partial, however many tiles.
    """
    if OVERLAPS:
        # All programs wait before anything else; the projection behind may have its first weights loaded meanwhile.
        gdc_launch_dependents()
        gdc_wait()
    kv_head, row_tile = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads
    partial, s = tl.program_id(1), tl.program_id(2)
    start, num_queries, context, num_tiles, tiles = _extent(
        query_start_ptr, context_ptr, s, row_tile, single_tiles, tiles_per_partial, GROUP, ROWS, TILE
    )
    used = tl.cdiv(num_tiles, tiles)
    if (num_queries > max_queries) | (row_tile * ROWS >= num_queries * GROUP) | (partial >= used):
        return
    first_tile = partial * tiles
    last_tile = tl.minimum(first_tile + tiles, num_tiles)
    packed_M, h = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_H)[None, :]
    query_M, head_M = packed_M // GROUP, kv_head * GROUP + packed_M % GROUP
    valid_M, num_heads = query_M < num_queries, num_kv_heads * GROUP
    mask_MH = valid_M[:, None] & (h < H)
    offset_MH = ((start + query_M) * num_heads + head_M)[:, None].to(tl.int64) * H + h
    q_MH = tl.load(q_ptr + offset_MH, mask=mask_MH, other=0.0)
    max_M, sum_M, o_MH = _attend(
        q_MH, context - num_queries + query_M, first_tile, last_tile, k_ptr, v_ptr, table_ptr + s * table_width,
        context, scale_log2, num_kv_heads, kv_head, H, BLOCK_H, BLOCK_SIZE, TILE, FOLD, HAS_SPANS=not IS_SPLIT,
    )  # fmt: skip
    # Read again, not kept: in the loop registers are short.
    start, num_queries, _, num_tiles, tiles = _extent(
        query_start_ptr, context_ptr, s, row_tile, single_tiles, tiles_per_partial, GROUP, ROWS, TILE
    )
    used = tl.cdiv(num_tiles, tiles)
    valid_M = query_M < num_queries
    mask_MH = valid_M[:, None] & (h < H)
    offset_MH = ((start + query_M) * num_heads + head_M)[:, None].to(tl.int64) * H + h
    if IS_SPLIT:
        is_shared = used > 1
        if is_shared:
            # At most min(T, S * max_queries) rows have partials, and no two of the sequences that come here overlap.
            first_row = tl.minimum(start, s * max_queries)
            slot_M = ((first_row + query_M) * num_heads + head_M) * num_partials
            counter_ptr += s * tl.num_programs(0) + tl.program_id(0)
            arrived = _leave_partial(
                max_M,
                sum_M,
                o_MH,
                partial_o_ptr,
                partial_softmax_ptr,
                counter_ptr,
                slot_M + partial,
                valid_M,
                H,
                BLOCK_H,
            )
            if arrived < used - 1:
                return
            tl.store(counter_ptr, 0)
            max_M, sum_M, o_MH = _merge(
                partial_o_ptr, partial_softmax_ptr, slot_M, valid_M, used, tiles == 1, H, BLOCK_H, FOLD, BATCH
            )
    tl.store(o_ptr + offset_MH, (o_MH / sum_M[:, None]).to(o_ptr.dtype.element_ty), mask=mask_MH)


def make_counters(device: torch.device) -> Tensor:
    """The int32 zeros that launches on one stream count in, and leave zero."""
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


def decode_tiles(head_dim: int, group: int, itemsize: int) -> tuple[int, int]:
    """(rows per program, keys per tile): what 8 warps hold without spilling. A property of the model, not the batch.

    32 KiB of K per tile or, where a product takes more registers, 16 KiB. Rows for at least four queries, in fp32 two,
    but at most 32: 64 would take other tensor core instructions.
    """
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile_bytes = 32768 if itemsize == 2 and row_bytes <= 256 else 16384
    rows = (4 if itemsize == 2 else 2) * triton.next_power_of_2(group)
    return max(16, min(32, rows)), min(128, tile_bytes // row_bytes)


@dataclass(frozen=True)
class WorkCut:
    """How many programs share the keys of a row tile, which no bit of the result depends on.

    Attributes:
        partials: the most of any sequence; 1: one program takes all keys.
        single_tiles: a sequence of up to so many tiles has a partial for each.
        tiles_per_partial: in a longer one.
    """

    partials: int
    single_tiles: int
    tiles_per_partial: int


def cut_work(row_tiles: int, table_tiles: int, num_sms: int, *, is_prompt: bool = False) -> WorkCut:
    """Fewer partials are fewer to write and read: single tiles only while spans keep less than every other SM busy.

    Args:
        row_tiles: of the launch, over all KV heads and sequences. One on every SM needs no splitting at all.
        table_tiles: of the longest sequence that the block table has room for.
        is_prompt: too many rows for partial results.
    """
    if is_prompt or row_tiles >= num_sms:
        return WorkCut(partials=1, single_tiles=0, tiles_per_partial=table_tiles)
    single_tiles = FOLD * (triton.cdiv(num_sms, 2 * row_tiles) - 1)
    return WorkCut(max(min(single_tiles, table_tiles), triton.cdiv(table_tiles, FOLD)), single_tiles, FOLD)


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
    counters: Tensor,
) -> None:
    """Fill the rows of o of the sequences with up to `max_query_len` queries, and touch no other.

    A row's bits depend on the keys it sees alone: they are split at absolute positions, and the programs' row tile, key
    tile and order of folding depend only on head_dim, dtype and N / G. More rows than one tile has read the keys again,
    from the L2 cache: a larger tile for longer queries would sum in another order.

    Where keys are split (cut_work) it allocates min(T, S * max_query_len) * N * (head_dim + 2) floats per partial.

    Args:
        num_sms: of the device.
        counters: int32 zeros (make_counters), left so; no two launches may use them at the same time.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_sequences, table_width = block_tables_SB.shape
    group, device = num_heads // num_kv_heads, q_TNH.device
    rows, tile = decode_tiles(head_dim, group, max(q_TNH.element_size(), k_cache.element_size()))
    grid_rows = triton.cdiv(max_query_len * group, rows) * num_kv_heads
    row_tiles, table_tiles = grid_rows * num_sequences, triton.cdiv(table_width * block_size, tile)
    cut = cut_work(row_tiles, table_tiles, num_sms, is_prompt=max_query_len > MAX_QUERIES)
    partial_o = partial_softmax = None
    if cut.partials > 1:
        shape = (min(num_tokens, max_query_len * num_sequences), num_heads, cut.partials)
        partial_o = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
        partial_softmax = torch.empty((*shape, 2), dtype=torch.float32, device=device)
        if row_tiles > counters.numel():
            counters = torch.zeros(row_tiles, dtype=torch.int32, device=device)
    overlaps, block_h = target.has_dependent_launch(), max(16, triton.next_power_of_2(head_dim))
    # Of 8 floats per thread FOLD partials fit the registers; of more, the compiler spills unless it chooses the order.
    batch = FOLD if rows * block_h <= 2048 else 1
    # Split or not, products and sums must round alike: none are fused but the explicit FMAs.
    _decode_kernel[(grid_rows, cut.partials, num_sequences)](
        o_TNH, q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, partial_o, partial_softmax,
        counters, scale * LOG2_E, table_width, num_kv_heads, cut.partials, cut.tiles_per_partial, cut.single_tiles,
        max_query_len,
        GROUP=group, H=head_dim, BLOCK_H=block_h, BLOCK_SIZE=block_size, ROWS=rows, TILE=tile, FOLD=FOLD, BATCH=batch,
        IS_SPLIT=cut.partials > 1, OVERLAPS=overlaps, num_warps=8, num_stages=2, enable_fp_fusion=False,
        launch_pdl=overlaps,
    )  # fmt: skip
