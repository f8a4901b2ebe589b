"""Session.submit, step and cancel: what a loop that is not the caller's, such as a server's, builds on."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_infer import LLM, FimOptions, FimPrompt, SamplingParams, calls, collective
from megatron_infer.engine.worker import Kind
from megatron_infer.llm import EngineDeadError
from tests.support.invariants import check_scheduler
from tests.support.tiny_tokenizer import CONTROL_PIECES

PROMPT = FimPrompt("def area(width, height):\n    return ", "\n\nprint(area(2, 3))\n", "shapes/area.py")
LONG = FimPrompt("x = [1, 2, 3]\n" * 40, "\n", "a.py")
SAMPLING = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    """Without drafts, so that a step is a token."""
    options = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 64, "num_draft_tokens": 0}
    with LLM(tiny_checkpoint, **options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
    return llm.complete(PROMPT, SAMPLING).text


def free_blocks(llm: LLM) -> int:
    scheduler = llm.session._engine.scheduler
    check_scheduler(scheduler)
    return scheduler.pool.num_free


def finish(llm: LLM) -> None:
    while llm.session.has_work:
        llm.session.step()


def test_a_foreign_loop_gives_the_same_text(llm: LLM, expected: str) -> None:
    told = []
    handle = llm.session.submit(PROMPT, SAMPLING, notify=lambda: told.append(handle.completions[0].take_new_text()))
    finish(llm)
    assert handle.is_finished
    assert "".join(told) == handle.results()[0].text == expected
    assert len(told) == 20, "once per step that brought something"


@pytest.mark.parametrize(
    ("prompt", "num_steps"), [(PROMPT, 0), (LONG, 1), (PROMPT, 6)], ids=["queue", "prefill", "decode"]
)
def test_cancelling_gives_the_blocks_back_and_disturbs_nobody(llm, expected, prompt, num_steps) -> None:
    before = free_blocks(llm)
    bystander = llm.session.submit(PROMPT, SAMPLING)
    doomed = llm.session.submit(prompt, SamplingParams(max_new_tokens=200, ignore_eos=True))
    for _ in range(num_steps):
        llm.session.step()
    llm.session.cancel(doomed)
    assert doomed.is_finished and not bystander.is_finished
    assert doomed.results()[0].finish_reason == "abort"
    finish(llm)
    assert bystander.results()[0].text == expected
    assert free_blocks(llm) == before


def test_a_cancel_during_a_step_comes_before_the_next_step_of_anyone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the thread of that step has not come to it: among busy threads it might never get the lock again."""
    handle = llm.session.submit(PROMPT, SAMPLING)
    with llm.session._lock:
        llm.session.cancel(handle)
        assert not handle.is_finished
    seen = []
    monkeypatch.setattr(llm.session._engine, "step", lambda: seen.append(handle.is_finished) or [])
    llm.session.step()
    assert seen == [True]
    assert not llm.session.has_work


def test_a_stop_string_that_names_a_control_token_ends_the_answer_there(llm: LLM) -> None:
    sampling = SamplingParams(max_new_tokens=200, temperature=100.0, seed=3, ignore_eos=True)
    whole = llm.complete(PROMPT, sampling)
    pieces = {llm.tokenizer.id_of(piece): piece for piece in CONTROL_PIECES}
    at = next(i for i, token_id in enumerate(whole.token_ids) if token_id in pieces)
    piece = pieces[whole.token_ids[at]]
    for name in (piece, piece.removeprefix("▁")):
        cut = llm.complete(PROMPT, replace(sampling, stop=(name,)))
        assert cut.token_ids == whole.token_ids[: at + 1]
        assert cut.finish_reason == "stop"
        assert whole.text.startswith(cut.text) and piece not in cut.text


def test_a_family_s_own_stop_strings_end_the_answer(llm: LLM, expected: str, monkeypatch) -> None:
    encode = llm.fim.encode
    stop = expected[3:5]
    monkeypatch.setattr(llm.fim, "encode", lambda *args, **options: replace(encode(*args, **options), stop=(stop,)))
    cut = llm.complete(PROMPT, replace(SAMPLING, stop=("never written",)))
    assert (cut.text, cut.finish_reason) == (expected[: expected.index(stop)], "stop")


def test_cancelling_twice_or_after_the_end_is_fine(llm: LLM, expected: str) -> None:
    handle = llm.session.submit(PROMPT, SAMPLING)
    finish(llm)
    llm.session.cancel(handle)
    llm.session.cancel(handle)
    assert handle.results()[0].text == expected


def test_a_dropped_handle_is_cancelled(llm: LLM) -> None:
    handle = llm.session.submit(PROMPT, SAMPLING)
    llm.session.step()
    del handle
    assert not llm.session.has_work


def test_cancelling_in_the_middle_of_a_step_takes_effect_after_it(llm: LLM, monkeypatch, expected: str) -> None:
    """As a garbage collection does that drops a handle, in the very thread that steps."""
    told = threading.Event()
    doomed = llm.session.submit(PROMPT, SamplingParams(max_new_tokens=200, ignore_eos=True), notify=told.set)
    bystander = llm.session.submit(PROMPT, SAMPLING)
    engine = llm.session._engine
    plain = engine.step

    def step() -> list:
        llm.session.cancel(doomed)
        assert not doomed.is_finished and not told.is_set()
        return plain()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", step)
        llm.session.step()
    assert doomed.is_finished and told.is_set()
    finish(llm)
    assert bystander.results()[0].text == expected


