"""A planned step: whose tokens it computes, and the integers that say so to every rank.

Knows requests and their block tables. Who takes part is the scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.engine.block_table import Copy
from megatron_infer.engine.request import Draw, Request
from megatron_infer.engine.step import Step


class Row(NamedTuple):
    """What a step computes of one request: some of its ids and, behind the last of them, a draft."""

    request: Request
    token_ids: Sequence[int]
    """-1 - j: the j-th sample of the step in flight"""
    end: int
    """Position behind `token_ids`. All of the request's ids are computed then, or it is not sampled."""
    draft: Sequence[int] = ()
    source: str = ""
    """of the draft"""
    num_scores: int = 0
    """How many of the prompt's tokens get their log probability from this step: from its last rows, before those that
    are sampled."""


@dataclass(frozen=True)
class Plan:
    """A step, and what its commit has to settle. Copies' sources are held until then."""

    rows: list[Row]
    copies: list[Copy]
    step: Step
    draws: list[Draw]
    """How each sampled row is drawn, where the step asks for full logits; else none."""

    @classmethod
    def of(cls, rows: list[Row], copies: list[Copy], pool: BlockPool) -> Plan:
        """The plan that computes `rows`, each request's blocks being in its table."""
        token_ids: list[int] = []
        query_lens, context_lens, num_samples, block_tables = [], [], [], []
        draws: list[Draw] = []
        for request, ids, end, draft, _, num_scores in rows:
            context_len = end + len(draft)
            is_sampled = end >= len(request.ids)
            token_ids += ids
            token_ids += draft
            query_lens.append(len(ids) + len(draft))
            context_lens.append(context_len)
            num_drawn = 1 + len(draft) if is_sampled else 0
            num_samples.append(num_scores + num_drawn)
            scored_end = end - 1 if is_sampled else end
            draws += [request.score(position) for position in range(scored_end - num_scores, scored_end)]
            draws += [request.draw(end + j, draft[:j]) for j in range(num_drawn)]
            # A copy: commit may exchange a block of the table, and an exported array cannot grow.
            table = np.frombuffer(request.block_table, dtype=np.int32, count=pool.blocks_for(context_len)).copy()
            block_tables.append(table)
        step = Step(
            token_ids_T=np.array(token_ids, dtype=np.int32),
            query_lens_S=np.array(query_lens, dtype=np.int32),
            context_lens_S=np.array(context_lens, dtype=np.int32),
            block_tables=block_tables,
            num_samples_S=np.array(num_samples, dtype=np.int32),
            copies_C3=np.array(copies, dtype=np.int32).reshape(-1, 3),
            full_logits=any(draw.needs_logits for draw in draws),
        )
        return cls(rows, copies, step, draws if step.full_logits else [])

    @property
    def is_decoding(self) -> bool:
        """Whether no row computes more than one token and its draft."""
        return all(len(row.token_ids) == 1 for row in self.rows)

    def has(self, request: Request) -> bool:
        return any(row.request is request for row in self.rows)
