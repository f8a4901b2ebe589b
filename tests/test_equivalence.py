"""Identical answers by construction: the same ids and bitwise the same log probabilities whatever shares the batch,
however the prompt is chunked or cached, at any thread count and tensor-parallel degree. And the control that fails."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoints_convert.export import save_hf, save_sharded, save_upstream_pt
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.request import Draft, Request
from megatron_infer.engine.scheduler import Drafter
from megatron_infer.engine.worker import EngineDeadError
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model_config import ModelConfig
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from tests.support.drafters import Untimed, UntimedLookup, accept_generously, drafter_of
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import (
    CPU,
    Output,
    Tensors,
    generate,
    generate_on_ranks,
    make_engine,
    make_runner,
    random_tensors,
)

GREEDY = SamplingParams(max_new_tokens=24, logprobs=3, ignore_eos=True)
SEEDED = SamplingParams(
    max_new_tokens=24, logprobs=0, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11
)
EDITED = replace(
    GREEDY, repetition_penalty=1.2, presence_penalty=0.6, frequency_penalty=0.4, logit_bias=((5, 1.5), (9, -math.inf)),
    min_new_tokens=4,
)  # fmt: skip
SAMPLINGS = (GREEDY, SEEDED, EDITED)
EVERY = pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded", "edited"])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Lengths around block edges; two share a long head."""
    draw = random.Random(5)
    made = [[draw.randrange(3, 512) for _ in range(length)] for length in (1, 15, 16, 17, 33, 70, 128)]
    return [*made, made[5][:50] + [7] * 9]


def ids_of(outputs: list[Output]) -> list[list[int]]:
    return [[token_id for token_id, _ in output] for output in outputs]


def engine_of(config: ModelConfig, tensors: Tensors, **options: Any) -> Engine:
    runner_options = {k: options.pop(k) for k in ("num_blocks", "num_threads", "block_size") if k in options}
    runner = make_runner(config, tensors, TPGroup.single(CPU), dtype=torch.bfloat16, **runner_options)
    return make_engine(runner, **options)


@pytest.fixture(scope="module")
def alone(config: ModelConfig, tensors: Tensors, prompts: list[list[int]]) -> dict[SamplingParams, list[Output]]:
    """Every prompt by itself: nothing cached, nothing shared, one thread, one rank, prefilled whole."""

    def one(prompt: list[int], sampling: SamplingParams) -> Output:
        return generate(engine_of(config, tensors), [prompt], sampling)[0]

    answers = {sampling: [one(prompt, sampling) for prompt in prompts] for sampling in SAMPLINGS}
    assert ids_of(answers[EDITED]) != ids_of(answers[GREEDY])
    return answers


@EVERY
def test_batch_of_one_equals_batch_of_many(config, tensors, prompts, alone, sampling) -> None:
    assert generate(engine_of(config, tensors), prompts, sampling) == alone[sampling]
    backwards = generate(engine_of(config, tensors, max_num_seqs=3), prompts[::-1], sampling)
    assert backwards[::-1] == alone[sampling]


@EVERY
@pytest.mark.parametrize("budget", [5, 16, 61])
def test_whole_prompt_equals_chunked_prompt(config, tensors, prompts, alone, sampling, budget) -> None:
    assert generate(engine_of(config, tensors, max_num_batched_tokens=budget), prompts, sampling) == alone[sampling]


@EVERY
def test_cold_equals_prefix_hit(config, tensors, prompts, alone, sampling) -> None:
    engine = engine_of(config, tensors)
    for repeat in range(3):
        for prompt, expected in zip(prompts, alone[sampling], strict=True):
            assert generate(engine, [prompt], sampling)[0] == expected, f"repeat {repeat}, {len(prompt)} tokens"
    without = engine_of(config, tensors, enable_prefix_caching=False)
    assert generate(without, prompts, sampling) == alone[sampling]


@EVERY
def test_preempted_equals_undisturbed(config, tensors, prompts, alone, sampling) -> None:
    engine = engine_of(config, tensors, num_blocks=14)
    assert generate(engine, prompts, sampling) == alone[sampling]
    assert engine.scheduler.num_preemptions > 0, "the pool was large enough: this showed nothing"