def test_whoever_waits_for_a_cancelled_prompt_is_told(llm: LLM) -> None:
    told = threading.Event()
    handle = llm.session.submit(PROMPT, SAMPLING, notify=told.set)
    llm.session.cancel(handle)
    assert told.is_set() and handle.results()[0].text == ""


def test_a_loop_that_never_rests_lets_others_in(llm: LLM, expected: str) -> None:
    """Whoever comes while a step runs is next, however fast the loop asks for the lock again."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            llm.session.step()

    stepping = threading.Thread(target=loop)
    stepping.start()
    try:
        for _ in range(5):
            done = threading.Event()
            handle = llm.session.submit(PROMPT, SAMPLING, notify=done.set)
            while not handle.is_finished:
                assert done.wait(60)
                done.clear()
            assert handle.results()[0].text == expected
    finally:
        is_over.set()
        stepping.join()


@pytest.mark.parametrize("place", ["add", "step"])
def test_ctrl_c_anywhere_leaves_no_ghost(llm: LLM, monkeypatch, expected: str, place: str) -> None:
    engine = llm.session._engine
    plain = getattr(engine, place)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, place, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.complete_n(PROMPT, SamplingParams(max_new_tokens=50, n=3, temperature=1.0, seed=1))
    assert caught.value.__traceback__ is not None, "its frames are alive, as those of a notebook's last error are"
    assert not llm.session.has_work
    assert llm.complete(PROMPT, SAMPLING).text == expected


def test_options_belong_to_a_call(llm: LLM) -> None:
    sampling = SamplingParams(max_new_tokens=1)
    ids = {
        name: llm.complete(PROMPT, sampling, options).prompt_token_ids
        for name, options in {
            "default": None,
            "psm": FimOptions(order="psm"),
            "bare": FimOptions(header="none"),
            "short": FimOptions(prefix_tokens=3, suffix_tokens=2),
        }.items()
    }
    assert len(set(ids.values())) == 4
    for name, options in {"default": None, "psm": FimOptions(order="psm")}.items():
        assert list(ids[name]) == llm.fim.encode(PROMPT, options=options).ids
    streamed = llm.stream(PROMPT, sampling, FimOptions(order="psm"))
    list(streamed)
    (batched,) = llm.complete_batch([PROMPT], sampling, FimOptions(order="psm"))
    assert streamed.completion is not None
    assert streamed.completion.prompt_token_ids == batched.prompt_token_ids == ids["psm"]


def test_ctrl_c_in_the_step_that_ends_a_prompt_still_tells_who_waits(llm: LLM, monkeypatch) -> None:
    told = threading.Event()
    handle = llm.session.submit(PROMPT, SamplingParams(max_new_tokens=1), notify=told.set)
    plain = llm.session._engine.step

    def interrupted() -> list:
        signal.raise_signal(signal.SIGINT)
        return plain()

    with monkeypatch.context() as patch:
        patch.setattr(llm.session._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.session.step()
    assert handle.is_finished and told.is_set()


def test_a_notify_that_fails_costs_nobody_else_anything(llm: LLM, expected: str, caplog) -> None:
    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    told = threading.Event()
    doomed = llm.session.submit(PROMPT, SAMPLING, notify=fail)
    bystander = llm.session.submit(PROMPT, SAMPLING, notify=told.set)
    finish(llm)
    assert told.is_set() and bystander.results()[0].text == doomed.results()[0].text == expected
    assert "notify" in caplog.text


def test_a_shared_stream_that_is_collected_in_the_middle_of_a_step_ends_the_call_after_it(llm, monkeypatch) -> None:
    """Rank 0 tells the others that the call is over; waiting for its own step to end would be for ever."""
    sent = []
    monkeypatch.setattr(collective, "send_json", lambda group, kind, payload=None: sent.append(kind))
    leader = collective.Leader(llm.session, llm._runner.tp, shares_results=True)
    stream = leader.run(lambda session: calls.stream(session, PROMPT, SAMPLING))
    next(stream)
    plain = llm.session._engine.step

    def collecting() -> list:
        stream.close()
        assert sent[-1] is Kind.RESULT
        return plain()

    with monkeypatch.context() as patch:
        patch.setattr(llm.session._engine, "step", collecting)
        llm.session.step()
    assert sent[-1] is Kind.END
    assert not llm.session.has_work


def test_a_stream_alone_keeps_the_followers_alive(tiny_checkpoint: Path) -> None:
    options = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20}
    stream = LLM(tiny_checkpoint, tensor_parallel_size=2, **options).stream(PROMPT, SAMPLING)
    gc.collect()
    text = "".join(stream)
    assert stream.completion is not None and stream.completion.text == text


def test_closing_waits_for_the_step_of_another_thread(tiny_checkpoint: Path, monkeypatch) -> None:
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20) as short:
        engine, is_closing = short.session._engine, threading.Event()
        plain = engine.step

        def step() -> list:
            closing.start()
            is_closing.wait(10)
            assert engine.alive
            return plain()

        def close() -> None:
            is_closing.set()
            short.close()

        closing = threading.Thread(target=close)
        handle = short.session.submit(PROMPT, SAMPLING)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", step)
            short.session.step()
        closing.join()
        assert not handle.is_finished
        with pytest.raises(EngineDeadError, match="the session is closed"):
            short.session.step()
