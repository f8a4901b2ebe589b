"""Log probabilities of the prompt: those that decoding would give, bitwise the same however the prompt is computed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_infer import LLM, SamplingParams
from megatron_infer.completion import Completion
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine import runner as runner_module
from megatron_infer.engine.block_table import vacate
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.graphs import graph_keys
from megatron_infer.engine.request import Request, Sampled
from megatron_infer.engine.worker import serve
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.tensor_parallel.group import TPGroup
from tests.engine.test_graphs import FakeRecorder
from tests.support.drafters import drafter_of
from tests.support.tiny_models import (
    CPU,
    Output,
    Tensors,
    drain,
    generate,
    make_engine,
    make_runner,
    on_ranks,
)

PLAIN = SamplingParams(max_new_tokens=24, logprobs=3, ignore_eos=True)
SCORED = replace(PLAIN, prompt_logprobs=3)
SEEDED = replace(SCORED, temperature=0.9, seed=11, logprobs=None, frequency_penalty=0.3)
ALONE = replace(SCORED, max_new_tokens=0)
EVERY = pytest.mark.parametrize("sampling", [SCORED, SEEDED, ALONE], ids=["greedy", "seeded", "prompt alone"])

Answer = tuple[list[Sampled], Output]
"""Of one request: the scores of its prompt, and what was generated."""
_ids = itertools.count()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    made = [[draw.randrange(3, 512) for _ in range(length)] for length in (1, 2, 15, 16, 33, 70, 128)]
    return [*made, made[5][:50] + [7] * 9]


def engine_of(config: ModelConfig, tensors: Tensors, ops: Ops | None = None, **options: Any) -> Engine:
    runner_options = {k: options.pop(k) for k in ("num_blocks", "num_threads") if k in options}
    return make_engine(
        make_runner(config, tensors, TPGroup.single(CPU), ops=ops, dtype=torch.bfloat16, **runner_options), **options
    )


def answers(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> list[Answer]:
    outputs: dict[int, Output] = {}
    requests = [Request(next(_ids), prompt, sampling, 512, frozenset(), seed=7) for prompt in prompts]
    for request in requests:
        engine.add(request)
    drain(engine, outputs)
    assert all(request.finish_reason == "length" for request in requests)
    assert all(request.num_cached_tokens == 0 or len(request.ids) == 1 for request in requests)
    return [(request.prompt_scores, outputs.get(request.request_id, [])) for request in requests]


@pytest.fixture(scope="module")
def alone(config: ModelConfig, tensors: Tensors, prompts: list[list[int]]) -> dict[SamplingParams, list[Answer]]:
    return {s: [answers(engine_of(config, tensors), [p], s)[0] for p in prompts] for s in (SCORED, SEEDED, ALONE)}


def test_they_are_what_decoding_gives(config, tensors, prompts, alone) -> None:
    """The prompt with its answer behind it: each generated token has the log probability it was drawn with."""
    engine = engine_of(config, tensors)
    for prompt, (scores, output) in zip(prompts, alone[SCORED], strict=True):
        assert generate(engine, [prompt], PLAIN)[0] == output, "scoring changes no answer"
        assert [score.token_id for score in scores] == prompt[1:]
        whole = [*prompt, *(token_id for token_id, _ in output)]
        ((later, _),) = answers(engine, [whole], ALONE)
        assert later[: len(scores)] == scores
        assert [(score.token_id, score.logprob) for score in later[len(scores) :]] == output
        assert all(score.top_logprobs is not None and len(score.top_logprobs) == 3 for score in later)


@EVERY
def test_batch_chunks_threads_and_cached_heads_change_nothing(config, tensors, prompts, alone, sampling) -> None:
    engine = engine_of(config, tensors, num_threads=2)
    for _ in range(2):
        assert answers(engine, prompts, sampling) == alone[sampling], "the second time all would be in the cache"
    for budget in (5, 16, 61):
        assert answers(engine_of(config, tensors, max_num_batched_tokens=budget), prompts, sampling) == alone[sampling]


@EVERY
def test_preemption_and_drafts_change_nothing(config, tensors, prompts, alone, sampling) -> None:
    drafter = drafter_of(((p, o) for p, (_, o) in zip(prompts, alone[sampling], strict=True)), config.vocab_size, 0.7)
    crowded = engine_of(config, tensors, num_blocks=14, max_num_batched_tokens=40, drafter=drafter)
    assert answers(crowded, prompts, sampling) == alone[sampling]
    assert sampling is ALONE or crowded.scheduler.num_preemptions > 0
    assert sampling is ALONE or drafter.num_accepted > 10


def test_a_prompt_preempted_between_its_chunks_goes_on_where_it_was(config, tensors, prompts, alone) -> None:
    """The scores that it has are not taken again, and the cache may give it what is scored."""
    engine = engine_of(config, tensors, max_num_batched_tokens=30)
    request = Request(next(_ids), prompts[6], SCORED, 512, frozenset(), seed=7)
    engine.add(request)
    for _ in range(3):
        engine.step()
    assert len(request.prompt_scores) == 90
    scheduler = engine.scheduler
    scheduler._running.remove(request)
    vacate(scheduler.pool, request)
    scheduler._waiting.appendleft(request)
    outputs: dict[int, Output] = {}
    drain(engine, outputs)
    assert (request.prompt_scores, outputs[request.request_id]) == alone[SCORED][6]


@EVERY
@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_degree_changes_nothing(config, tensors, prompts, alone, sampling, size) -> None:
    def work(group: TPGroup) -> list[Answer] | None:
        runner = make_runner(config, tensors, group, dtype=torch.bfloat16)
        if group.rank:
            serve(runner)
            return None
        engine = make_engine(runner)
        result = answers(engine, prompts, sampling)
        engine.close()
        return result

    assert on_ranks(size, work)[0] == alone[sampling]


def test_few_rows_of_logits_are_held_at_once(config, tensors, prompts, alone, monkeypatch) -> None:
    engine, most = engine_of(config, tensors), 0
    plain = engine.runner.model.logits

    def counted(hidden_SD: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(hidden_SD))
        return plain(hidden_SD)

    monkeypatch.setattr(engine.runner.model, "logits", counted)
    assert answers(engine, prompts, SCORED) == alone[SCORED]
    assert most == runner_module._ROWS_AT_ONCE == 128
    most = 0
    monkeypatch.setattr(runner_module, "_ROWS_AT_ONCE", 7)
    assert answers(engine, prompts, SCORED) == alone[SCORED]
    assert most == len(prompts)


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
def test_on_a_device_they_are_those_of_the_host(config, tensors, prompts, alone, recorded) -> None:
    runner = make_runner(config, tensors, TPGroup.single(CPU), dtype=torch.bfloat16, is_asynchronous=True)
    if recorded:
        runner.record_graphs(
            FakeRecorder(), graph_keys(12, has_drafts=True), max_model_len=512, max_num_seqs=12, memory_bytes=10_000
        )
    got = answers(make_engine(runner, max_num_batched_tokens=50), prompts, SCORED)
    for (scores, output), (wanted, wanted_output) in zip(got, alone[SCORED], strict=True):
        assert [token_id for token_id, _ in output] == [token_id for token_id, _ in wanted_output]
        assert [score.token_id for score in scores] == [score.token_id for score in wanted]
        assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in wanted], abs=1e-6)


def test_negative_control_a_vendor_matmul_gives_other_bits(config, tensors, prompts) -> None:
    def engine() -> Engine:
        return engine_of(config, tensors, select_ops(CPU, num_threads=1, force="vendor"))

    together = answers(engine(), prompts, ALONE)
    assert together != [answers(engine(), [prompt], ALONE)[0] for prompt in prompts]


# ---- through a session ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20) as running:
        yield running


def test_a_completion_carries_them(llm: LLM) -> None:
    first, second = llm.complete_n("x = [1, 2, 3]\nprint(", SamplingParams(4, n=2, temperature=1.0, prompt_logprobs=2))
    assert first.prompt_logprobs is not None and first.prompt_logprobs == second.prompt_logprobs
    assert first.prompt_logprobs[0] is None
    assert [pair.token_id for pair in first.prompt_logprobs[1:] if pair] == list(first.prompt_token_ids[1:])
    assert all(pair is None or len(pair.top) == 2 for pair in first.prompt_logprobs)
    assert Completion.from_json(first.to_json()) == first
    assert llm.complete("x", SamplingParams(1)).prompt_logprobs is None
    assert llm.complete([5], SamplingParams(0, prompt_logprobs=0)).prompt_logprobs == (None,)


def test_a_row_that_is_not_finite_fails_the_request_alone(llm: LLM, monkeypatch) -> None:
    model, plain = llm._runner.model, llm._runner.model.logits

    def poisoned(hidden_SD: torch.Tensor) -> torch.Tensor:
        logits_SV = plain(hidden_SD)
        if len(logits_SV) == 12 + 1:
            logits_SV[4, 0] = float("nan")
        return logits_SV

    monkeypatch.setattr(model, "logits", poisoned)
    prompts = [(list(range(50, 62)), SamplingParams(2, prompt_logprobs=0)), (list(range(90, 99)), SamplingParams(2))]
    failed, healthy = llm.complete_batch(prompts)
    assert (failed.finish_reason, healthy.finish_reason) == ("error", "length")
    assert "NaN" in (failed.error or "")
    monkeypatch.undo()
    assert llm.complete(*prompts[0]).finish_reason == "length"


@pytest.mark.parametrize("bad", [-1, 65, 1.5, True])
def test_bad_numbers_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=bad)
