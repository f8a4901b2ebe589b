"""The Triton kernels as ops: the halves of a layer are its single ops, and it is enough for a whole model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.triton.interpreter import interpreter  # first: what follows imports triton

from megatron_infer.sampling_params import SamplingParams  # isort: skip
from megatron_infer.ops import Heads, NormWeight, Ops, Rope, SingleOps, Stream  # isort: skip
from megatron_infer.dispatch.select import select_ops  # isort: skip
from megatron_infer.ops.fp8 import FP8  # isort: skip
from megatron_infer.dispatch.triton_ops import DeterministicTritonOps, TritonOps  # isort: skip
from megatron_infer.tensor_parallel.group import TPGroup  # isort: skip

from tests.support.ops_cases import CPU, Paged, normal, packed, paged_case  # isort: skip
from tests.support.tiny_models import Output, generate, make_engine, make_runner, random_tensors, tiny_config  # isort: skip


def triton(deterministic: bool = False) -> Ops:
    return (DeterministicTritonOps if deterministic else TritonOps)(2, CPU)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far."""
    names: list[str] = []
    call = interpreter.GridExecutor.__call__

    def noted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    return names


def test_deterministic_layers_are_made_of_single_ops() -> None:
    for name in ("attention_layer", "feed_forward_layer"):
        assert getattr(DeterministicTritonOps, name) is getattr(Ops, name)
        assert getattr(TritonOps, name) is not getattr(Ops, name)
    assert TritonOps.linear is not DeterministicTritonOps.linear
    assert DeterministicTritonOps.is_deterministic and not TritonOps.is_deterministic


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gather_rows_keeps_the_tables_dtype(ids_dtype: torch.dtype) -> None:
    table_VD = normal(40, 33).bfloat16()
    ids_T = torch.tensor([39, 0, 7, 7], dtype=ids_dtype)
    assert torch.equal(triton().gather_rows(table_VD, ids_T), table_VD[ids_T.long()])


D, F, N, G, H = 24, 20, 4, 2, 16


@dataclass
class Halves:
    """A decoder layer's weights in one table, its cache, and a residual to run it on."""

    ops: Ops
    case: Paged
    residual_TD: Tensor
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        shapes = {"qkv": ((N + 2 * G) * H, D), "out": (D, N * H), "gate_up": (2 * F, D), "down": (D, F)}
        weights = [normal(*shape, seed=seed) / shape[1] ** 0.5 for seed, shape in enumerate(shapes.values())]
        self.weights = {
            name: packed(self.ops, weight, self.dtype) for name, weight in zip(shapes, weights, strict=True)
        }
        self.weights["qkv"].bias = normal((N + 2 * G) * H, seed=7)
        angle_PH = normal(64, H // 2, seed=9)
        self.norm, self.rope = NormWeight(1 + normal(D, seed=8), 1e-5), Rope(angle_PH.cos(), angle_PH.sin())
        self.heads = Heads(N, G, self.case.scale)
        self.stream, self.kv = Stream(self.residual_TD.clone()), self.case.kv.clone()

    def attention(self, ops: Ops, completes_sum: bool) -> None:
        ops.attention_layer(
            self.stream, self.norm, self.weights["qkv"], self.weights["out"], self.rope, self.case.batch, self.kv,
            self.heads, completes_sum,
        )  # fmt: skip

    def feed_forward(self, ops: Ops, completes_sum: bool) -> None:
        ops.feed_forward_layer(self.stream, self.norm, self.weights["gate_up"], self.weights["down"], completes_sum)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 4e-6 * expected.abs().max())


GEMV = ["gemv_kernel", "gemv_kernel"]
TILES = ["tile_kernel", "tile_kernel"]


