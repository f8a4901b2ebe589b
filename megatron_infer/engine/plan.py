"""A step in the making: whose tokens it computes, and the integers that say so to every rank.

Knows requests and their block tables. Who takes part is the scheduler's decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.engine.request import Request
from megatron_infer.engine.step import Ints, Step


@dataclass
class Plan:
    """What a step computes, and what its commit has to settle."""

    rows: list[tuple[Request, int]] = field(default_factory=list)
    """(request, number of its tokens computed)"""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """Step.copies_C3; the sources are held until the commit"""
    step: Step | None = None

    def has(self, request: Request) -> bool:
        return any(row_request is request for row_request, _ in self.rows)

    def build(self, pool: BlockPool) -> Step:
        """The next tokens of every row's ids."""
        token_ids: list[int] = []
        query_lens, context_lens, sample, block_tables = [], [], [], []
        full_logits = False
        for request, chunk in self.rows:
            end = request.num_computed + chunk
            is_sampled = end == len(request.ids)
            token_ids.extend(request.ids[request.num_computed : end])
            query_lens.append(chunk)
            context_lens.append(end)
            sample.append(int(is_sampled))
            full_logits |= is_sampled and not request.sampling.greedy_only
            block_tables.append(_table(request, pool.blocks_for(end)))
        return Step(
            token_ids_T=np.array(token_ids, dtype=np.int32),
            query_lens_S=np.array(query_lens, dtype=np.int32),
            context_lens_S=np.array(context_lens, dtype=np.int32),
            block_tables=block_tables,
            sample_S=np.array(sample, dtype=np.int32),
            copies_C3=np.array(self.copies, dtype=np.int32).reshape(-1, 3),
            full_logits=full_logits,
            request_ids=[request.request_id for request, _ in self.rows],
        )

    def build_ahead(self, pool: BlockPool, sample_indices: list[int]) -> Step:
        """One token per row: the sample of that index of the step in flight, which all ids are part of by then."""
        requests = [request for request, _ in self.rows]
        ones = np.ones(len(requests), dtype=np.int32)
        ends = [len(request.ids) + 1 for request in requests]
        return Step(
            token_ids_T=-1 - np.array(sample_indices, dtype=np.int32),
            query_lens_S=ones,
            context_lens_S=np.array(ends, dtype=np.int32),
            block_tables=[_table(request, pool.blocks_for(end)) for request, end in zip(requests, ends, strict=True)],
            sample_S=ones,
            copies_C3=np.empty((0, 3), dtype=np.int32),
            full_logits=any(not request.sampling.greedy_only for request in requests),
            request_ids=[request.request_id for request in requests],
        )


def _table(request: Request, num_blocks: int) -> Ints:
    """A copy: commit may exchange a block of the table, and an exported array cannot grow."""
    return np.frombuffer(request.block_table, dtype=np.int32, count=num_blocks).copy()
