"""An ending through a whole session: the text that rules leave, whole and streamed, and a request that ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.completion import GrowingCompletion
from megatron_infer.ending.ending import find_end
from megatron_infer.engine.request import Event, Request, Sampled
from sess_megatron import TestInference

OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20}
DEMO = Path(__file__).resolve().parents[2] / "demo"
PROMPTS = [
    FimPrompt("def area(w, h):\n    return ", "\n\n\ndef volume(w, h, d):\n    return w * h * d\n", "shapes.py"),
    FimPrompt(
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, x):\n", "\n", "s.py"
    ),
    FimPrompt("import os\n\ndef read(path):\n    with open(path", ") as file:\n        return file.read()\n", "r.py"),
    FimPrompt("for i in range(10):\n    if i % 2:\n        ", "\n    print(i)\n"),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, max_model_len=1024, **OPTIONS) as running:
        yield running


@pytest.mark.parametrize("mode", ["line", "block", "auto"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.path or "no path")
def test_a_completion_is_what_the_rules_leave_of_the_raw_one(llm: LLM, prompt: FimPrompt, mode: str) -> None:
    raw = llm.complete(prompt, SamplingParams(max_new_tokens=40))
    assert raw.trimmed_by is None and raw.raw_text is None
    language = "python" if prompt.path else ""
    is_complete = raw.finish_reason == "stop"
    text, reason = find_end(prompt.prefix, prompt.suffix, raw.text, language, mode, is_complete=is_complete)
    sampling = SamplingParams(max_new_tokens=40, ending=mode)
    done = llm.complete(prompt, sampling)
    assert (done.text, done.trimmed_by) == (text, reason)
    assert done.raw_text is not None and raw.text.startswith(done.raw_text)
    assert done.token_ids == raw.token_ids[: len(done.token_ids)]
    stream = llm.stream(prompt, sampling)
    assert "".join(stream) == text
    assert stream.completion is not None
    assert stream.completion.token_ids == done.token_ids and stream.completion.trimmed_by == reason


def test_a_rule_that_ends_the_text_ends_the_request(llm: LLM) -> None:
    prompt = PROMPTS[1]
    raw = llm.complete(prompt, SamplingParams(max_new_tokens=60, ignore_eos=True))
    assert "\n" in raw.text.strip("\n"), "the model runs past the line, or this test shows nothing"
    done = llm.complete(prompt, SamplingParams(max_new_tokens=60, ignore_eos=True, ending="line"))
    assert (done.finish_reason, done.trimmed_by) == ("stop", "line")
    assert len(done.token_ids) < len(raw.token_ids)
    assert not llm.session.has_work


def test_stop_strings_and_endings_go_together(llm: LLM) -> None:
    raw = llm.complete(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True, ending="line"))
    stop = raw.text[len(raw.text) // 2 :][:2]
    done = llm.complete(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True, ending="line", stop=(stop,)))
    assert (done.finish_reason, done.trimmed_by) == ("stop", None)
    assert done.text == raw.text[: raw.text.index(stop)].rstrip()


def test_prompts_of_token_ids_have_no_hole_to_look_at(llm: LLM) -> None:
    ids = llm.fim.encode(PROMPTS[0]).ids
    raw, done = (llm.complete(ids, SamplingParams(max_new_tokens=30, ending=mode)) for mode in ("raw", "auto"))
    assert (raw.text, raw.token_ids) == (done.text, done.token_ids) and done.raw_text is None


def test_run_infer_is_raw_until_it_is_told_otherwise(tiny_checkpoint: Path) -> None:
    prefix, suffix = PROMPTS[0].prefix, PROMPTS[0].suffix
    with (
        TestInference(tiny_checkpoint, **OPTIONS) as raw,
        TestInference(tiny_checkpoint, ending="line", **OPTIONS) as line,
    ):
        whole = raw.run_infer(prefix, 30, suffix, "shapes.py")
        assert line.run_infer(prefix, 30, suffix, "shapes.py") == find_end(prefix, suffix, whole, "python", "line")[0]
    with pytest.raises(ValueError, match="ending must be one of raw, line, block, auto"):
        SamplingParams(ending="word")


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_what_an_error_or_a_cancellation_leaves_is_no_stop(llm: LLM, reason: str) -> None:
    """Text that was held for a stop string comes out at the end, where a rule may cut it."""
    sampling = SamplingParams(stop=("\n\n",), ending="line")
    request = Request(0, [1], sampling, 100, frozenset())
    growing = GrowingCompletion(request, PROMPTS[0], llm.tokenizer, prompt_index=0, num_dropped_tokens=0, submitted=0.0)
    for token_id in llm.tokenizer.encode("1\n", dummy_prefix=False):
        growing.receive(Event(request, Sampled(token_id)), 0.0)
    growing.receive(Event(request, None, reason, "NaN" if reason == "error" else None), 0.0)
    assert growing.finish_reason == reason
