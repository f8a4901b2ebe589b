"""What always holds of the block pool and of the scheduler, asserted from their insides."""

from __future__ import annotations

from megatron_infer.cache.block_pool import ROOT, ROOT_DIGEST, BlockPool
from megatron_infer.engine.scheduler import Scheduler


def check_pool(pool: BlockPool) -> None:
    """Of reference counts, prefix index and eviction order; O(number of blocks)."""
    held = {block for block, refs in enumerate(pool._num_refs) if refs > 0}
    groups = [*pool._blank, *pool._cached_free, *held]
    assert sorted(groups) == list(range(pool.num_blocks)), "blank, cached free and held must partition the blocks"
    assert min(pool._num_refs) >= 0
    assert all(pool._entries[block] is None for block in pool._blank)
    assert all(pool._entries[block] is not None for block in pool._cached_free)
    age = {block: position for position, block in enumerate(pool._cached_free)}
    hanging: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    digests: dict[bytes, int] = {}
    for block, entry in enumerate(pool._entries):
        if entry is None:
            continue
        hanging.setdefault(entry.parent, []).append((entry.ids, block))
        parent = pool._entries[entry.parent] if entry.parent != ROOT else None
        if entry.parent != ROOT:
            assert parent is not None, f"block {block} hangs in the air"
            assert len(parent.ids) == pool.block_size
            if block in held:
                assert entry.parent in held, f"block {block} is held, its parent {entry.parent} is not"
            elif entry.parent not in held:
                assert age[block] < age[entry.parent], f"block {block} would outlive its parent {entry.parent}"
        if len(entry.ids) == pool.block_size:
            assert entry.digest == pool._hash(parent.digest if parent else ROOT_DIGEST, entry.ids)
            digests[entry.digest] = block
    assert digests == pool._by_digest
    assert {parent: sorted(children) for parent, children in hanging.items()} == pool._children
    assert pool.enable_prefix_caching or not hanging


def check_scheduler(scheduler: Scheduler) -> None:
    """Of the queues, and of the pool."""
    pool = scheduler.pool
    check_pool(pool)
    in_flight = [row.request for plan in scheduler._plans for row in plan.rows]
    ended = [request for request in in_flight if request.finish_reason is not None]
    order = list(scheduler._requests.values())  # a dict keeps the order of arrival
    assert [r for r in order if r not in ended] == [*scheduler._running, *scheduler._waiting]
    refs = [0] * pool.num_blocks
    for block in [b for request in order for b in request.block_table]:
        refs[block] += 1
    for source in [source for plan in scheduler._plans for source, _, _ in plan.copies]:
        refs[source] += 1
    assert refs == pool._num_refs, "a block leaked or is held too often"
    for request in scheduler._waiting:
        assert request.num_computed == 0
        assert not request.block_table
    assert len(scheduler._running) <= min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    if not scheduler._plans:
        in_time = scheduler._running[:-1]
        assert all(request.num_remaining == 1 or not request.takes_drafts for request in in_time)
        assert sum(request.num_remaining for request in in_time) < scheduler.max_num_batched_tokens
        for request in scheduler._running:
            assert len(request.block_table) <= pool.blocks_for(len(request.ids)), "a rejected draft keeps its block"
    for request in scheduler._running:
        assert 0 <= request.num_computed < len(request.ids)
        assert len(request.block_table) * pool.block_size >= request.num_computed
        writable = request.block_table[request.num_sealed :]
        assert all(pool._num_refs[block] == 1 for block in writable), "a block that is still written is shared"
