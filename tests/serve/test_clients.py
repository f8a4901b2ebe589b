"""Clients from PyPI, as they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_infer import FimPrompt, SamplingParams
from tests.serve.running import PREFIX, SUFFIX, Running
from tests.support.processes import wait_until


@pytest.fixture(scope="module")
def expected(running: Running) -> str:
    return running.llm.complete(FimPrompt(PREFIX, SUFFIX), SamplingParams(max_new_tokens=16)).text


def test_openai(running: Running, expected: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    ask: dict[str, Any] = {"model": "m", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 16, "temperature": 0}
    done = client.completions.create(**ask, logprobs=2)
    assert done.choices[0].text == expected
    assert done.usage.completion_tokens == 16
    assert done.usage.prompt_tokens_details.cached_tokens >= 0
    stream = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == 16
    assert client.models.list().data[0].id == running.service.model_name
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(**ask, best_of=4)


def test_openai_cancels(running: Running) -> None:
    openai = pytest.importorskip("openai")

    async def leave_early() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            stream = await client.completions.create(
                model="m", prompt=PREFIX, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave_early())
    wait_until(lambda: running.service.admission.num_in_hand == 0 and not running.llm.session.has_work)


def test_mistral(running: Running, expected: str) -> None:
    client = pytest.importorskip("mistralai.client").Mistral(api_key="none", server_url=running.url)
    ask: dict[str, Any] = {"model": "m", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 16, "temperature": 0}
    assert client.fim.complete(**ask).choices[0].message.content == expected
    pieces = [event.data.choices[0].delta.content for event in client.fim.stream(**ask)]
    assert "".join(pieces) == expected


def test_ollama(running: Running, expected: str) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=running.url)
    ask: dict[str, Any] = {"model": "m", "prompt": PREFIX, "suffix": SUFFIX, "options": {"num_predict": 16}}
    assert client.generate(**ask).response == expected
    assert "".join(piece.response for piece in client.generate(**ask, stream=True)) == expected
    assert client.list().models[0].model == running.service.model_name
    assert "insert" in client.show("m").capabilities
    with pytest.raises(ollama.ResponseError, match="format is not supported"):
        client.generate(**ask, format="json")


def test_lm_eval(running: Running) -> None:
    """With the tokenizer of the server: it asks for ids and sends them. Both kinds of task."""
    pytest.importorskip("lm_eval", reason="lm-eval is a client")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    llm = running.llm
    lm = LocalCompletionsAPI(
        model="m", base_url=f"{running.url}/v1/completions", tokenizer_backend="remote", max_retries=1
    )
    ids = llm.tokenizer.encode(PREFIX)
    expected = llm.complete(ids, SamplingParams(max_new_tokens=8)).text
    request = Instance("generate_until", {}, (PREFIX, {"until": ["never"], "max_gen_toks": 8}), 0)
    assert lm.generate_until([request], disable_tqdm=True) == [expected]

    request = Instance("loglikelihood", {}, ("def area(w, h):\n    return", " w * h"), 0)
    ((value, is_greedy),) = lm.loglikelihood([request], disable_tqdm=True)
    context, whole = (llm.tokenizer.encode(text) for text in ("def area(w, h):\n    return", PREFIX + "w * h"))
    scores = llm.complete(whole, SamplingParams(max_new_tokens=1, prompt_logprobs=1)).prompt_logprobs
    assert scores is not None
    rows = [row for row in scores[len(context) :] if row is not None]
    assert value == sum(row.logprob for row in rows)
    assert is_greedy == all(row.logprob == row.top[0][1] for row in rows)
