"""Prompts that begin alike: one computes what they share, and the others had better wait until it is in the cache.

Knows what the step in the making computes. Who is admitted to it is the scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_infer.cache.block_pool import ROOT, BlockPool, Match, common_head
from megatron_infer.engine.request import Request

Chunk = tuple[Request, int]
"""How many of a request's ids the step computes."""


class SharedPrefill:
    """The chunks of a step by the first block that each completes, and that its commit will seal."""

    def __init__(self, pool: BlockPool, chunks: Iterable[Chunk]) -> None:
        self._pool = pool
        self._chunks: dict[tuple[int, tuple[int, ...]], Chunk] = {}
        """By (parent, ids) of that block"""
        for chunk in chunks:
            self.add(chunk)

    def add(self, chunk: Chunk) -> None:
        """Note what one more chunk will leave in the cache."""
        request, num_tokens = chunk
        size = self._pool.block_size
        index = request.num_computed // size
        end = (index + 1) * size
        if self._pool.enable_prefix_caching and request.num_computed + num_tokens >= end:
            parent = request.block_table[index - 1] if index else ROOT
            self._chunks.setdefault((parent, tuple(request.ids[end - size : end])), chunk)

    def is_worth_waiting_for(self, request: Request, match: Match, budget: int) -> bool:
        """Whether this very step computes, for another request, at least half of what this one would compute in it.

        The samples of one prompt then prefill it once. The other request is in the step, so the wait is one step long.
        """
        size = self._pool.block_size
        start = len(match.blocks) * size
        parent = match.blocks[-1] if match.blocks else ROOT
        chunk = self._chunks.get((parent, tuple(request.ids[start : start + size])))
        if chunk is None:
            return False
        other, num_tokens = chunk
        limit = min(len(request.ids) - 1, other.num_computed + num_tokens)
        shared = common_head(request.ids[start:limit], other.ids[start:limit]) // size * size
        return 2 * (shared - match.tail_len) >= min(budget, len(request.ids) - start - match.tail_len)