@EVERY
@pytest.mark.parametrize("share_right", [0.0, 0.7, 1.0])
def test_drafted_equals_undrafted(config, tensors, prompts, alone, sampling, share_right) -> None:
    """In batches and alone, behind chunks, prefix hits and preemptions."""
    drafter = drafter_of(zip(prompts, alone[sampling], strict=True), config.vocab_size, share_right)
    engine = engine_of(config, tensors, drafter=drafter)
    assert generate(engine, prompts, sampling) == alone[sampling]
    assert [generate(engine, [prompt], sampling)[0] for prompt in prompts] == alone[sampling]
    unscored = replace(sampling, logprobs=None)
    assert ids_of(generate(engine, prompts, unscored)) == ids_of(alone[sampling])
    in_chunks = engine_of(config, tensors, max_num_batched_tokens=11, drafter=drafter)
    assert generate(in_chunks, prompts, sampling) == alone[sampling]
    assert (drafter.num_accepted > 100) == (share_right > 0)
    crowded = engine_of(config, tensors, num_blocks=14, drafter=drafter)
    assert generate(crowded, prompts, sampling) == alone[sampling]
    assert crowded.scheduler.num_preemptions > 0, "the pool was large enough: this showed nothing"


@EVERY
@pytest.mark.parametrize("size", [2, 4, 8])
def test_drafts_change_nothing_at_any_tensor_parallel_degree(config, tensors, prompts, alone, sampling, size) -> None:
    drafter = drafter_of(zip(prompts, alone[sampling], strict=True), config.vocab_size, 0.7)
    outputs = generate_on_ranks(size, config, tensors, prompts, sampling, dtype=torch.bfloat16, drafter=drafter)
    assert outputs == alone[sampling]
    looked_up = UntimedLookup()
    twice = generate_on_ranks(
        size, config, tensors, prompts * 2, sampling, dtype=torch.bfloat16, drafter=looked_up, max_num_seqs=len(prompts)
    )
    assert twice == alone[sampling] * 2
    assert looked_up.counts("typed")[1] > 50


@EVERY
def test_looked_up_drafts_change_nothing(config, tensors, prompts, alone, sampling) -> None:
    """From the prompt and recent answers, while typing along, in batches, chunks, and while requests are preempted."""
    drafter = UntimedLookup()
    engine = engine_of(config, tensors, drafter=drafter)
    for _ in range(3):
        assert generate(engine, prompts, sampling) == alone[sampling]
    assert [generate(engine, [prompt], sampling)[0] for prompt in prompts] == alone[sampling]
    samples = replace(sampling, temperature=0.7)
    undrafted = engine_of(config, tensors)
    for seed in range(4):
        assert generate(engine, prompts, samples, seed=seed) == generate(undrafted, prompts, samples, seed=seed)
    typed = [p + ids[:5] for p, ids in zip(prompts, ids_of(alone[sampling]), strict=True)]
    assert generate(engine, typed, sampling) == generate(engine_of(config, tensors), typed, sampling)
    tokens, accepted = drafter.counts("typed")
    assert tokens > accepted > 200, "right drafts and wrong ones"
    for options in ({"max_num_batched_tokens": 11}, {"num_blocks": 14}):
        drafter = UntimedLookup()
        engine = engine_of(config, tensors, drafter=drafter, **options)
        for _ in range(2):
            assert generate(engine, prompts, sampling) == alone[sampling]
        assert drafter.counts("typed")[1] > 20
    assert engine.scheduler.num_preemptions > 0, "the pool was large enough: this showed nothing"


