"""Token healing through whole sessions, on the bundled demo: the answer completes the word in which the prefix ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_infer import LLM, FimOptions, FimPrompt, SamplingParams
from megatron_infer.completion import Completion
from megatron_infer.engine.request import Draft
from tests.support.drafters import Untimed

DEMO = Path(__file__).resolve().parents[2] / "demo"
OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 32 << 20, "max_model_len": 1024}
EXAMPLE = json.loads((DEMO / "example.json").read_text(encoding="utf-8"))
TYPED = ["se", "sel", "self.c", "self.chi", "self.childN"]
"""Of self.childNodes, which the model writes."""
HEALED = FimOptions(token_healing=True)
GREEDY = SamplingParams(max_new_tokens=12, logprobs=2)
SEEDED = SamplingParams(max_new_tokens=12, logprobs=2, temperature=0.8, seed=5, repetition_penalty=1.05)


def prompt_of(typed: str) -> FimPrompt:
    return FimPrompt(EXAMPLE["prefix"] + typed, EXAMPLE["suffix"], EXAMPLE["path"])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, **OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def expected(llm: LLM) -> dict[tuple[str, SamplingParams], Completion]:
    return {(t, s): llm.complete(prompt_of(t), s, HEALED) for t in TYPED for s in (GREEDY, SEEDED)}


def answer(done: Completion) -> tuple[object, ...]:
    return done.text, done.token_ids, done.logprobs, done.finish_reason


@pytest.mark.parametrize(
    ("order", "typed"), [*(("spm", typed) for typed in TYPED), *(("psm", typed) for typed in ("se", "sel", "self."))]
)
def test_the_word_is_completed(llm: LLM, typed: str, order: str) -> None:
    """Suffix first, where the prefix is the last thing, and prefix first, where suffix and middle follow it."""
    done = llm.complete(prompt_of(typed), GREEDY, replace(HEALED, order=order))
    assert (typed + done.text).startswith(EXAMPLE["middle"])
    plain = llm.complete(prompt_of(typed), GREEDY, FimOptions(order=order))
    assert len(done.prompt_token_ids) < len(plain.prompt_token_ids)


def test_negative_control_without_healing_the_word_is_missed(llm: LLM) -> None:
    for order, typed in (("spm", "sel"), ("spm", "self.chi"), ("spm", "self.childN"), ("psm", "se"), ("psm", "self.")):
        done = llm.complete(prompt_of(typed), GREEDY, FimOptions(order=order))
        assert not (typed + done.text).startswith(EXAMPLE["middle"])


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_text_tokens_and_stream_agree(llm: LLM, expected, sampling: SamplingParams) -> None:
    for typed in TYPED:
        done = expected[typed, sampling]
        assert done.logprobs is not None and len(done.logprobs) == len(done.token_ids)
        whole = llm.tokenizer.decode([*done.prompt_token_ids, *done.token_ids])
        assert whole.endswith(EXAMPLE["prefix"][-60:] + typed + done.text)
        stream = llm.stream(prompt_of(typed), sampling, HEALED)
        assert "".join(stream) == done.text
        assert stream.completion is not None and answer(stream.completion) == answer(done)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_neither_batch_cache_drafts_nor_ranks_change_a_bit(llm: LLM, expected, sampling, monkeypatch) -> None:
    wanted = [answer(expected[typed, sampling]) for typed in TYPED]
    prompts = [prompt_of(typed) for typed in TYPED]
    assert [answer(d) for d in llm.complete_batch(prompts, sampling, HEALED)] == wanted
    unscored = replace(sampling, logprobs=None)
    assert [d.token_ids for d in llm.complete_batch(prompts, unscored, HEALED)] == [ids for _, ids, *_ in wanted]

    class HalfRight(Untimed):
        def propose(self, request):
            done = next(d for d in expected.values() if list(d.prompt_token_ids) == request.ids[: request.num_prompt])
            rest = list(done.token_ids[len(request.ids) - request.num_prompt :])
            return Draft([*rest[:2], 5, *rest[3:]])

    scheduler = llm.session._engine.scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_drafter", HalfRight())
        assert [answer(d) for d in llm.complete_batch(prompts, sampling, HEALED)] == wanted
    with LLM(DEMO, tensor_parallel_size=2, **OPTIONS) as pair:
        assert [answer(d) for d in pair.complete_batch(prompts, sampling, HEALED)] == wanted
        assert [d.token_ids for d in pair.complete_batch(prompts, unscored, HEALED)] == [ids for _, ids, *_ in wanted]


def test_endings_and_stop_strings_see_the_text_from_the_cursor_on(llm: LLM) -> None:
    """`chi` is a stop string, and the removed text has it."""
    sampling = SamplingParams(max_new_tokens=12, stop=("chi", "Nodes"))
    done = llm.complete(prompt_of("self.chi"), sampling, HEALED)
    assert (done.text, done.finish_reason) == ("ld", "stop")
    trimmed = llm.complete(prompt_of("self.chi"), SamplingParams(max_new_tokens=30, ending="auto"), HEALED)
    assert trimmed.text.startswith("ldNodes")
    assert trimmed.raw_text is not None and trimmed.raw_text.startswith("ldNodes")


def test_what_healing_does_not_touch(llm: LLM) -> None:
    """Token ids, an empty prefix, and a limit that is over before the cursor is reached."""
    ids = llm.fim.encode(prompt_of("self.chi")).ids
    assert llm.complete(ids, GREEDY, HEALED).prompt_token_ids == tuple(ids)
    empty = FimPrompt("", "\nx = 1\n", "a.py")
    assert answer(llm.complete(empty, GREEDY, HEALED)) == answer(llm.complete(empty, GREEDY))
    short = llm.complete(prompt_of("self.chi"), SamplingParams(max_new_tokens=1), HEALED)
    assert "ldNodes".startswith(short.text) and len(short.token_ids) == 1


def test_what_is_forbidden_does_not_keep_the_prefix_from_coming_back(llm: LLM) -> None:
    done = llm.complete(prompt_of("self.chi"), SamplingParams(max_new_tokens=12, min_new_tokens=8), HEALED)
    assert done.text.startswith("ldNodes") and len(done.token_ids) >= 8
    everything = {i: -100.0 for i in range(llm.tokenizer.vocab_size)}
    assert llm.complete(prompt_of("self.chi"), SamplingParams(12, logit_bias=everything), HEALED).text[:7] == "ldNodes"
