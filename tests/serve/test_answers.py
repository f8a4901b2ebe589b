"""Through every dialect the answer is the library's, bit by bit, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_infer import LLM, Completion, FimOptions, FimPrompt, SamplingParams
from tests.serve.running import PATH, PREFIX, SUFFIX, Running

HOLE = FimPrompt(PREFIX, SUFFIX, PATH)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def served(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Running]:
    """At both sizes the answers are those of one rank: `expected` below is made by `tiny_llm`."""
    size = request.param
    with (
        LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20, tensor_parallel_size=size) as llm,
        Running(llm) as server,
    ):
        yield server


def library(llm: LLM, ending: str, max_new_tokens: int = 24, **sampling: Any) -> Completion:
    return llm.complete(HOLE, SamplingParams(max_new_tokens=max_new_tokens, ending=ending, **sampling))


def typing(llm: LLM, prompt: FimPrompt, sampling: SamplingParams) -> Completion:
    """As `/infill` and Tabby lay prompts out."""
    return llm.complete(prompt, sampling, replace(llm.fim.interactive, token_healing=True))


def events(answer: Any) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]


@pytest.mark.parametrize("ending", ["raw", "auto"])
def test_openai(served: Running, tiny_llm: LLM, ending: str) -> None:
    expected = library(tiny_llm, ending, logprobs=3)
    body = {"prompt": PREFIX, "suffix": SUFFIX, "path": PATH, "max_tokens": 24, "ending": ending, "logprobs": 3}
    answer = served.post("/v1/completions", **body)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert expected.logprobs is not None
    shown = choice["logprobs"]["token_logprobs"]
    assert shown == [row.logprob for row in expected.logprobs][: len(shown)]
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    assert answer["megatron_infer"]["trimmed_by"] == [expected.trimmed_by]

    streamed = events(served.client.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected.text
    assert streamed[-1]["choices"][0] == {**choice, "text": streamed[-1]["choices"][0]["text"]}


def test_the_other_dialects(served: Running, tiny_llm: LLM) -> None:
    raw = library(tiny_llm, "raw")
    cut = typing(tiny_llm, HOLE, SamplingParams(max_new_tokens=24, ending="auto"))
    ours = {"path": PATH, "max_tokens": 24}
    answer = served.post("/v1/fim/completions", prompt=PREFIX, suffix=SUFFIX, **ours)
    assert answer["choices"][0]["message"]["content"] == raw.text
    assert answer["usage"]["completion_tokens"] == len(raw.token_ids)
    streamed = events(
        served.client.post("/v1/fim/completions", json={"prompt": PREFIX, "suffix": SUFFIX, "stream": True, **ours})
    )
    assert "".join(event["choices"][0]["delta"]["content"] for event in streamed) == raw.text
    assert streamed[-1]["usage"]["completion_tokens"] == len(raw.token_ids)

    ollama = {"prompt": PREFIX, "suffix": SUFFIX, "path": PATH, "options": {"num_predict": 24}}
    answer = served.post("/api/generate", stream=False, **ollama)
    assert (answer["response"], answer["eval_count"]) == (raw.text, len(raw.token_ids))
    lines = served.client.post("/api/generate", json=ollama).text.splitlines()
    assert "".join(json.loads(line)["response"] for line in lines) == raw.text

    infill = {"input_prefix": PREFIX[:15], "prompt": PREFIX[15:], "input_suffix": SUFFIX, "path": PATH, "n_predict": 24}
    answer = served.post("/infill", return_tokens=True, return_raw_text=True, **infill)
    assert (answer["content"], tuple(answer["tokens"]), answer["raw_text"]) == (cut.text, cut.token_ids, cut.raw_text)
    streamed = events(served.client.post("/infill", json={**infill, "stream": True}))
    assert "".join(event["content"] for event in streamed) == cut.text
    assert [event["stop"] for event in streamed] == [False] * (len(streamed) - 1) + [True]

    expected = typing(tiny_llm, HOLE, SamplingParams(max_new_tokens=16, ending="auto"))
    segments = {"prefix": PREFIX, "suffix": SUFFIX, "filepath": PATH}
    assert served.post("/v1/completions", language="python", segments=segments)["choices"][0]["text"] == expected.text


def test_a_request_may_choose_its_own_layout(running: Running) -> None:
    body = {"input_prefix": "def area(width, hei", "input_suffix": SUFFIX, "n_predict": 8, "ending": "raw"}
    sampling = SamplingParams(max_new_tokens=8)
    prompt = FimPrompt(body["input_prefix"], SUFFIX)  # type: ignore[arg-type]
    for order in ("psm", "spm"):
        for healing in (False, True):
            answer = running.post("/infill", order=order, token_healing=healing, **body)
            expected = running.llm.complete(prompt, sampling, FimOptions(order=order, token_healing=healing))
            assert answer["content"] == expected.text


def test_crlf_goes_out_as_it_came_in(running: Running) -> None:
    plain = {"prefix": "a = [\n    1,\n", "suffix": "\n]\n", "filepath": "a.py"}
    dos = {name: text.replace("\n", "\r\n") for name, text in plain.items()}
    texts = [
        running.post("/v1/completions", segments=segments, ending="raw")["choices"][0]["text"]
        for segments in (plain, dos)
    ]
    assert texts[1] == texts[0].replace("\n", "\r\n")


def test_several_prompts_and_several_choices(running: Running) -> None:
    prompts = ["x = ", "def f(", "import "]
    sampling = SamplingParams(max_new_tokens=8, n=2, temperature=0.9, seed=5)
    expected = [done.text for prompt in prompts for done in running.llm.complete_n(FimPrompt(prompt), sampling)]
    body = {"prompt": prompts, "max_tokens": 8, "n": 2, "temperature": 0.9, "seed": 5}
    answer = running.post("/v1/completions", **body)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [""] * 6
    for event in events(running.client.post("/v1/completions", json={**body, "stream": True})):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_token_ids_and_echo(running: Running) -> None:
    ids = running.llm.tokenizer.encode(PREFIX)
    expected = running.llm.complete(ids, SamplingParams(max_new_tokens=6)).text
    answer = running.post("/v1/completions", prompt=[ids, ids], max_tokens=6, echo=True)
    echo = running.llm.tokenizer.decode(ids)
    assert [choice["text"] for choice in answer["choices"]] == [echo + expected] * 2
    usage = {"include_usage": True}
    streamed = events(
        running.client.post(
            "/v1/completions",
            json={"prompt": ids, "max_tokens": 6, "echo": True, "stream": True, "stream_options": usage},
        )
    )
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == echo + expected
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"]["total_tokens"] == len(ids) + 6


def test_the_drawn_token_has_the_largest_log_probability_by_equality(running: Running) -> None:
    """lm-eval compares the two floats to tell whether an answer is the greedy one."""
    answer = running.post("/v1/completions", prompt=PREFIX, max_tokens=12, logprobs=1, temperature=0)
    rows = answer["choices"][0]["logprobs"]
    assert len(rows["tokens"]) == answer["usage"]["completion_tokens"]
    for value, top in zip(rows["token_logprobs"], rows["top_logprobs"], strict=True):
        assert value == max(top.values())


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_with_log_probabilities_scores_the_prompt(running: Running, max_tokens: int) -> None:
    ids = running.llm.tokenizer.encode(PREFIX)
    sampling = SamplingParams(max_new_tokens=max_tokens, logprobs=1, prompt_logprobs=1)
    expected = running.llm.complete(ids, sampling)
    body = {"prompt": [ids], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = running.post("/v1/completions", **body)["choices"]
    rows = choice["logprobs"]
    assert choice["text"] == running.llm.tokenizer.decode(ids) + expected.text
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    both = [*expected.prompt_logprobs, *expected.logprobs]
    assert rows["token_logprobs"] == [None if row is None else row.logprob for row in both]
    assert rows["top_logprobs"][0] is None
    assert len(rows["tokens"]) == len(rows["text_offset"]) == len(ids) + max_tokens
    streamed = events(running.client.post("/v1/completions", json={**body, "stream": True}))
    assert streamed[-1]["choices"][0]["logprobs"] == rows


def test_control_tokens_written_out_are_text_unless_asked_for(running: Running) -> None:
    """An editor with templates of its own sends the whole layout as text."""
    llm = running.llm
    layout = llm.fim.encode(FimPrompt(PREFIX, SUFFIX), options=FimOptions(header="none"))
    names = {i: piece for piece, i in llm.tokenizer.control_pieces.items()}
    written = "".join(names[i] if i in names else llm.tokenizer.decode([i]) for i in layout.ids)
    plain = running.post("/v1/completions", prompt=written, max_tokens=8)
    parsed = running.post("/v1/completions", prompt=written, max_tokens=8, parse_special=True)
    assert parsed["choices"][0]["text"] == llm.complete(layout.ids, SamplingParams(max_new_tokens=8)).text
    assert parsed["usage"]["prompt_tokens"] == len(layout.ids)
    assert plain["usage"]["prompt_tokens"] > len(layout.ids)


def test_repository_context_comes_before_the_prompt(running: Running) -> None:
    extra = [{"filename": "far.py", "text": "far = 1\n" * 4000}, {"filename": "near.py", "text": "def near(): ...\n"}]
    infill = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "path": PATH, "n_predict": 8, "ending": "raw"}
    answer = running.post("/infill", input_extra=extra, **infill)
    prompt = FimPrompt("# Path: near.py\n# def near(): ...\n" + PREFIX, SUFFIX, PATH)
    assert answer["content"] == typing(running.llm, prompt, SamplingParams(max_new_tokens=8)).text
    assert answer["megatron_infer"]["dropped_snippets"] == 1
    segments = {
        "prefix": PREFIX, "suffix": SUFFIX, "filepath": PATH,
        "declarations": [{"filepath": "near.py", "body": "def near(): ..."}],
        "relevant_snippets_from_changed_files": [{"filepath": "far.py", "body": "far = 1\n" * 4000, "score": 0.5}],
    }  # fmt: skip
    tabby = running.post("/v1/completions", segments=segments, ending="raw")
    assert tabby["choices"][0]["text"].startswith(answer["content"])
    assert tabby["debug_data"]["dropped_snippets"] == 1


def test_projection_of_llama_cpp_answers(running: Running) -> None:
    body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "n_predict": 4, "n_probs": 2, "ending": "raw"}
    body["token_healing"] = False  # which may bind the first tokens to less likely ones
    answer = running.post("/infill", **body)
    some = running.post("/infill", response_fields=["content", "timings/predicted_n", "nothing/here"], **body)
    assert some == {"content": answer["content"], "timings/predicted_n": 4}
    for row in answer["completion_probabilities"]:
        assert len(row["top_logprobs"]) == 2
        assert row["logprob"] == max(token["logprob"] for token in row["top_logprobs"])


def test_tokens_back_and_forth(running: Running) -> None:
    ids = running.post("/tokenize", content="def f(x):")["tokens"]
    assert ids == running.llm.tokenizer.encode("def f(x):")
    assert running.post("/detokenize", tokens=ids)["content"] == running.llm.tokenizer.decode(ids)
    assert running.post("/tokenize", prompt="x", add_special_tokens=True)["tokens"][0] == running.llm.tokenizer.bos_id
    info = running.client.get("/tokenizer_info").json()
    assert running.post("/tokenize", content=info["eos_token"], parse_special=True)["tokens"] == [
        running.llm.tokenizer.eos_id
    ]


def test_what_clients_ask_about_the_model(running: Running) -> None:
    get = running.client.get
    (model,) = get("/v1/models").json()["data"]
    assert model["max_model_len"] == running.llm.max_model_len
    assert get("/api/tags").json()["models"][0]["name"] == model["id"]
    shown = running.post("/api/show", name=model["id"])
    assert ".Suffix" in shown["template"]
    assert shown["capabilities"] == ["completion", "insert"]
    assert get("/props").json()["default_generation_settings"]["n_ctx"] == running.llm.max_model_len
    assert len(get("/slots").json()) == running.llm.config.max_num_seqs
    assert get("/v1/health").json()["model"] == model["id"]
    assert get("/health").json()["status"] == "ok"
    assert running.client.post("/v1/events", json={"type": "view"}).status_code == 200


def test_penalties_and_biases_are_the_librarys(running: Running) -> None:
    (banned,) = running.llm.tokenizer.encode("\n", dummy_prefix=False)[-1:]
    edits = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    sampling = SamplingParams(max_new_tokens=12, min_new_tokens=12, logit_bias={banned: -100.0}, **edits)  # type: ignore[arg-type]
    expected = running.llm.complete(FimPrompt(PREFIX), sampling).token_ids
    biases: list[Any] = [{str(banned): -100}, [[banned, -100.0]]]
    for bias in biases:
        answer = running.post(
            "/completion", prompt=PREFIX, n_predict=12, min_tokens=12, logit_bias=bias, return_tokens=True, **edits
        )
        assert tuple(answer["tokens"]) == expected
    never = running.post("/completion", prompt=PREFIX, n_predict=12, logit_bias=[[banned, False]], return_tokens=True)
    assert banned not in never["tokens"]
    openai = running.post("/v1/completions", prompt=PREFIX, max_tokens=12, min_tokens=12, logit_bias=biases[0], **edits)
    assert openai["choices"][0]["text"] == running.llm.complete(FimPrompt(PREFIX), sampling).text