@pytest.mark.parametrize(("ops", "value"), [("native", "nan"), ("native", "inf"), ("reference", "nan")])
def test_a_draft_that_is_not_finite_spoils_nothing(config, prompts, ops, value) -> None:
    """Drafts of a token whose embedding is spoilt: the tokens before it answer as without drafts."""
    spoilt = random_tensors(config, seed=3, dtype=torch.bfloat16)
    spoilt["tok_embeddings.weight"][7] = float(value)
    sampling = replace(GREEDY, max_new_tokens=5)
    clean = [p for p in prompts if 7 not in p][:3]

    def answers(drafter: Drafter | None = None) -> list[Output]:
        table = select_ops(CPU, num_threads=1, force="reference") if ops == "reference" else None
        runner = make_runner(config, spoilt, TPGroup.single(CPU), ops=table, dtype=torch.bfloat16)
        return generate(make_engine(runner, drafter=drafter), clean, sampling)

    class Spoiling(Untimed):
        def propose(self, request: Request) -> Draft:
            return Draft([7, 5, 7])

    expected = answers()
    assert not any(token_id == 7 for output in expected for token_id, _ in output)
    assert answers(Spoiling()) == expected


def test_a_drafter_that_raises_ends_the_engine(config, tensors, prompts) -> None:
    """A step that is half planned has lost track of blocks; its requests would get wrong answers."""

    class Broken(Untimed):
        def propose(self, request: Request) -> Draft:
            raise LookupError("no such draft")

    engine = engine_of(config, tensors, drafter=Broken())
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="LookupError: no such draft"):
            generate(engine, prompts, GREEDY)


def test_negative_control_a_generous_rule_breaks_the_promise(config, tensors, prompts, alone, monkeypatch) -> None:
    """With every draft taken for right: the comparisons above can fail."""
    monkeypatch.setattr(Request, "accept", accept_generously)
    for sampling in SAMPLINGS:
        drafter = drafter_of(zip(prompts, alone[sampling], strict=True), config.vocab_size, 0.9)
        assert generate(engine_of(config, tensors, drafter=drafter), prompts, sampling) != alone[sampling]
        engine = engine_of(config, tensors, drafter=UntimedLookup())
        generate(engine, prompts, SEEDED, seed=8)
        assert generate(engine, prompts, sampling) != alone[sampling]


def test_negative_control_edits_that_do_not_see_drafts_break_the_promise(
    config, tensors, prompts, alone, monkeypatch
) -> None:
    draw = Request.draw
    monkeypatch.setattr(Request, "draw", lambda request, length, draft=(): draw(request, length))
    drafter = drafter_of(zip(prompts, alone[EDITED], strict=True), config.vocab_size, 1.0)
    assert generate(engine_of(config, tensors, drafter=drafter), prompts, EDITED) != alone[EDITED]


@EVERY
@pytest.mark.parametrize("num_threads", [2, 3])
def test_thread_count_changes_nothing(config, tensors, prompts, alone, sampling, num_threads) -> None:
    assert generate(engine_of(config, tensors, num_threads=num_threads), prompts, sampling) == alone[sampling]