@pytest.mark.parametrize(
    ("lengths", "has_pending", "completes_sum", "attention", "feed_forward"),
    [
        ([(1, 5)], False, True, ["gemv_rope_kernel", "decode", "gemv_kernel"], GEMV),
        ([(2, 30), (2, 2)], True, True, ["norm", "gemv_rope_kernel", "decode", "gemv_kernel"], ["norm", *GEMV]),
        ([(1, 40)] * 3, True, False, ["norm", "gemv_rope_kernel", "decode", "gemv_kernel"], ["norm", *GEMV]),
        ([(5, 9)], False, True, ["norm", "tile_kernel", "rope", "decode", "tile_kernel"], ["norm", *TILES]),
        ([(17, 21)], True, True, ["norm", "rope", "prefill"], ["norm", "silu"]),
    ],
    ids=str,
)  # fmt: skip
def test_half_a_layer_is_its_ops_in_few_launches(
    launched: list[str],
    lengths: list[tuple[int, int]],
    has_pending: bool,
    completes_sum: bool,
    attention: list[str],
    feed_forward: list[str],
) -> None:
    """Five launches for a layer of up to 4 tokens on one rank. Plain products of more than 16 tokens are torch's."""
    case = paged_case(lengths, num_heads=N, num_kv_heads=G, head_dim=H)
    residual_TD = normal(case.q_TNH.shape[0], D, seed=20)
    pending_TD = normal(*residual_TD.shape, seed=21) if has_pending else None
    mine = Halves(triton(), case, residual_TD)
    theirs = Halves(select_ops(CPU, num_threads=1, force="reference"), case, residual_TD)
    for name, kernels in (("attention", attention), ("feed_forward", feed_forward)):
        mine.stream.pending_TD = theirs.stream.pending_TD = pending_TD
        launched.clear()
        getattr(mine, name)(mine.ops, completes_sum)
        getattr(theirs, name)(theirs.ops, completes_sum)
        assert len(launched) == len(kernels)
        assert all(part in kernel for part, kernel in zip(kernels, launched, strict=True)), launched
        if completes_sum and len(residual_TD) <= 16:
            assert mine.stream.pending_TD is None
        else:
            assert close(mine.stream.pending_TD, theirs.stream.pending_TD)
            assert close(mine.stream.residual_TD, theirs.stream.residual_TD)
        assert close(mine.stream.settle(), theirs.stream.settle())
    for cache, exact in zip(mine.kv, theirs.kv, strict=True):
        assert torch.equal(cache.isnan(), exact.isnan()) and close(cache.nan_to_num(), exact.nan_to_num())


def test_halves_beside_fp8_weights_take_torchs_product_from_five_tokens_on() -> None:
    case = paged_case([(5, 9)], num_heads=N, num_kv_heads=G, head_dim=H)
    fused, single = (Halves(triton(), case, normal(5, D, seed=20), FP8) for _ in range(2))
    for name in ("attention", "feed_forward"):
        getattr(fused, name)(fused.ops, True)
        getattr(single, name)(SingleOps(single.ops), True)
        assert torch.equal(fused.stream.take_pending(), single.stream.take_pending())
        assert torch.equal(fused.stream.residual_TD, single.stream.residual_TD)


SMALL = tiny_config(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip
"""The interpreter takes ten milliseconds for a program, of which a GEMV has one per output or two."""


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_whole_model_generates_the_same_tokens(deterministic: bool, qk_norm: bool) -> None:
    config = replace(SMALL, qk_norm=qk_norm)
    tensors = random_tensors(config)
    prompts = [[5, 9, 2, 7, 1, 3], [4] * 21]
    sampling = SamplingParams(max_new_tokens=2, logprobs=0)
    outputs = []
    for ops in (triton(deterministic), select_ops(CPU, num_threads=1, force="reference")):
        engine = make_engine(make_runner(config, tensors, TPGroup.single(CPU), ops=ops))
        outputs.append(generate(engine, prompts, sampling))
        engine.close()
    for actual, expected in zip(*outputs, strict=True):
        assert [token for token, _ in actual] == [token for token, _ in expected]
        logprobs = torch.tensor([[p for _, p in side] for side in (actual, expected)])
        assert (logprobs[0] - logprobs[1]).abs().max() <= 1e-4


def test_deterministic_bits_depend_on_the_prompt_alone() -> None:
    """Of a whole model: alone or together, in whatever chunks. The other mode is the control."""
    config = SMALL
    tensors = random_tensors(config, dtype=torch.bfloat16)
    prompts = [[5, 9, 2, 7, 1, 3], [(3 * i) % 64 for i in range(20)]]
    sampling = SamplingParams(max_new_tokens=1, logprobs=0, ignore_eos=True)

    def answers(deterministic: bool, together: bool, chunk: int) -> list[Output]:
        ops = triton(deterministic)
        runner = make_runner(config, tensors, TPGroup.single(CPU), ops=ops, dtype=torch.bfloat16)
        engine = make_engine(runner, max_num_batched_tokens=chunk)
        if together:
            return generate(engine, prompts, sampling)
        return [generate(engine, [prompt], sampling)[0] for prompt in prompts]

    expected = answers(True, True, 64)
    assert answers(True, False, 64) == expected
    assert answers(True, True, 9) == expected
    assert answers(False, True, 64) != answers(False, False, 64)
