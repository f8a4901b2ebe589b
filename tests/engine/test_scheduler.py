"""The scheduler's promises one by one: finishing, reuse, budget, order, preemption, abort."""

from __future__ import annotations

import itertools

import pytest

from megatron_infer.engine.request import Sampled
from tests.support.fake_model import EOS, VOCAB, Bench, completion, ids_in, lasting_prompt, output_of, prompt_of
from tests.support.invariants import check_scheduler

# ---- the life of a request ----------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_request_and_is_part_of_its_output() -> None:
    prompt = next(p for seed in itertools.count() if EOS in completion(p := prompt_of(5, seed), 9, frozenset({EOS})))
    bench = Bench()
    request = bench.ask(prompt, 20)
    assert request.finish_reason == "stop"
    assert output_of(request)[-1] == EOS
    ignoring = bench.add(prompt, 20, ignore_eos=True)
    bench.run()
    bench.verify(ignoring)
    assert len(output_of(bench.requests[ignoring])) == 20


def test_the_requests_own_stop_tokens_count_even_when_eos_is_ignored() -> None:
    bench = Bench()
    prompt = lasting_prompt(5, 8)
    third = completion(prompt, 8, frozenset())[2]
    request_id = bench.add(prompt, 8, ignore_eos=True, stop_token_ids=(third,))
    bench.run()
    bench.verify(request_id)
    assert output_of(bench.requests[request_id])[-1] == third


def test_the_context_length_ends_a_request() -> None:
    bench = Bench(max_model_len=12)
    request = bench.ask(lasting_prompt(9, 10), 10)
    assert len(request.ids) == 12
    assert request.finish_reason == "length"


def test_logprobs_are_passed_on() -> None:
    bench = Bench()
    bench.add(lasting_prompt(3, 2), 2, logprobs=1)
    for logprob in (-0.5, -0.25):
        plan = bench.schedule()
        assert plan.step.full_logits
        ((sampled,),) = bench.execute(plan)
        likely = Sampled(sampled.token_id, logprob, ((1, logprob),))
        (event,) = bench.commit(plan, [[likely]])
        assert event.sampled is likely


def test_full_logits_are_asked_for_only_when_a_sampled_row_needs_them() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add(prompt_of(12), 2, temperature=1.0)
    first = bench.schedule()
    assert not first.step.full_logits, "the first chunk of a prompt is not sampled"
    bench.commit(first, bench.execute(first))
    second = bench.schedule()
    assert second.step.full_logits


def test_an_error_fails_its_request_alone_and_leaves_nothing_in_the_cache() -> None:
    bench = Bench()
    bad, good = bench.add(prompt_of(11, 1), 6), bench.add(lasting_prompt(11, 6), 6)
    plan = bench.schedule()
    assert ids_in(plan) == [bad, good]
    _, fine = bench.execute(plan)
    event = bench.commit(plan, [[Sampled(0, error="not finite")], fine])[0]
    check_scheduler(bench.scheduler)
    assert (event.request.request_id, event.sampled) == (bad, None)
    assert (event.finish_reason, event.error) == ("error", "not finite")
    bench.run()
    bench.verify(good)
    assert bench.ask(prompt_of(11, 1)).num_cached_tokens == 0
    assert bench.ask(lasting_prompt(11, 6)).num_cached_tokens == 10


def test_an_error_takes_the_earlier_chunks_out_of_the_cache_too() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add(prompt_of(13))
    bench.step()
    plan = bench.schedule()
    assert plan.step.num_samples_S.tolist() == [1]
    bench.execute(plan)
    bench.commit(plan, [[Sampled(0, error="not finite")]])
    check_scheduler(bench.scheduler)
    assert bench.ask(prompt_of(13)).num_cached_tokens == 0


def test_refusals_name_the_remedy() -> None:
    bench = Bench(num_blocks=4, block_size=4, max_model_len=32)
    with pytest.raises(ValueError, match="empty"):
        bench.add([])
    with pytest.raises(ValueError, match="max_model_len"):
        bench.add(prompt_of(32))
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        bench.add(prompt_of(10), 8)
    assert not bench.scheduler.has_work
    fits = bench.add(prompt_of(10), 7)
    with pytest.raises(ValueError, match="in use"):
        bench.scheduler.add(bench.requests[fits])
    bench.run()
    bench.verify(fits)


