"""Drafts save steps and change no answer: what holds, what a draft may take, and what is left of a rejected one."""

from __future__ import annotations

import itertools

import pytest

from megatron_infer.engine.request import Draft, Request, Sampled
from tests.support.drafters import RandomDrafter, Untimed, accept_generously, draft_counts
from tests.support.fake_model import (
    EOS,
    VOCAB,
    Bench,
    completion,
    continuation,
    ids_in,
    lasting_prompt,
    output_of,
    prompt_of,
)
from tests.support.invariants import check_scheduler


class Right(Untimed):
    """Eight tokens, all as they will be sampled."""

    def propose(self, request: Request) -> Draft:
        return Draft(continuation(request))


class Wrong(Untimed):
    """Eight tokens, of which the first is not what will be sampled."""

    def propose(self, request: Request) -> Draft:
        first, *rest = continuation(request)
        return Draft([(first + 1) % VOCAB, *rest])


class HalfRight(Untimed):
    """Eight tokens, of which the fourth is not what will be sampled."""

    def propose(self, request: Request) -> Draft:
        draft = continuation(request)
        return Draft([*draft[:3], (draft[3] + 1) % VOCAB, *draft[4:]])


# ---- what holds ---------------------------------------------------------------------------------------------------


def test_a_right_draft_saves_the_steps_of_its_tokens() -> None:
    bench = Bench(drafter=Right())
    request_id = bench.add(lasting_prompt(5, 18), 18)
    plans = bench.run()
    bench.verify(request_id)
    assert [plan.step.query_lens_S.tolist() for plan in plans] == [[5 + 8], [1 + 8]]
    assert [plan.step.num_samples_S.tolist() for plan in plans] == [[9], [9]]
    request = bench.requests[request_id]
    assert draft_counts(request) == (16, 16)


def test_a_draft_holds_up_to_its_first_wrong_token_which_is_replaced() -> None:
    bench = Bench(drafter=HalfRight())
    request_id = bench.add(lasting_prompt(5, 12), 12)
    bench.step()
    request = bench.requests[request_id]
    assert output_of(request) == completion(request.ids[:5], 4, frozenset())
    assert draft_counts(request) == (8, 3)
    assert request.num_computed == len(request.ids) - 1
    assert len(bench.run()) == 2
    bench.verify(request_id)


def test_every_token_is_drawn_at_its_own_position() -> None:
    bench = Bench(drafter=HalfRight())
    request_id = bench.add(lasting_prompt(5, 12), 12, temperature=0.5)
    plans = bench.run()
    bench.verify(request_id)
    positions = [[draw.position for draw in plan.draws] for plan in plans]
    assert positions == [list(range(9)), list(range(4, 12)), list(range(8, 12))]


def test_a_stop_token_in_a_right_draft_ends_the_request() -> None:
    prompt = next(p for seed in itertools.count() if completion(p := prompt_of(9, seed), 6, frozenset())[2] == EOS)
    assert completion(prompt, 6, frozenset())[:2].count(EOS) == 0
    bench = Bench(drafter=Right())
    request_id = bench.add(prompt, 20)
    assert len(bench.run()) == 1
    bench.verify(request_id)
    request = bench.requests[request_id]
    assert (len(output_of(request)), draft_counts(request)[1]) == (3, 2)
    typed = [*request.ids, *completion(request.ids, 6, frozenset())]
    plain = Bench()
    plain.ask(prompt, 20)
    for other in (bench, plain):
        assert other.ask(typed, 1).num_cached_tokens == len(request.ids) - 1, "nothing of what lies behind the end"


def test_aborted_with_a_draft_in_flight() -> None:
    bench = Bench(drafter=Right())
    request_id = bench.add(lasting_prompt(7, 12), 12)
    plan = bench.schedule()
    bench.scheduler.abort(request_id)
    check_scheduler(bench.scheduler)
    assert bench.commit(plan, bench.execute(plan)) == []
    check_scheduler(bench.scheduler)
    assert bench.pool.num_free == bench.pool.num_blocks
    assert bench.ask([*bench.requests[request_id].ids, 5]).num_cached_tokens == 7


def test_nothing_is_planned_ahead_of_what_a_drafter_has_not_seen() -> None:
    bench = Bench(drafter=Right())
    bench.add(lasting_prompt(7, 12), 12)
    plan = bench.schedule()
    assert bench.scheduler.schedule_ahead() is None
    bench.commit(plan, bench.execute(plan))


# ---- rows that are not finite -------------------------------------------------------------------------------------


def test_what_is_not_finite_behind_the_first_wrong_token_was_never_computed() -> None:
    bench = Bench(drafter=HalfRight())
    request_id = bench.add(lasting_prompt(5, 12), 12)
    plan = bench.schedule()
    (samples,) = bench.execute(plan)
    bench.commit(plan, [[*samples[:4], *[Sampled(0, error="not finite")] * 5]])
    assert bench.requests[request_id].takes_drafts
    bench.run()
    bench.verify(request_id)


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("is_to_blame", [False, True])
def test_an_error_is_believed_once_it_comes_without_a_draft(failing: int, is_to_blame: bool) -> None:
    bench = Bench(drafter=HalfRight())
    request_id, other = (bench.add(prompt_of(6 + i, i), 12, ignore_eos=True) for i in range(2))
    request = bench.requests[request_id]
    plan = bench.schedule()
    samples, others = bench.execute(plan)
    events = bench.commit(plan, [[*samples[:failing], *[Sampled(0, error="not finite")] * (9 - failing)], others])
    check_scheduler(bench.scheduler)
    assert [event.error for event in events] == [None] * len(events)
    assert len(output_of(request)) == failing
    plan = bench.schedule()
    assert plan.step.query_lens_S.tolist() == [6 if failing == 0 else 1, 8], "all that the draft may have spoilt"
    samples, others = bench.execute(plan)
    if is_to_blame:
        bench.commit(plan, [samples, others])
        bench.run()
        bench.verify(request_id)
    else:
        (event, *_) = bench.commit(plan, [[Sampled(0, error="not finite")], others])
        assert (event.request, event.finish_reason, event.error) == (request, "error", "not finite")
        bench.run()
        assert bench.ask(request.ids[:6]).num_cached_tokens == 0
    bench.verify(other)


