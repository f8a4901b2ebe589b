"""Who holds which KV-cache block, and which blocks hold tokens that a later request can reuse.

Owns reference counts, the prefix index (a hash chain whose token ids are compared on every hit) and eviction order.
Knows nothing of tensors, requests or steps: a block is an integer.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROOT = -1
"""The parent of a sequence's first block."""

ROOT_DIGEST = bytes(16)

BlockHash = Callable[[bytes, Sequence[int]], bytes]
"""(digest of the parent, token ids of the block) -> digest of the block."""


def keyed_block_hash(key: bytes) -> BlockHash:
    """BLAKE2b under a secret key, so that nobody outside the process can aim for a collision."""

    def block_hash(parent: bytes, ids: Sequence[int]) -> bytes:
        return hashlib.blake2b(parent + array("i", ids).tobytes(), key=key, digest_size=16).digest()

    return block_hash


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt. The pool counts one reference on each block in `held` until `release(held)`.

    `blocks` are full and go into the block table as they are; the first `tail_len` tokens of `tail_block` are the ones
    that follow, and may be copied into a fresh block.
    """

    blocks: list[int]
    tail_block: int | None
    tail_len: int

    @property
    def held(self) -> list[int]:
        return self.blocks if self.tail_block is None else [*self.blocks, self.tail_block]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a sealed block holds: `ids` after everything that block `parent` and its ancestors hold."""

    digest: bytes
    parent: int
    ids: tuple[int, ...]


class BlockPool:
    """Blocks of `block_size` tokens: referenced, or free and still matchable (evicted oldest first), or blank.

    The index is a tree: a sealed block hangs below the block that holds the tokens before its own. Two rules make a
    parent outlive its children, so that a block number identifies a whole history: whoever holds a block holds its
    ancestors, and `release` lets go of the last block first. Hence the oldest free block is always a leaf.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, *,
        block_hash: BlockHash | None = None,
    ) -> None:  # fmt: skip
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs blocks: got {num_blocks} blocks of {block_size} tokens")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._hash = block_hash or keyed_block_hash(secrets.token_bytes(32))
        self._num_refs = [0] * num_blocks
        self._entries: list[_Entry | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._children: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        self._blank = list(reversed(range(num_blocks)))
        self._cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._blank) + len(self._cached_free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, ids: Sequence[int]) -> Match:
        """The longest cached head of `ids`, short of the last token: its logits are wanted, so it must be computed."""
        if not self.enable_prefix_caching:
            return Match([], None, 0)
        size, limit = self.block_size, len(ids) - 1
        blocks: list[int] = []
        parent, digest = ROOT, ROOT_DIGEST
        for start in range(0, limit - size + 1, size):
            chunk = tuple(ids[start : start + size])
            digest = self._hash(digest, chunk)
            block = self._lookup(digest, parent, chunk)
            if block is None:
                break
            blocks.append(block)
            parent = block
        start = len(blocks) * size
        tail_block, tail_len = self._longest_head(parent, tuple(ids[start : min(start + size, limit)]))
        match = Match(blocks, tail_block, tail_len)
        for block in match.held:
            self._hold(block)
        return match

    def take(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks to write, each with one reference, or None (and nothing taken) when there are too few."""
        if num_blocks > self.num_free:
            return None
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(num_blocks)]
        for block in taken:
            self._num_refs[block] = 1
        return taken

    def seal(self, block: int, parent: int, ids: Sequence[int]) -> int | None:
        """Make a computed block matchable below `parent` (ROOT for the first); it must not be written any more.

        Returns the block to use from now on: `block`, or one that already holds the same, to which the caller's
        reference has then moved. None: not cached, and nothing can be sealed below it. Fewer than `block_size` ids
        seal the computed head of the last block of a sequence; only copies are made of that.
        """
        assert self._num_refs[block] == 1, f"block {block} is shared"
        assert self._entries[block] is None, f"block {block} is sealed already"
        chunk = tuple(ids)
        assert 0 < len(chunk) <= self.block_size
        parent_entry = self._entries[parent] if parent != ROOT else None
        if not self.enable_prefix_caching or (parent != ROOT and parent_entry is None):
            return None
        if len(chunk) < self.block_size:
            if self._longest_head(parent, chunk)[1] == len(chunk):
                return None
            self._register(block, _Entry(b"", parent, chunk))
            return block
        digest = self._hash(parent_entry.digest if parent_entry else ROOT_DIGEST, chunk)
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._register(block, _Entry(digest, parent, chunk))
            return block
        twin = self._lookup(digest, parent, chunk)
        if twin is not None:
            self._hold(twin)
            self.release([block])
        return twin

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each; `blocks` in sequence order, as in a block table."""
        for block in reversed(blocks):
            assert self._num_refs[block] > 0, f"block {block} released more often than held"
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0 and self._entries[block] is None:
                self._blank.append(block)
            elif self._num_refs[block] == 0:
                self._cached_free[block] = None

    def forget(self, block: int) -> None:
        """Make `block` and all that hangs below it unmatchable, whoever holds them (their content is not trusted)."""
        pending = [block]
        while pending:
            block = pending.pop()
            pending.extend(child for _, child in self._children.get(block, ()))
            if self._entries[block] is not None:
                self._unregister(block)
            if block in self._cached_free:
                del self._cached_free[block]
                self._blank.append(block)

    def _lookup(self, digest: bytes, parent: int, chunk: tuple[int, ...]) -> int | None:
        block = self._by_digest.get(digest)
        if block is None:
            return None
        entry = self._entries[block]
        assert entry is not None
        return block if entry.parent == parent and entry.ids == chunk else None

    def _longest_head(self, parent: int, head: tuple[int, ...]) -> tuple[int | None, int]:
        """The child of `parent` that shares the longest non-empty head with `head`, and how long that is."""
        siblings = self._children.get(parent)
        if not siblings or not head:
            return None, 0
        # In lexicographic order the best one is a neighbour of the place where `head` belongs.
        place = bisect_left(siblings, (head, -1))
        best_block, best_len = None, 0
        for ids, block in siblings[max(place - 1, 0) : place + 1]:
            shared = common_head(ids, head)
            if shared > best_len:
                best_block, best_len = block, shared
        return best_block, best_len

    def _hold(self, block: int) -> None:
        if self._num_refs[block] == 0:
            del self._cached_free[block]
        self._num_refs[block] += 1

    def _register(self, block: int, entry: _Entry) -> None:
        self._entries[block] = entry
        insort(self._children.setdefault(entry.parent, []), (entry.ids, block))

    def _unregister(self, block: int) -> None:
        entry = self._entries[block]
        assert entry is not None
        self._entries[block] = None
        if len(entry.ids) == self.block_size:
            del self._by_digest[entry.digest]
        siblings = self._children[entry.parent]
        del siblings[bisect_left(siblings, (entry.ids, block))]
        if not siblings:
            del self._children[entry.parent]

    def _evict(self) -> int:
        block, _ = self._cached_free.popitem(last=False)
        assert block not in self._children, f"block {block} would be evicted before its children"
        self._unregister(block)
        return block


def common_head(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading items are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