# ---- prefix cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1, 3, 4, 5, 7, 8, 9, 11, 12, 13])
def test_a_hit_changes_nothing_but_the_work(shared: int) -> None:
    base = lasting_prompt(13, 4)
    prompt = [*base[:shared], *[(t + 1) % (VOCAB - 1) for t in base[shared:16]], 3]
    bench = Bench()
    miss = bench.ask(base)
    assert miss.num_cached_tokens == 0
    before = bench.num_computed_tokens
    hit = bench.ask(prompt)
    assert hit.num_cached_tokens == shared
    assert bench.num_computed_tokens - before == len(hit.ids) - 1 - shared
    assert output_of(hit) == output_of(Bench(enable_prefix_caching=False).ask(prompt))


def test_a_b_a() -> None:
    a, b = prompt_of(14, 1), [*prompt_of(14, 1)[:6], *prompt_of(8, 2)]
    bench = Bench(num_blocks=8)
    first = bench.ask(a, 6)
    bench.ask(b, 6)
    again = bench.ask(a, 6)
    assert output_of(again) == output_of(first)
    assert again.num_cached_tokens == 13


def test_the_next_keystroke_computes_one_token() -> None:
    bench = Bench()
    typed = lasting_prompt(10, 1)
    bench.ask(typed, 1)
    for key in (1, 2, 3, 4, 5, 6):
        typed = [*typed, key]
        assert bench.ask(typed, 1).num_cached_tokens == len(typed) - 1


def test_an_accepted_completion_is_cached_too() -> None:
    bench = Bench()
    request = bench.ask(lasting_prompt(10, 6), 6)
    assert bench.ask([*request.ids, 5]).num_cached_tokens == len(request.ids) - 1


def test_an_aborted_request_leaves_what_it_computed() -> None:
    bench = Bench(max_num_batched_tokens=6)
    prompt = prompt_of(20)
    request_id = bench.add(prompt)
    bench.step()
    event = bench.scheduler.abort(request_id)
    assert event is not None
    assert event.finish_reason == "abort"
    check_scheduler(bench.scheduler)
    assert bench.ask(prompt).num_cached_tokens == 6


def test_a_block_is_not_matched_before_it_is_written() -> None:
    bench = Bench(max_num_batched_tokens=64)
    first = bench.add(prompt_of(12), 2)
    plan = bench.schedule()
    match = bench.pool.match(prompt_of(13))
    assert match.held == []
    bench.commit(plan, bench.execute(plan))
    bench.run()
    bench.verify(first)


def test_samples_of_one_prompt_prefill_it_once() -> None:
    bench = Bench(max_num_batched_tokens=64)
    prompt = lasting_prompt(21, 3)
    ids = [bench.add(prompt, 3) for _ in range(4)]
    first, second = bench.step(), bench.step()
    assert first is not None
    assert second is not None
    assert ids_in(first) == ids[:1]
    assert ids_in(second) == ids
    assert second.step.query_lens_S.tolist() == [1, 1, 1, 1]
    bench.run()
    for request_id in ids:
        bench.verify(request_id)


def test_prompts_that_share_little_are_computed_side_by_side() -> None:
    bench = Bench(max_num_batched_tokens=64)
    ids = [bench.add([*prompt_of(4), *prompt_of(20, seed)]) for seed in (1, 2)]
    plan = bench.step()
    assert plan is not None
    assert ids_in(plan) == ids
    bench.run()
    for request_id in ids:
        bench.verify(request_id)


@pytest.mark.parametrize("enable", [True, False])
def test_identical_prompts_added_together_are_both_right(enable: bool) -> None:
    bench = Bench(enable_prefix_caching=enable, max_num_batched_tokens=6)
    ids = [bench.add(prompt_of(14, 3), 6) for _ in range(2)]
    bench.run()
    bench_of_two = Bench(enable_prefix_caching=enable, max_num_batched_tokens=64)
    for _ in range(2):
        bench_of_two.add(prompt_of(14, 3), 6)
    plan = bench_of_two.step()
    assert plan is not None
    assert len(plan.rows) == (1 if enable else 2), "waiting is for what will be found in the cache"
    for request_id in ids:
        bench.verify(request_id)


def test_collisions_cost_time_only() -> None:
    bench = Bench(num_blocks=16, block_hash=lambda parent, ids: b"always the same ")
    for seed in (1, 2, 1, 3, 1):
        assert bench.ask(prompt_of(13, seed), 6).num_cached_tokens in (0, 4, 12, 7)


# ---- budget, order, preemption ------------------------------------------------------------------------------------