@pytest.mark.parametrize("block_size", [8, 32])
def test_block_size_changes_nothing(config, tensors, prompts, alone, block_size) -> None:
    engine = engine_of(config, tensors, block_size=block_size, num_blocks=1024 // block_size)
    assert generate(engine, prompts, GREEDY) == alone[GREEDY]


@EVERY
@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_degree_changes_nothing(config, tensors, prompts, alone, sampling, size) -> None:
    assert generate_on_ranks(size, config, tensors, prompts, sampling, dtype=torch.bfloat16) == alone[sampling]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_keep_the_promise(config, tensors, prompts, quantization) -> None:
    """Activations are rounded row by row, group by group: batch, chunks, cache, threads and ranks change nothing."""

    def engine(num_threads: int = 1, **options: Any) -> Engine:
        runner = make_runner(
            config, tensors, TPGroup.single(CPU),
            dtype=torch.bfloat16, num_threads=num_threads, quantization=quantization,
        )  # fmt: skip
        return make_engine(runner, **options)

    alone = [generate(engine(), [prompt], GREEDY)[0] for prompt in prompts]
    together = engine(num_threads=3)
    assert generate(together, prompts, GREEDY) == alone
    assert generate(together, prompts, GREEDY) == alone, "prefix hits"
    assert generate(engine(max_num_batched_tokens=5), prompts, GREEDY) == alone
    drafter = drafter_of(zip(prompts, alone, strict=True), config.vocab_size, 0.7)
    assert generate(engine(drafter=drafter), prompts, GREEDY) == alone
    assert drafter.num_accepted > 50
    for size in (2, 4, 8):
        outputs = generate_on_ranks(
            size, config, tensors, prompts, GREEDY, dtype=torch.bfloat16, quantization=quantization
        )
        assert outputs == alone, f"tp {size}"


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_norms_of_single_heads_keep_the_promise(config, prompts, quantization) -> None:
    """Computed op by op, each head a row of its own: Qwen3's."""
    config = replace(config, qk_norm=True)
    tensors = random_tensors(config, seed=3, dtype=torch.bfloat16)
    stored: dict[str, Any] = {"dtype": torch.bfloat16, "quantization": quantization}

    def engine(num_threads: int = 1, **options: Any) -> Engine:
        runner = make_runner(config, tensors, TPGroup.single(CPU), num_threads=num_threads, **stored)
        return make_engine(runner, **options)

    alone = [generate(engine(), [prompt], GREEDY)[0] for prompt in prompts]
    together = engine(num_threads=3)
    assert generate(together, prompts, GREEDY) == alone
    assert generate(together, prompts, GREEDY) == alone, "prefix hits"
    assert generate(engine(max_num_batched_tokens=5), prompts, GREEDY) == alone
    for size in (2, 4, 8):
        assert generate_on_ranks(size, config, tensors, prompts, GREEDY, **stored) == alone, f"tp {size}"


@pytest.mark.parametrize("kind", ["sharded-safetensors", "megatron-pt", "megatron-pt-shards", "hf-safetensors", "gguf"])
def test_every_checkpoint_kind_gives_the_same_answers(config, tensors, prompts, alone, tmp_path, kind) -> None:
    """Divided for two ranks on disk where the kind allows it, loaded at 1, 2 and 4."""
    if kind == "sharded-safetensors":
        save_sharded(tensors.read, config, tmp_path / "model", 2)
    elif kind == "hf-safetensors":
        save_hf(tensors.read, config, tmp_path / "model")
    elif kind == "gguf":
        (tmp_path / "model").mkdir()
        write_gguf(tmp_path / "model" / "m.gguf", config, tensors)
    else:
        save_upstream_pt(tensors.read, config, tmp_path / "model", "tiny", 2 if kind == "megatron-pt-shards" else 1)
    with open_checkpoint(tmp_path / "model", "tiny") as checkpoint:
        assert checkpoint.kind == kind
        for size in (1, 2, 4):
            outputs = generate_on_ranks(size, config, checkpoint, prompts[:5], GREEDY, dtype=torch.bfloat16)
            assert outputs == alone[GREEDY][:5], f"tp {size}"


def test_reference_ops_keep_the_same_promise(config, tensors, prompts) -> None:
    """The plain-torch definitions, used where no compiler is: same contract, not the same bits as the kernels."""
    short = SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True)
    ops = select_ops(CPU, num_threads=1, force="reference")
    some = prompts[2:5]

    def engine() -> Engine:
        return make_engine(make_runner(config, tensors, TPGroup.single(CPU), ops=ops, dtype=torch.bfloat16))

    together = generate(engine(), some, short)
    assert together == [generate(engine(), [prompt], short)[0] for prompt in some]


def test_negative_control_a_vendor_matmul_breaks_the_promise(config, tensors, prompts) -> None:
    """With torch's own matmul and softmax the batch changes the bits: the comparisons above can fail."""
    ops = select_ops(CPU, num_threads=1, force="vendor")

    def engine() -> Engine:
        return make_engine(make_runner(config, tensors, TPGroup.single(CPU), ops=ops, dtype=torch.bfloat16))

    together = generate(engine(), prompts, GREEDY)
    separate = [generate(engine(), [prompt], GREEDY)[0] for prompt in prompts]
    assert together != separate
