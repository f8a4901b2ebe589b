"""Whatever the scheduler plans, each request gets the tokens it would get alone.

Random arrivals, aborts and failures on tiny pools, against a fake model whose every read is compared with the truth.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_infer.cache.block_pool import ROOT, BlockHash
from megatron_infer.engine.plan import Plan
from megatron_infer.engine.request import Sampled
from megatron_infer.engine.scheduler import Drafter
from tests.support.drafters import RandomDrafter, UntimedLookup
from tests.support.fake_model import VOCAB, Bench, continuation, extend, ids_in
from tests.support.invariants import check_scheduler


def two_bit_hash(parent: bytes, ids: tuple[int, ...]) -> bytes:
    return bytes([(sum(parent) + sum(ids)) % 4])


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts and failures on a tiny pool; invariants after every rule, answers at every end."""

    block_hash: BlockHash | None = None
    enable_prefix_caching = True
    drafts = st.none()
    """How much of what is drafted is right, or "looked up"; None: there are no drafts."""

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 24),
        data=st.data(),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, data: st.DataObject) -> None:
        share_right = data.draw(self.drafts)
        drafter: Drafter | None = None
        if share_right is not None:
            is_real = share_right == "looked up"
            drafter = UntimedLookup() if is_real else RandomDrafter(continuation, VOCAB, share_right)
        self.bench = Bench(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=30,
            block_hash=self.block_hash,
            enable_prefix_caching=self.enable_prefix_caching,
            drafter=drafter,
        )
        self.in_flight: list[tuple[Plan, list[list[Sampled]]]] = []
        self.unfinished: list[int] = []
        self.failed: set[int] = set()

    @rule(
        head=st.sampled_from([[], [1, 1, 1], [1, 1, 1, 1, 2], [1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3]]),
        tail=st.lists(st.integers(0, 1), max_size=6),
        max_new_tokens=st.integers(0, 9),
        ignore_eos=st.booleans(),
        is_scored=st.sampled_from([False, False, True]),
        copies=st.integers(1, 3),
    )
    def add(
        self, head: list[int], tail: list[int], max_new_tokens: int, ignore_eos: bool, is_scored: bool, copies: int
    ) -> None:
        options = {"ignore_eos": ignore_eos, "prompt_logprobs": 0 if is_scored else None}
        for _ in range(copies):
            prompt = [*head, *tail]
            pool = self.bench.pool
            num_computed = min(len(prompt) + max(max_new_tokens - 1, 0), 29 if max_new_tokens else 30)
            if not prompt or num_computed > pool.num_blocks * pool.block_size:
                with pytest.raises(ValueError, match=r"empty|kv_cache_memory_bytes"):
                    self.bench.add(prompt, max_new_tokens, **options)
            else:
                self.unfinished.append(self.bench.add(prompt, max_new_tokens, **options))

    @precondition(lambda self: not self.in_flight)
    @rule()
    def schedule(self) -> None:
        scheduler = self.bench.scheduler
        plan = scheduler.schedule()
        assert (plan is not None) == bool(self.unfinished)
        if plan is None:
            return
        ids = ids_in(plan)
        assert 1 <= int(plan.step.query_lens_S.sum()) <= scheduler.max_num_batched_tokens
        assert len(ids) <= scheduler.max_num_seqs
        assert len(set(ids)) == len(ids) == len(scheduler._running)
        assert all(row.token_ids for row in plan.rows), "every running request progresses in every step"
        assert self.unfinished[0] in ids, "the oldest request progresses in every step"
        for request, _, end, draft, _, num_scores in plan.rows:
            assert not (draft and num_scores)
            assert not draft or len(request.ids) == end <= request.longest_len - 1 - len(draft)
        self.in_flight.append((plan, self.bench.execute(plan)))

    @precondition(lambda self: len(self.in_flight) == 1)
    @rule()
    def schedule_ahead(self) -> None:
        plan = self.bench.scheduler.schedule_ahead()
        if plan is not None:
            assert (plan.step.token_ids_T < 0).all()
            assert set(ids_in(plan)) <= set(ids_in(self.in_flight[0][0])) & set(self.unfinished)
            self.in_flight.append((plan, self.bench.execute(plan)))

    @precondition(lambda self: self.in_flight)
    @rule(failing=st.integers(0, 20), failing_sample=st.integers(0, 3))
    def commit(self, failing: int, failing_sample: int) -> None:
        bench = self.bench
        plan, sampled = self.in_flight.pop(0)
        if failing < len(sampled) and failing_sample < len(sampled[failing]):
            sampled[failing][failing_sample] = Sampled(0, error="not finite")
        expected = []
        for row, samples in zip(plan.rows, sampled, strict=True):
            is_computed_again = row.draft and samples[0].error is not None
            has_event = len(samples) > row.num_scores or any(s.error is not None for s in samples)
            if has_event and row.request.request_id in self.unfinished and not is_computed_again:
                expected.append(row.request.request_id)
        events = bench.commit(plan, sampled)
        assert list(dict.fromkeys(event.request.request_id for event in events)) == expected
        for event in events:
            request_id = event.request.request_id
            if event.finish_reason is not None:
                self.unfinished.remove(request_id)
                if event.finish_reason != "error":
                    bench.verify(request_id)
                else:
                    assert request_id == ids_in(plan)[failing] and not plan.rows[failing].draft

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.unfinished:
            request_id = data.draw(st.sampled_from(self.unfinished))
            event = self.bench.scheduler.abort(request_id)
            assert event is not None
            assert event.finish_reason == "abort"
            self.unfinished.remove(request_id)

    @precondition(lambda self: not self.in_flight)
    @rule()
    def finish_everything(self) -> None:
        self.bench.run()
        for request_id in self.unfinished:
            self.bench.verify(request_id)
        self.unfinished = []

    @invariant()
    def sound(self) -> None:
        check_scheduler(self.bench.scheduler)
        pool, memory = self.bench.pool, self.bench.model.memory
        ids_of: dict[int, list[int]] = {ROOT: []}

        def history(block: int) -> list[int]:
            if block not in ids_of:
                entry = pool._entries[block]
                assert entry is not None
                ids_of[block] = history(entry.parent) + list(entry.ids)
            return ids_of[block]

        for block, entry in enumerate(pool._entries):
            if entry is not None:
                ids = history(block)
                start = len(ids) - len(entry.ids)
                held = [memory[block][offset] for offset in range(len(entry.ids))]
                digest, wanted = 0, []
                for position, token_id in enumerate(ids):
                    digest = extend(digest, token_id)
                    wanted.append((token_id, position, digest))
                assert held == wanted[start:], "the index promises what the block does not hold"


class CollidingSchedulerMachine(SchedulerMachine):
    block_hash = staticmethod(two_bit_hash)


class UncachedSchedulerMachine(SchedulerMachine):
    enable_prefix_caching = False


class DraftingSchedulerMachine(SchedulerMachine):
    drafts = st.sampled_from([0.0, 0.5, 0.9, 1.0, "looked up"])


class DraftingUncachedSchedulerMachine(DraftingSchedulerMachine):
    enable_prefix_caching = False


_SETTINGS = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None, database=None)
TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = _SETTINGS
TestCollidingSchedulerMachine = CollidingSchedulerMachine.TestCase
TestCollidingSchedulerMachine.settings = settings(_SETTINGS, max_examples=50)
TestUncachedSchedulerMachine = UncachedSchedulerMachine.TestCase
TestUncachedSchedulerMachine.settings = settings(_SETTINGS, max_examples=30)
TestDraftingSchedulerMachine = DraftingSchedulerMachine.TestCase
TestDraftingSchedulerMachine.settings = _SETTINGS
TestDraftingUncachedSchedulerMachine = DraftingUncachedSchedulerMachine.TestCase
TestDraftingUncachedSchedulerMachine.settings = settings(_SETTINGS, max_examples=50)