def test_the_token_budget_holds_and_a_long_prefill_does_not_starve_decodes() -> None:
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=4, num_blocks=128, max_model_len=128)
    short = [bench.add(lasting_prompt(2, 12), 12) for _ in range(2)]
    bench.step()
    bench.step()
    long = bench.add(prompt_of(60, 5), 2)
    steps = []
    while not bench.events[long]:
        steps.append(bench.step())
    for plan in steps:
        assert plan is not None
        assert int(plan.step.query_lens_S.sum()) <= 8
    assert len(steps) >= 60 // 8
    alive = [len(bench.events[request_id]) for request_id in short]
    assert min(alive) >= min(12, len(steps)), "decodes advance in every step"
    bench.run()
    for request_id in [*short, long]:
        bench.verify(request_id)


def test_a_budget_below_the_number_of_sequences_still_serves_every_running_one() -> None:
    bench = Bench(max_num_batched_tokens=3, max_num_seqs=8)
    ids = [bench.add(lasting_prompt(3 + i, 6), 6) for i in range(6)]
    while bench.scheduler.has_work:
        plan = bench.step()
        assert plan is not None
        assert len(bench.scheduler._running) <= len(plan.rows)
    for request_id in ids:
        bench.verify(request_id)


def test_first_come_first_served() -> None:
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=16)
    ids = [bench.add(prompt_of(6, seed), 3, ignore_eos=True) for seed in range(6)]
    steps = bench.run()
    order = list(dict.fromkeys(i for plan in steps for i in ids_in(plan)))
    assert order == ids
    assert max(len(plan.rows) for plan in steps) == 2


@pytest.mark.parametrize("enable", [True, False])
def test_preemption_changes_no_answer_and_spares_the_oldest(enable: bool) -> None:
    bench = Bench(num_blocks=7, max_num_batched_tokens=64, enable_prefix_caching=enable)
    ids = [bench.add(prompt_of(4, seed), 20, ignore_eos=True) for seed in range(3)]
    steps = bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert all(ids[0] in ids_in(plan) for plan in steps[:20]), "the oldest is in every step until it ends"
    for request_id in ids:
        bench.verify(request_id)
        assert bench.requests[request_id].num_cached_tokens == 0, "a return from preemption is not a cache hit"


def test_what_was_preempted_comes_back_from_the_cache() -> None:
    bench = Bench(num_blocks=16, max_num_batched_tokens=64)
    ids = [bench.add(prompt_of(12, seed), 24, ignore_eos=True) for seed in range(2)]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    without_reuse = Bench(num_blocks=16, max_num_batched_tokens=64, enable_prefix_caching=False)
    for seed in range(2):
        without_reuse.add(prompt_of(12, seed), 24, ignore_eos=True)
    without_reuse.run()
    assert bench.num_computed_tokens < without_reuse.num_computed_tokens
    for request_id in ids:
        bench.verify(request_id)


def test_a_request_as_large_as_the_pool_gets_through_with_a_tail_to_copy() -> None:
    bench = Bench(num_blocks=4, block_size=4, max_model_len=17)
    prompt = lasting_prompt(13, 4)
    bench.ask(prompt[:11], 1)
    assert bench.ask(prompt, 4).num_cached_tokens in (8, 10, 11)


def test_a_newcomer_leaves_the_running_ones_room_for_their_next_block() -> None:
    bench = Bench(num_blocks=5, block_size=4, max_num_batched_tokens=64)
    first = bench.add(prompt_of(8, 1), 8, ignore_eos=True)
    second = bench.add(prompt_of(12, 2), 4, ignore_eos=True)
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    bench.verify(first)
    bench.verify(second)


# ---- abort --------------------------------------------------------------------------------------------------------


def test_abort_while_waiting_running_and_in_flight() -> None:
    bench = Bench(max_num_seqs=2)
    running, flying, waiting = (bench.add(prompt_of(9, seed), 9, ignore_eos=True) for seed in range(3))
    bench.step()
    assert bench.scheduler.abort(waiting) is not None
    assert bench.scheduler.abort(waiting) is None
    assert bench.scheduler.abort(12345) is None
    check_scheduler(bench.scheduler)
    plan = bench.schedule()
    assert flying in ids_in(plan)
    free = bench.pool.num_free
    event = bench.scheduler.abort(flying)
    assert event is not None
    assert (event.finish_reason, event.sampled) == ("abort", None)
    assert bench.pool.num_free == free, "a step in flight still writes the blocks"
    check_scheduler(bench.scheduler)
    assert bench.scheduler.abort(flying) is None
    events = bench.commit(plan, bench.execute(plan))
    assert [event.request.request_id for event in events] == [running]
    check_scheduler(bench.scheduler)
    assert bench.pool.num_free > free
    bench.run()
    bench.verify(running)


