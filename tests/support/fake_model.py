"""A stand-in for the network, with a real paged memory, and a bench that drives the scheduler with it.

What the fake model writes for a position depends on all it reads through the block table, and so does the next token:
a wrong block, a missed copy or a stale token changes the answer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_infer.cache.block_pool import BlockHash, BlockPool
from megatron_infer.engine.plan import Plan
from megatron_infer.engine.request import Event, Request, Sampled
from megatron_infer.engine.scheduler import Drafter, Scheduler
from megatron_infer.engine.step import Step
from megatron_infer.sampling_params import SamplingParams
from tests.support.invariants import check_scheduler

EOS = 7
VOCAB = 8


def extend(history: int, token_id: int) -> int:
    """Digest of a history and one more token."""
    return (history * 1_000_003 + token_id + 1) % (2**61 - 1)


def next_token(history: int) -> int:
    return history // 7 % VOCAB


def completion(prompt: list[int], max_new_tokens: int, stop: frozenset[int]) -> list[int]:
    """What the fake model answers to a prompt, computed without cache or batch."""
    history = 0
    for token_id in prompt:
        history = extend(history, token_id)
    out: list[int] = []
    while len(out) < max_new_tokens:
        out.append(next_token(history))
        if out[-1] in stop:
            break
        history = extend(history, out[-1])
    return out


def continuation(request: Request) -> list[int]:
    """What the fake model would go on with, past any end token."""
    return completion(request.ids, 8, frozenset())


@dataclass
class FakeModel:
    """memory[block][offset] = (token id, position, digest of the history up to it)."""

    block_size: int
    memory: dict[int, dict[int, tuple[int, int, int]]] = field(default_factory=dict)
    last_ids: list[int] = field(default_factory=list)
    """samples of the last step"""

    def resolved(self, step: Step) -> Step:
        """With the last step's samples in place of the ids that stand for them."""
        ids = [token_id if token_id >= 0 else self.last_ids[-1 - token_id] for token_id in step.token_ids_T.tolist()]
        return replace(step, token_ids_T=np.array(ids, dtype=np.int32))

    def execute(self, step: Step, truth: list[list[int]]) -> list[list[Sampled]]:
        """Run a step as followers see it; truth[s] are the ids of sequence s, to compare with what is read."""
        step = self.resolved(Step.decode(step.encode()))
        copies = step.copies_C3.tolist()
        assert not {source for source, _, _ in copies} & {target for _, target, _ in copies}
        for source, target, num_tokens in copies:
            head = {offset: self.memory[source][offset] for offset in range(num_tokens)}
            self.memory.setdefault(target, {}).update(head)
        starts = np.cumsum(step.query_lens_S) - step.query_lens_S
        self._write_all(step, starts)
        sampled = []
        for row, ids in enumerate(truth):
            context = int(step.context_lens_S[row])
            read = self._read(step.block_tables[row], context)
            assert [token_id for token_id, _, _ in read] == ids[:context]
            assert [position for _, position, _ in read] == list(range(context))
            num_samples = int(step.num_samples_S[row])
            sampled.append([Sampled(next_token(history)) for _, _, history in read[context - num_samples :]])
        self.last_ids = [result.token_id for samples in sampled for result in samples]
        return sampled

    def _read(self, table: np.ndarray, num_tokens: int) -> list[tuple[int, int, int]]:
        return [self.memory[int(table[p // self.block_size])][p % self.block_size] for p in range(num_tokens)]

    def _write_all(self, step: Step, starts: np.ndarray) -> None:
        """Every row sees the memory as it was before the step, and what it writes itself."""
        written: dict[tuple[int, int], tuple[int, int, int]] = {}
        for row, start in enumerate(starts.tolist()):
            query, context = int(step.query_lens_S[row]), int(step.context_lens_S[row])
            table, first = step.block_tables[row], context - query
            history = self._read(table, first)[-1][2] if first else 0
            for index in range(query):
                position = first + index
                token_id = int(step.token_ids_T[start + index])
                history = extend(history, token_id)
                slot = int(table[position // self.block_size]), position % self.block_size
                assert slot not in written, "two rows write the same slot"
                written[slot] = (token_id, position, history)
        for (block, offset), entry in written.items():
            self.memory.setdefault(block, {})[offset] = entry


class Bench:
    """A scheduler, its pool and the fake model; collects outputs and events."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 64,
        enable_prefix_caching: bool = True,
        block_hash: BlockHash | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching, block_hash=block_hash)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            drafter=drafter,
        )
        self.model = FakeModel(block_size)
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[Event]] = {}
        self.num_computed_tokens = 0
        self._ids = itertools.count()

    def add(self, prompt: list[int], max_new_tokens: int = 4, **sampling: object) -> int:
        request = Request(next(self._ids), prompt, SamplingParams(max_new_tokens, **sampling), 10**9, frozenset({EOS}))
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.events[request.request_id] = []
        return request.request_id

    def execute(self, plan: Plan) -> list[list[Sampled]]:
        step = plan.step
        for row, num_samples in zip(plan.rows, step.num_samples_S.tolist(), strict=True):
            assert row.end >= len(row.request.ids) or num_samples == row.num_scores, "a sample of half a prompt"
        self.num_computed_tokens += int(step.query_lens_S.sum())
        truth = [[*row.request.ids, *row.draft] for row in plan.rows]
        if (step.token_ids_T < 0).any():  # every row is one token, the sample of a step that is not committed
            for ids, token_id in zip(truth, self.model.resolved(step).token_ids_T.tolist(), strict=True):
                ids.append(token_id)
        return self.model.execute(step, truth)

    def commit(self, plan: Plan, sampled: list[list[Sampled]]) -> list[Event]:
        events = self.scheduler.commit(plan, sampled)
        for event in events:
            self.events[event.request.request_id].append(event)
        return events

    def schedule(self) -> Plan:
        """The next step, which there must be."""
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def step(self) -> Plan | None:
        plan = self.scheduler.schedule()
        check_scheduler(self.scheduler)
        if plan is not None:
            self.commit(plan, self.execute(plan))
            check_scheduler(self.scheduler)
        return plan

    def run(self) -> list[Plan]:
        plans = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < 10_000, "livelock"
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks
        return plans

    def verify(self, request_id: int) -> None:
        """The finished request's ids, reason and events are those of the request computed alone."""
        request = self.requests[request_id]
        wanted = completion(
            request.ids[: request.num_prompt], request.longest_len - request.num_prompt, request.stop_token_ids
        )
        assert output_of(request) == wanted
        if request.sampling.prompt_logprobs is not None:
            history, scores = 0, []
            for token_id in request.ids[: request.num_prompt - 1]:
                history = extend(history, token_id)
                scores.append(next_token(history))
            assert [score.token_id for score in request.prompt_scores] == scores, "of these rows, in this order"
        events = self.events[request_id]
        if not wanted:
            assert [(event.sampled, event.finish_reason) for event in events] == [(None, "length")]
            return
        assert tokens_of(events) == wanted
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(wanted) - 1)
        assert events[-1].finish_reason == ("stop" if wanted[-1] in request.stop_token_ids else "length")

    def ask(self, prompt: list[int], max_new_tokens: int = 4) -> Request:
        """Run one request to its end; returns it verified."""
        request_id = self.add(prompt, max_new_tokens)
        self.run()
        self.verify(request_id)
        return self.requests[request_id]


def ids_in(plan: Plan) -> list[int]:
    """Whose tokens the step computes."""
    return [row.request.request_id for row in plan.rows]


def output_of(request: Request) -> list[int]:
    return request.ids[request.num_prompt :]


def tokens_of(events: list[Event]) -> list[int]:
    """The new tokens; every event must bring one."""
    return [event.sampled.token_id for event in events]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()


def lasting_prompt(length: int, max_new_tokens: int) -> list[int]:
    """A prompt that the fake model does not end before `max_new_tokens`."""
    prompts = (prompt_of(length, seed) for seed in itertools.count())
    return next(p for p in prompts if EOS not in completion(p, max_new_tokens, frozenset({EOS})))
