"""On a GPU: the engine answers as it does on the CPU, alone or in a batch, in whatever chunks, recorded or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import two_ranks
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.graphs import CudaRecorder, Graphs, graph_keys
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.model.formats import weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from tests.gpu.gpu_cases import CUDA, needs_fp8, needs_gpu
from tests.support.tiny_models import CPU, Output, generate, make_engine, make_runner, random_tensors, tiny_config

pytestmark = needs_gpu

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
LOGPROBS = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=0)
SEEDED = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, seed=11)
MAX_NUM_SEQS = 8
WIDE = tiny_config(hidden_size=512, intermediate_size=1440, head_dim=128, num_attention_heads=4)
"""Heads and tiles of a real model's size."""


@pytest.fixture(scope="module", params=["triton", "vendor"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select_ops(CUDA, num_threads=1, force=request.param)


@pytest.fixture(scope="module")
def deterministic_ops() -> Ops:
    return select_ops(CUDA, num_threads=1, force="triton", deterministic=True)


def gpu_runner(
    ops: Ops, config: ModelConfig, dtype: torch.dtype, quantization: str = "none", *, has_graphs: bool = False
) -> ModelRunner:
    fmt, head_fmt = weight_formats(ops, config, dtype, quantization, CUDA)
    model = Transformer(
        config, tp=TPGroup.single(CUDA), ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype,
        num_positions=config.max_position_embeddings,
    )  # fmt: skip
    for _ in model.load(random_tensors(config)):
        continue
    kv = KVCache(
        config.num_hidden_layers, 256, config.num_key_value_heads, 16, config.head_dim, dtype=dtype, device=CUDA
    )
    runner = ModelRunner(model, kv)
    if has_graphs:
        longest = config.max_position_embeddings
        runner.record_graphs(
            CudaRecorder(CUDA), graph_keys(MAX_NUM_SEQS), max_model_len=longest, max_num_seqs=MAX_NUM_SEQS,
            memory_bytes=64 << 30,  # what else runs on the GPU counts as well
        )  # fmt: skip
        assert runner.graphs is not None and set(runner.graphs.keys) == set(graph_keys(MAX_NUM_SEQS))
    return runner


def answers(runner: ModelRunner, prompts, sampling=GREEDY, *, together: bool = True, chunk: int = 256) -> list[Output]:
    """By an engine that has seen nothing yet: all at once, or one after the other."""
    engine = make_engine(runner, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=chunk)
    if together:
        return generate(engine, prompts, sampling)
    return [generate(engine, [prompt], sampling)[0] for prompt in prompts]


def ids(outputs: list[Output]) -> list[list[int]]:
    return [[token for token, _ in output] for output in outputs]


def prompts_of(config: ModelConfig, count: int = MAX_NUM_SEQS) -> list[list[int]]:
    """From 5 to some hundred tokens, so that attention reads several tiles."""
    return [[(7 * i + 11 * j + i * j) % config.vocab_size for j in range(5 + 45 * i)] for i in range(count)]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_ids_are_those_of_the_cpu(ops: Ops, sampling: SamplingParams) -> None:
    config = tiny_config()
    prompts = prompts_of(config, 4)
    cpu = make_engine(make_runner(config, random_tensors(config), TPGroup.single(CPU)))
    expected = ids(generate(cpu, prompts, sampling))
    runner = gpu_runner(ops, config, torch.float32)
    assert ids(answers(runner, prompts, sampling)) == expected
    assert ids(answers(runner, prompts, sampling, together=False)) == expected


@pytest.mark.parametrize(
    ("quantization", "bound"),
    [("none", 0.05), ("int8", 0.1), ("int4", 1.0), pytest.param("fp8", 0.3, marks=needs_fp8)],
)
def test_bf16_and_rounded_weights_answer_nearly_as_the_cpu_does(ops: Ops, quantization: str, bound: float) -> None:
    sampling = replace(LOGPROBS, max_new_tokens=1)
    prompts = prompts_of(WIDE, 4)
    cpu = make_engine(make_runner(WIDE, random_tensors(WIDE), TPGroup.single(CPU)))
    actual = answers(gpu_runner(ops, WIDE, torch.bfloat16, quantization), prompts, sampling)
    for output, expected in zip(actual, generate(cpu, prompts, sampling), strict=True):
        assert output[0][1] == pytest.approx(expected[0][1], abs=bound)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_graphs_give_the_ids_of_single_launches(sampling: SamplingParams, monkeypatch) -> None:
    ops = select_ops(CUDA, num_threads=1, force="triton")
    assert ops.is_recordable
    replayed = []
    replay = Graphs.replay
    monkeypatch.setattr(Graphs, "replay", lambda *args: replayed.append(args[1]) or replay(*args))
    plain, recorded = (gpu_runner(ops, WIDE, torch.float32, has_graphs=has_graphs) for has_graphs in (False, True))
    prompts = prompts_of(WIDE)
    for together in (True, False):
        expected = ids(answers(plain, prompts, sampling, together=together))
        assert not replayed
        assert ids(answers(recorded, prompts, sampling, together=together)) == expected
        assert {(MAX_NUM_SEQS, 1, 1)} <= set(replayed) if together else {(1, 1, 1)} <= set(replayed)
        replayed.clear()
    # A keystroke: a few tokens behind a prompt that is in the cache.
    typed = [prompts[3], prompts[3] + [5, 6, 7]]
    expected = ids(answers(plain, typed, sampling, together=False))
    replayed.clear()
    assert ids(answers(recorded, typed, sampling, together=False)) == expected
    assert any(q_len > 1 for _, q_len, _ in replayed)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("has_graphs", [False, True])
def test_deterministic_bits_depend_on_the_prompt_alone(deterministic_ops, quantization: str, has_graphs: bool) -> None:
    """Ids and log probabilities, bit for bit: alone or together, in whatever chunks, recorded or not."""
    prompts = prompts_of(WIDE)
    plain = gpu_runner(deterministic_ops, WIDE, torch.bfloat16, quantization)
    expected = answers(plain, prompts, LOGPROBS)
    runner = gpu_runner(deterministic_ops, WIDE, torch.bfloat16, quantization, has_graphs=True) if has_graphs else plain
    for chunk in (16, 40, 100, 256):
        assert answers(runner, prompts, LOGPROBS, chunk=chunk) == expected, f"together, chunks of {chunk}"
        assert answers(runner, prompts, LOGPROBS, together=False, chunk=chunk) == expected, f"alone, chunks of {chunk}"
    assert ids(answers(runner, prompts, GREEDY)) == ids(expected)


def test_two_ranks_on_one_gpu_answer_as_one() -> None:
    compared = two_ranks.compare("cuda")
    assert compared["deterministic"]["ids_agreeing"] == compared["deterministic"]["of"]
    assert compared["deterministic"]["logprobs_equal"]
    assert compared["default"]["of"] == compared["deterministic"]["of"]
