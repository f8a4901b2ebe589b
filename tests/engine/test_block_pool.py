"""The prefix index never hands out a block that holds anything but the tokens asked for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from megatron_infer.cache.block_pool import ROOT, BlockHash, BlockPool, Match, common_head, keyed_block_hash
from tests.support.invariants import check_pool

SIZE = 4


def store(pool: BlockPool, ids: list[int]) -> list[int]:
    """Do what a request does that computes `ids` and ends."""
    match = pool.match([*ids, -1])
    fresh = pool.take(pool.blocks_for(len(ids)) - len(match.blocks))
    assert fresh is not None
    if match.tail_block is not None:
        pool.release([match.tail_block])
    table = [*match.blocks, *fresh]
    parent = match.blocks[-1] if match.blocks else ROOT
    for index in range(len(match.blocks), len(table)):
        block = pool.seal(table[index], parent, ids[index * SIZE : (index + 1) * SIZE])
        if block is None:
            break
        table[index] = parent = block
    pool.release(table)
    check_pool(pool)
    return table


def matched(pool: BlockPool, ids: list[int]) -> int:
    """How many tokens of `ids` the pool claims to hold."""
    match = pool.match(ids)
    check_pool(pool)
    pool.release(match.held)
    check_pool(pool)
    return len(match.blocks) * SIZE + match.tail_len


@pytest.mark.parametrize("stored", range(1, 3 * SIZE + 1))
@pytest.mark.parametrize("asked", range(1, 3 * SIZE + 2))
def test_match_finds_every_cached_token_but_the_last_asked(stored: int, asked: int) -> None:
    pool = BlockPool(8, SIZE)
    store(pool, list(range(100, 100 + stored)))
    ids = [*range(100, 100 + min(stored, asked)), *range(500, 500 + max(asked - stored, 0))]
    assert matched(pool, ids) == min(stored, asked - 1)


@pytest.mark.parametrize("shared", range(2 * SIZE + 2))
def test_match_stops_at_the_first_different_token(shared: int) -> None:
    pool = BlockPool(8, SIZE)
    store(pool, list(range(3 * SIZE)))
    assert matched(pool, [*range(shared), *range(900, 900 + SIZE)]) == shared


def test_a_then_b_then_a_returns_the_blocks_of_a() -> None:
    pool = BlockPool(8, SIZE)
    a, b = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 50, 60, 70, 80, 90]
    table_a = store(pool, a)
    table_b = store(pool, b)
    assert table_a[0] == table_b[0]
    assert not set(table_a[1:]) & set(table_b[1:])
    match = pool.match([*a, 10])
    assert match == Match(table_a[:2], table_a[2], 1)
    pool.release(match.held)


def test_the_tail_source_is_the_sibling_with_the_longest_shared_head() -> None:
    pool = BlockPool(8, SIZE)
    for last in ([1, 2, 3, 9], [1, 2, 8], [1, 5], [7, 7, 7, 7]):
        store(pool, [0, 0, 0, 0, *last])
    for tail, expected in (([1, 2, 3, 4], 3), ([1, 2, 8, 8], 3), ([1, 2, 4, 4], 2), ([1, 9], 1), ([7, 7], 2), ([2], 0)):
        assert matched(pool, [0, 0, 0, 0, *tail, 99]) == SIZE + expected, tail


def test_a_matched_block_cannot_be_evicted_before_its_use() -> None:
    pool = BlockPool(3, SIZE)
    table = store(pool, list(range(2 * SIZE + 2)))
    match = pool.match(list(range(2 * SIZE + 5)))
    assert match.held == table
    assert pool.num_free == 0
    assert pool.take(1) is None
    pool.release(match.held)
    assert pool.take(3) is not None


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = list(range(2 * SIZE)), list(range(100, 100 + 2 * SIZE))
    store(pool, old)
    store(pool, new)
    matched(pool, [*old, -1])
    taken = pool.take(2)
    assert taken is not None
    assert matched(pool, [*old, -1]) == 2 * SIZE
    assert matched(pool, [*new, -1]) == 0
    pool.release(taken)
    taken = pool.take(3)
    assert taken is not None
    assert matched(pool, [*old, -1]) == SIZE, "the leaf goes before its parent"


def test_two_blocks_with_the_same_content_become_one() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.take(2) or ()
    assert pool.seal(first, ROOT, [1, 2, 3, 4]) == first
    assert pool.seal(second, ROOT, [1, 2, 3, 4]) == first
    check_pool(pool)
    assert pool._num_refs[first] == 2
    assert pool.num_free == 3
    pool.release([first])
    pool.release([first])
    check_pool(pool)


def test_a_hash_collision_is_a_miss() -> None:
    pool = BlockPool(8, SIZE, block_hash=lambda parent, ids: b"always the same ")
    store(pool, [1, 2, 3, 4])
    assert matched(pool, [5, 6, 7, 8, 9]) == 0
    assert matched(pool, [1, 2, 3, 4, 5]) == SIZE
    store(pool, [5, 6, 7, 8, 1, 2, 3, 4])
    assert matched(pool, [5, 6, 7, 8, 1, 2, 3, 4, 5]) == 0
    assert matched(pool, [1, 2, 3, 4, 5]) == SIZE


def test_a_collision_of_parents_does_not_lend_the_children() -> None:
    """Histories A and B collide; the blocks below A must not answer for B, before and after A is evicted."""
    real = keyed_block_hash(b"k")

    def collide(parent: bytes, ids: tuple[int, ...]) -> bytes:
        return b"A and B collide!" if ids[0] in (1, 5) else real(parent, ids)

    a, b, child = [1, 1, 1, 1], [5, 5, 5, 5], [9, 9, 9, 9]
    pool = BlockPool(4, SIZE, block_hash=collide)
    store(pool, a + child)
    assert matched(pool, [*b, *child, 0]) == 0
    store(pool, b + child)
    assert matched(pool, [*b, *child, 0]) == 0
    taken = pool.take(4)
    assert taken is not None
    pool.release(taken)
    store(pool, [*b, 8, 8, 8, 8])
    assert matched(pool, [*b, *child, 0]) == SIZE


def test_digests_depend_on_key_parent_and_every_token() -> None:
    block_hash = keyed_block_hash(b"one")
    base = block_hash(bytes(16), (1, 2, 3))
    assert base == keyed_block_hash(b"one")(bytes(16), (1, 2, 3))
    others = [
        keyed_block_hash(b"two")(bytes(16), (1, 2, 3)),
        block_hash(b"\1" * 16, (1, 2, 3)),
        block_hash(bytes(16), (1, 2, 4)),
        block_hash(bytes(16), (1, 2)),
    ]
    assert len({base, *others}) == 5


def test_forget_drops_a_block_and_all_below_it() -> None:
    pool = BlockPool(8, SIZE)
    table = store(pool, [*range(8), 20, 21])
    store(pool, [*range(4), 30, 31, 32, 33])
    store(pool, [40, 41, 42, 43])
    match = pool.match([*range(8), 99])
    pool.forget(table[0])
    check_pool(pool)
    assert matched(pool, [*range(8), 99]) == 0
    assert matched(pool, [40, 41, 42, 43, 99]) == SIZE
    fresh = pool.take(1)
    assert fresh is not None
    assert pool.seal(fresh[0], match.blocks[-1], [1, 2, 3, 4]) is None, "nothing can hang below a forgotten block"
    pool.release([*match.blocks, *fresh])
    check_pool(pool)
    assert pool.num_free == 8


def test_without_prefix_caching_nothing_is_ever_found() -> None:
    pool = BlockPool(4, SIZE, enable_prefix_caching=False)
    store(pool, list(range(10)))
    assert matched(pool, list(range(10))) == 0
    assert pool.num_free == 4


def test_take_is_all_or_nothing() -> None:
    pool = BlockPool(3, SIZE)
    assert pool.take(4) is None
    assert pool.num_free == 3
    assert sorted(pool.take(3) or ()) == [0, 1, 2]


def test_misuse_is_caught() -> None:
    pool = BlockPool(3, SIZE)
    (block,) = pool.take(1) or ()
    pool.seal(block, ROOT, [1, 2, 3, 4])
    with pytest.raises(AssertionError, match="sealed already"):
        pool.seal(block, ROOT, [1, 2, 3, 5])
    pool.release([block])
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release([block])
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0, SIZE)


def test_check_sees_a_leak() -> None:
    pool = BlockPool(3, SIZE)
    pool.take(1)
    pool._num_refs[0] = 0
    with pytest.raises(AssertionError, match="partition"):
        check_pool(pool)


def two_bit_hash(parent: bytes, ids: tuple[int, ...]) -> bytes:
    return bytes([(sum(parent) + sum(ids)) % 4])


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go; `truth` remembers what was written into each block, and every match is held against it."""

    block_hash: BlockHash | None = None

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE, block_hash=self.block_hash)
        self.truth: dict[int, list[int]] = {}
        self.tables: list[list[int]] = []

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def compute(self, ids: list[int]) -> None:
        pool = self.pool
        match = pool.match([*ids, 2])
        for index, block in enumerate(match.blocks):
            assert self.truth[block] == ids[: (index + 1) * SIZE]
        if match.tail_block is not None:
            start = len(match.blocks) * SIZE
            assert 0 < match.tail_len < SIZE
            assert self.truth[match.tail_block][: start + match.tail_len] == ids[: start + match.tail_len]
        else:
            assert match.tail_len == 0
        fresh = pool.take(pool.blocks_for(len(ids)) - len(match.blocks))
        if fresh is None:
            pool.release(match.held)
            return
        assert not set(fresh) & set(match.held)
        assert not set(fresh) & {block for table in self.tables for block in table}
        if match.tail_block is not None:
            pool.release([match.tail_block])
        table = [*match.blocks, *fresh]
        for index in range(len(match.blocks), len(table)):
            self.truth[table[index]] = ids[: (index + 1) * SIZE]
        for index in range(len(match.blocks), len(table)):
            parent = table[index - 1] if index else ROOT
            block = pool.seal(table[index], parent, ids[index * SIZE : (index + 1) * SIZE])
            if block is None:
                break
            assert self.truth[block] == ids[: (index + 1) * SIZE]
            table[index] = block
        self.tables.append(table)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.tables:
            index = data.draw(st.integers(0, len(self.tables) - 1))
            self.pool.release(self.tables.pop(index))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.tables:
            self.pool.forget(data.draw(st.sampled_from(self.tables))[0])

    @invariant()
    def sound(self) -> None:
        check_pool(self.pool)
        held = [block for table in self.tables for block in table]
        assert self.pool.num_free == self.pool.num_blocks - len(set(held))
        assert all(self.pool._num_refs[block] == held.count(block) for block in held)


class CollidingPoolMachine(PoolMachine):
    block_hash = staticmethod(two_bit_hash)


_SETTINGS = settings(max_examples=60, stateful_step_count=30, derandomize=True, deadline=None, database=None)
TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = _SETTINGS
TestCollidingPoolMachine = CollidingPoolMachine.TestCase
TestCollidingPoolMachine.settings = _SETTINGS


def test_common_head() -> None:
    assert common_head([], [1]) == 0
    assert common_head([1, 2], [1, 2, 3]) == 2
    assert common_head([1, 2, 4], [1, 2, 3]) == 2
