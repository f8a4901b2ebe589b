"""`deadline_ms`: an answer ends in time, in any state, with what is there; by a clock that the tests move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.completion import Completion
from megatron_infer.text.text_stream import WholeLines
from tests.support.invariants import check_scheduler

PROMPT = FimPrompt("def area(width, height):\n    return ", "\n\nprint(area(2, 3))\n", "shapes/area.py")
LONG = FimPrompt("x = [1, 2, 3]\n" * 40, "\n", "a.py")
PLAIN = SamplingParams(max_new_tokens=20, ignore_eos=True)
LIMITED = SamplingParams(max_new_tokens=20, ignore_eos=True, deadline_ms=1000)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    """Without drafts, so that a step is a token."""
    options = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 64, "num_draft_tokens": 0}
    with LLM(tiny_checkpoint, **options) as running:
        yield running


@pytest.fixture
def clock(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(llm.session, "_clock", clock)
    return clock


@pytest.fixture
def num_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step of the engine."""
    plain, steps = llm.session._engine.step, []
    monkeypatch.setattr(llm.session._engine, "step", lambda: steps.append(1) or plain())
    return steps


def finish(llm: LLM) -> None:
    while llm.session.has_work:
        llm.session.step()


def free_blocks(llm: LLM) -> int:
    scheduler = llm.session._engine.scheduler
    check_scheduler(scheduler)
    return scheduler.pool.num_free


@pytest.mark.parametrize(
    ("prompt", "steps", "tokens"), [(PROMPT, 0, 0), (LONG, 2, 0), (PROMPT, 6, 5)], ids=["queue", "prefill", "decode"]
)
def test_a_deadline_ends_a_prompt_in_any_state(llm, clock, num_steps, prompt, steps: int, tokens: int) -> None:
    before, told = free_blocks(llm), []
    handle = llm.session.submit(prompt, LIMITED, notify=lambda: told.append(len(num_steps)))
    for _ in range(steps):
        llm.session.step()
    clock.now += 0.999
    assert not handle.is_finished
    clock.now += 0.002
    llm.session.step()
    (done,) = handle.results()
    assert (done.finish_reason, len(done.token_ids)) == ("deadline", tokens)
    assert (done.text == "") == (tokens == 0)
    assert len(num_steps) == steps and told[-1] == steps, "told without a further step"
    assert not llm.session.has_work and free_blocks(llm) == before


def test_what_the_step_in_progress_brings_is_kept(llm: LLM, clock: Clock, monkeypatch) -> None:
    plain = llm.session._engine.step
    whole = llm.complete(PROMPT, PLAIN)
    handle = llm.session.submit(PROMPT, LIMITED)
    llm.session.step()

    def slow() -> list:
        clock.now += 5.0
        return plain()

    monkeypatch.setattr(llm.session._engine, "step", slow)
    llm.session.step()
    (done,) = handle.results()
    assert (done.finish_reason, done.token_ids) == ("deadline", whole.token_ids[:2])
    assert done.timings.token_seconds == (0.0, 5.0) and done.timings.total_seconds == 5.0
    assert whole.text.startswith(done.text)


def test_an_answer_that_ends_with_the_step_in_progress_is_whole(llm: LLM, clock: Clock, monkeypatch) -> None:
    plain = llm.session._engine.step
    whole = llm.complete(PROMPT, SamplingParams(max_new_tokens=1))

    def slow() -> list:
        clock.now += 5.0
        return plain()

    monkeypatch.setattr(llm.session._engine, "step", slow)
    handle = llm.session.submit(PROMPT, SamplingParams(max_new_tokens=1, deadline_ms=1))
    llm.session.step()
    (done,) = handle.results()
    assert (done.finish_reason, done.text) == (whole.finish_reason, whole.text)


@pytest.mark.parametrize("ending", ["raw", "line", "block"])
@pytest.mark.parametrize("steps", [1, 7, 19])
def test_a_stream_is_the_whole_and_others_are_undisturbed(llm: LLM, clock, ending: str, steps: int) -> None:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True, ending=ending, deadline_ms=1000)
    expected = llm.complete(PROMPT, PLAIN).text
    pieces: list[str] = []
    handle = llm.session.submit(PROMPT, sampling, notify=lambda: pieces.append(handle.completions[0].take_new_text()))
    bystander = llm.session.submit(PROMPT, PLAIN)
    for _ in range(steps):
        llm.session.step()
    clock.now += 1.0
    finish(llm)
    (done,) = handle.results()
    assert "".join(pieces) == done.text
    assert done.finish_reason in ("deadline", "stop") and (ending != "raw" or done.finish_reason == "deadline")
    assert bystander.results()[0].text == expected


def test_without_haste_nothing_changes(llm: LLM, clock: Clock) -> None:
    for mode in ("raw", "line", "block"):
        plain = llm.complete(PROMPT, SamplingParams(max_new_tokens=20, ending=mode))
        limited = llm.complete(PROMPT, SamplingParams(max_new_tokens=20, ending=mode, deadline_ms=1))
        assert (plain.text, plain.token_ids, plain.finish_reason) == (
            limited.text, limited.token_ids, limited.finish_reason,
        )  # fmt: skip


def test_timings_are_those_since_submission(llm: LLM, clock: Clock) -> None:
    """A step takes a tenth of a second; the first token comes after 30 ms more."""
    handle = llm.session.submit(PROMPT, SamplingParams(max_new_tokens=3, ignore_eos=True))
    clock.now += 0.03
    while not handle.is_finished:
        clock.now += 0.1
        llm.session.step()
    (done,) = handle.results()
    timings = done.timings
    assert timings.token_seconds == pytest.approx((0.13, 0.23, 0.33))
    assert (timings.first_token_seconds, timings.total_seconds) == pytest.approx((0.13, 0.33))
    assert 0.13 - 1e-9 <= timings.usable_seconds <= timings.total_seconds
    assert Completion.from_json(done.to_json()) == done


@pytest.mark.parametrize("value", [0, -1, 0.5, True])
def test_a_deadline_is_a_whole_number_of_milliseconds(value: object) -> None:
    with pytest.raises(ValueError, match="deadline_ms must be an integer from 1"):
        SamplingParams(deadline_ms=value)


# ---- what is cut back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", ""),
        ("retur", "retur"),
        ("return x\n", "return x\n"),
        ("return x\n    y", "return x\n"),
        ("return x\r\n  y = 1\r\nz", "return x\r\n  y = 1\r\n"),
        ("\n    retur", "\n    retur"),
        ("\n\n    return x\n    y", "\n\n    return x\n"),
    ],
)
def test_a_limit_cuts_back_to_the_last_line_end_behind_text(text: str, cut: str) -> None:
    for is_complete, expected in ((True, text), (False, cut)):
        lines = WholeLines()
        piece, _ = lines.feed(text)
        rest, reason = lines.finish(is_complete)
        assert (piece + rest, reason) == (expected, None if expected == text else "unfinished")


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(st.text("a \n\r", max_size=4), max_size=8), st.booleans())
def test_the_division_into_pieces_changes_nothing(pieces: list[str], is_complete: bool) -> None:
    results = []
    for division in (pieces, ["".join(pieces)], list("".join(pieces))):
        lines = WholeLines()
        text = "".join(lines.feed(piece)[0] for piece in division)
        rest, reason = lines.finish(is_complete)
        results.append((text + rest, reason))
    assert results[0] == results[1] == results[2]