def test_abort_in_flight_of_a_request_that_copies_its_tail() -> None:
    bench = Bench()
    prompt = lasting_prompt(10, 1)
    bench.ask(prompt, 1)
    request_id = bench.add([*prompt, 1, 2, 3])
    plan = bench.schedule()
    assert len(plan.step.copies_C3) == 1
    bench.scheduler.abort(request_id)
    check_scheduler(bench.scheduler)
    bench.commit(plan, bench.execute(plan))
    check_scheduler(bench.scheduler)
    assert bench.pool.num_free == bench.pool.num_blocks
    assert bench.ask([*prompt, 1, 2, 3]).num_cached_tokens == 12


def test_steps_must_be_committed_one_by_one() -> None:
    bench = Bench()
    bench.add(prompt_of(3))
    plan = bench.schedule()
    with pytest.raises(AssertionError, match="not committed"):
        bench.scheduler.schedule()
    with pytest.raises(AssertionError, match=r"\[\] samples for rows that yield \[1\]"):
        bench.scheduler.commit(plan, [])
    bench.commit(plan, bench.execute(plan))


def test_a_step_ahead_computes_the_samples_of_the_step_in_flight() -> None:
    bench = Bench()
    first, second = bench.add(lasting_prompt(3, 4), 4), bench.add(lasting_prompt(5, 2), 2)
    plan = bench.schedule()
    sampled = bench.execute(plan)
    ahead = bench.scheduler.schedule_ahead()
    assert ahead is not None
    assert ids_in(ahead) == [first, second]
    assert ahead.step.token_ids_T.tolist() == [-1, -2]
    assert ahead.step.context_lens_S.tolist() == [4, 6]
    check_scheduler(bench.scheduler)
    ahead_sampled = bench.execute(ahead)
    bench.commit(plan, sampled)
    third = bench.scheduler.schedule_ahead()
    assert third is not None
    assert ids_in(third) == [first], "the other one ends with what is in flight"
    third_sampled = bench.execute(third)
    bench.commit(ahead, ahead_sampled)
    bench.verify(second)
    bench.commit(third, third_sampled)
    bench.run()
    bench.verify(first)


def test_nothing_is_planned_ahead_of_a_chunk_or_of_an_admission() -> None:
    bench = Bench(max_num_batched_tokens=4, max_num_seqs=2)
    bench.add(prompt_of(6), 4)
    chunk = bench.schedule()
    assert bench.scheduler.schedule_ahead() is None, "the prompt goes on"
    bench.commit(chunk, bench.execute(chunk))
    rest = bench.schedule()
    bench.add(prompt_of(2), 4)
    assert bench.scheduler.schedule_ahead() is None, "there is room for the one that waits"
    bench.commit(rest, bench.execute(rest))
    bench.run()


def test_a_request_that_ended_keeps_its_blocks_until_its_step_ahead_is_over() -> None:
    bench = Bench()
    request_id = bench.add(lasting_prompt(3, 8), 8)
    plan = bench.schedule()
    sampled = bench.execute(plan)
    ahead = bench.scheduler.schedule_ahead()
    assert ahead is not None
    late = bench.execute(ahead)
    assert bench.commit(plan, [[Sampled(EOS)]])[0].finish_reason == "stop"
    assert sampled != [[Sampled(EOS)]]
    assert bench.pool.num_free < bench.pool.num_blocks
    assert not bench.scheduler.has_work
    assert bench.commit(ahead, late) == []
    assert bench.pool.num_free == bench.pool.num_blocks
    assert output_of(bench.requests[request_id]) == [EOS]
    check_scheduler(bench.scheduler)


def test_a_prompt_alone_is_computed_in_chunks_beside_others_and_gives_its_blocks_back() -> None:
    bench = Bench(max_num_batched_tokens=9)
    other = bench.add(lasting_prompt(5, 12), 12)
    alone = bench.add(prompt_of(40, 3), 0)
    bench.run()
    bench.verify(other)
    (event,) = bench.events[alone]
    assert (event.sampled, event.finish_reason) == (None, "length")
    assert bench.ask([*bench.requests[alone].ids, 1]).num_cached_tokens == 40


def test_a_prompt_alone_may_fill_the_context_and_the_cache() -> None:
    bench = Bench(num_blocks=16, max_model_len=64)
    alone = bench.add(prompt_of(64, 3), 0)
    bench.run()
    assert bench.requests[alone].finish_reason == "length"
    with pytest.raises(ValueError, match="65 tokens leave no room"):
        bench.add(prompt_of(65, 3), 0)
