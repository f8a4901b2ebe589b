"""A request's KV-cache blocks: taken whole at admission, sealed as they fill, given up in the end.

Owns the cache fields of a Request. Who gets blocks, and when, is the scheduler's decision.
"""

from __future__ import annotations

from array import array

from megatron_infer.cache.block_pool import ROOT, BlockPool, Match
from megatron_infer.engine.request import Request

Copy = tuple[int, int, int]
"""(source block, destination block, number of leading tokens)"""


def allocate(pool: BlockPool, request: Request, match: Match, num_reserved: int) -> list[Copy] | None:
    """Blocks for all of the request's tokens, or nothing: a prompt is never preempted between its own chunks.

    Args:
        match: what the pool holds of them; its references go to the request and to the copy, or are dropped.
        num_reserved: blocks that must stay free.
    Returns:
        the copy to make of the matched tail, if there is one, whose source is held; None: too few blocks are free.
    """
    num_fresh = pool.blocks_for(len(request.ids)) - len(match.blocks)
    wanted = num_fresh + num_reserved
    tail_block, tail_len = match.tail_block, match.tail_len
    if tail_block is not None and pool.num_free < wanted:
        pool.release([tail_block])
        tail_block, tail_len = None, 0
    fresh = pool.take(num_fresh) if pool.num_free >= wanted else None
    if fresh is None:
        pool.release(match.blocks)
        return None
    request.block_table = array("i", [*match.blocks, *fresh])
    request.num_sealed = len(match.blocks)
    request.num_computed = len(match.blocks) * pool.block_size + tail_len
    if request.num_cached_tokens is None:
        request.num_cached_tokens = request.num_computed
    return [] if tail_block is None else [(tail_block, fresh[0], tail_len)]


def grow(pool: BlockPool, request: Request, num_tokens: int) -> bool:
    """Have blocks for `num_tokens` tokens; False, and nothing changed, if too few are free."""
    missing = pool.blocks_for(num_tokens) - len(request.block_table)
    if missing > 0:
        fresh = pool.take(missing)
        if fresh is None:
            return False
        request.block_table.extend(fresh)
    return True


def shrink(pool: BlockPool, request: Request) -> None:
    """Give back the blocks behind those that hold the request's ids: a rejected draft's."""
    num_blocks = pool.blocks_for(len(request.ids))
    pool.release(request.block_table[num_blocks:])
    del request.block_table[num_blocks:]


def seal_full_blocks(pool: BlockPool, request: Request) -> None:
    """Make the blocks that are computed by now matchable."""
    size, table = pool.block_size, request.block_table
    while request.cacheable and (request.num_sealed + 1) * size <= request.num_computed:
        index = request.num_sealed
        parent = table[index - 1] if index else ROOT
        block = pool.seal(table[index], parent, request.ids[index * size : (index + 1) * size])
        if block is None:
            request.cacheable = False
        else:
            table[index] = block
            request.num_sealed += 1


def vacate(pool: BlockPool, request: Request) -> None:
    """Give up the blocks; what is computed stays matchable, the head of the last block included."""
    table, index = request.block_table, request.num_sealed
    computed_tail = request.ids[index * pool.block_size : request.num_computed]
    if request.cacheable and computed_tail:
        pool.seal(table[index], table[index - 1] if index else ROOT, computed_tail)
    pool.release(table)
    request.block_table = array("i")
    request.num_computed = request.num_sealed = 0
    request.cacheable = True