# ---- what a draft may take ----------------------------------------------------------------------------------------


def test_a_draft_gets_the_tokens_that_nobody_else_wants() -> None:
    bench = Bench(drafter=Right(), max_num_batched_tokens=12, max_num_seqs=4)
    first = bench.add(lasting_prompt(3, 40), 40)
    bench.step()
    second = bench.add(lasting_prompt(20, 4), 4)
    plan = bench.schedule()
    assert plan.step.query_lens_S.tolist() == [1, 11], "the prompt takes all that is left"
    bench.commit(plan, bench.execute(plan))
    plan = bench.schedule()
    assert plan.step.query_lens_S.tolist() == [1 + 2, 9], "first come, first served"
    bench.commit(plan, bench.execute(plan))
    bench.run()
    bench.verify(first)
    bench.verify(second)


def test_a_draft_ends_one_token_before_the_longest_completion() -> None:
    bench = Bench(drafter=Right(), max_model_len=16)
    by_context = bench.add(prompt_of(10, 1), 40, ignore_eos=True)
    by_max_new_tokens = bench.add(prompt_of(5, 2), 3, ignore_eos=True)
    plan = bench.schedule()
    assert [len(row.draft) for row in plan.rows] == [5, 2]
    bench.commit(plan, bench.execute(plan))
    assert not bench.scheduler.has_work
    for request_id in (by_context, by_max_new_tokens):
        bench.verify(request_id)
        assert bench.events[request_id][-1].finish_reason == "length"


def test_a_draft_gets_the_blocks_that_nobody_needs_for_the_next_token() -> None:
    bench = Bench(drafter=Right(), num_blocks=6, max_num_batched_tokens=64)
    ids = [bench.add(prompt_of(7 - i, i), 9, ignore_eos=True) for i in range(2)]
    plan = bench.schedule()  # two blocks each, and one stays free for each
    assert [len(row.draft) for row in plan.rows] == [1, 2]
    assert bench.pool.num_free == 2
    bench.commit(plan, bench.execute(plan))
    bench.run()
    for request_id in ids:
        bench.verify(request_id)


def test_a_rejected_draft_gives_its_blocks_back() -> None:
    bench = Bench(drafter=Wrong())
    request_id = bench.add(lasting_prompt(3, 12), 12)
    plan = bench.schedule()
    assert bench.pool.num_free == 64 - 3, "3 + 8 tokens"
    bench.commit(plan, bench.execute(plan))
    assert bench.pool.num_free == 64 - 1, "4 tokens"
    check_scheduler(bench.scheduler)
    bench.run()
    bench.verify(request_id)


@pytest.mark.parametrize("num_blocks", [7, 9, 16])
def test_wrong_drafts_change_nothing_but_the_work(num_blocks: int) -> None:
    """Who is in a step, with how many tokens, and who is preempted: all as without drafts."""
    taken = []
    for drafter in (None, Wrong()):
        bench = Bench(num_blocks=num_blocks, max_num_batched_tokens=24, enable_prefix_caching=False, drafter=drafter)
        ids = [bench.add(prompt_of(4 + seed, seed), 14, ignore_eos=True) for seed in range(4)]
        plans = bench.run()
        for request_id in ids:
            bench.verify(request_id)
        taken.append(
            [[(i, list(row.token_ids)) for i, row in zip(ids_in(plan), plan.rows, strict=True)] for plan in plans]
        )
        assert bench.scheduler.num_preemptions > 0 or num_blocks == 16
        assert any(row.draft for plan in plans for row in plan.rows) == (drafter is not None)
    assert taken[0] == taken[1]


@pytest.mark.parametrize("share_right", [0.0, 0.5, 0.9, 1.0])
def test_answers_are_those_without_drafts_while_requests_are_preempted(share_right: float) -> None:
    bench = Bench(num_blocks=9, max_num_batched_tokens=24, drafter=RandomDrafter(continuation, VOCAB, share_right))
    ids = [bench.add(prompt_of(4 + seed, seed), 20, ignore_eos=seed % 2 == 0) for seed in range(6)]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for request_id in ids:
        bench.verify(request_id)
    accepted = sum(draft_counts(request)[1] for request in bench.requests.values())
    assert (accepted > 10) == (share_right > 0)


def test_negative_control_a_generous_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of a draft taken for right, the comparison with the answer computed alone fails."""
    bench = Bench(drafter=HalfRight())
    monkeypatch.setattr(Request, "accept", accept_generously)
    request_id = bench.add(prompt_of(5), 9, ignore_eos=True)
    bench.run()
    with pytest.raises(AssertionError):
        bench.verify(request_id)
