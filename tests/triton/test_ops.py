"""The Triton kernels as one op table: the halves of a layer are its single ops, and it is enough for a whole model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.triton.interpreter import interpreter  # first: what follows imports triton

from megatron_infer.sampling_params import SamplingParams  # isort: skip
from megatron_infer.ops import Ops, triton_ops  # isort: skip
from megatron_infer.ops.dispatch import LAYER_OPS, OP_NAMES, select_ops  # isort: skip
from megatron_infer.ops.fp8 import FP8  # isort: skip
from megatron_infer.tensor_parallel.group import TPGroup  # isort: skip

from tests.support.ops_cases import CPU, Paged, normal, packed, paged_case  # isort: skip
from tests.support.tiny_models import Output, generate, make_engine, make_runner, random_tensors, tiny_config  # isort: skip


def table(deterministic: bool = False) -> Ops:
    return Ops(**triton_ops.table(2, CPU, deterministic=deterministic))


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


def test_the_table_is_whole_and_deterministic_layers_are_made_of_single_ops() -> None:
    fast, exact = (triton_ops.table(2, CPU, deterministic=deterministic) for deterministic in (False, True))
    assert set(fast) == {*OP_NAMES, *LAYER_OPS} and set(exact) == set(OP_NAMES)
    assert fast["linear"] is not exact["linear"] and fast["silu_mul"] is exact["silu_mul"]
    assert exact["paged_attention"].keywords["deterministic"] and not fast["paged_attention"].keywords["deterministic"]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gather_rows_keeps_the_tables_dtype(ids_dtype: torch.dtype) -> None:
    table_VD = normal(40, 33).bfloat16()
    ids_T = torch.tensor([39, 0, 7, 7], dtype=ids_dtype)
    assert torch.equal(triton_ops.gather_rows(table_VD, ids_T), table_VD[ids_T.long()])


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
        self.norm_D, angle_PH = 1 + normal(D, seed=8), normal(64, H // 2, seed=9)
        positions, slots = [], []
        for s, context in enumerate(self.case.context_lens_S.tolist()):
            rows = self.case.rows(s)
            own = torch.arange(context - (rows.stop - rows.start), context)
            positions.append(own.to(torch.int32))
            slots.append(self.case.block_tables_SB[s, own // 16].long() * 16 + own % 16)
        self.places = (angle_PH.cos(), angle_PH.sin(), torch.cat(positions), torch.cat(slots))
        self.residual_TD = self.residual_TD.clone()
        self.caches = (self.case.k_cache.clone(), self.case.v_cache.clone())
        self.tables = (self.case.block_tables_SB, self.case.query_start_S1, self.case.context_lens_S)

    def norm(self, x_TD: Tensor | None) -> Tensor:
        if x_TD is None:
            return self.ops.rms_norm(self.residual_TD, self.norm_D, 1e-5)
        return self.ops.add_rms_norm(x_TD, self.residual_TD, self.norm_D, 1e-5)

    def attention(self, x_TD: Tensor | None, *is_whole: bool) -> Tensor | None:
        """By the layer op where is_whole is given, else by single ops."""
        ops, weights, last = self.ops, self.weights, (self.case.max_query_len, self.case.scale)
        if is_whole:
            assert ops.attention_layer is not None
            return ops.attention_layer(
                x_TD, self.residual_TD, self.norm_D, 1e-5, weights["qkv"], weights["out"], *self.places, *self.caches,
                *self.tables, last[0], N, G, last[1], *is_whole,
            )  # fmt: skip
        q_TNH = ops.rope_store_kv(ops.linear(self.norm(x_TD), weights["qkv"]), *self.places, *self.caches, N, G)
        return ops.linear(ops.paged_attention(q_TNH, *self.caches, *self.tables, *last).flatten(1), weights["out"])

    def feed_forward(self, x_TD: Tensor | None, *is_whole: bool) -> Tensor | None:
        """As attention."""
        ops, weights = self.ops, self.weights
        if is_whole:
            assert ops.feed_forward_layer is not None
            return ops.feed_forward_layer(
                x_TD, self.residual_TD, self.norm_D, 1e-5, weights["gate_up"], weights["down"], *is_whole
            )
        return ops.linear(ops.silu_mul(ops.linear(self.norm(x_TD), weights["gate_up"])), weights["down"])


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 4e-6 * expected.abs().max())


GEMV = ["gemv_kernel", "gemv_kernel"]
TILES = ["tile_kernel", "tile_kernel"]


@pytest.mark.parametrize(
    ("lengths", "has_x", "is_whole", "attention", "feed_forward"),
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
    has_x: bool,
    is_whole: bool,
    attention: list[str],
    feed_forward: list[str],
) -> None:
    """Five launches for a layer of up to 4 tokens on one rank. Plain products of more than 16 tokens are torch's."""
    case = paged_case(lengths, num_heads=N, num_kv_heads=G, head_dim=H)
    residual_TD = normal(case.q_TNH.shape[0], D, seed=20)
    x_TD = normal(*residual_TD.shape, seed=21) if has_x else None
    mine = Halves(table(), case, residual_TD)
    theirs = Halves(select_ops(CPU, num_threads=1, force="reference"), case, residual_TD)
    for name, kernels in (("attention", attention), ("feed_forward", feed_forward)):
        launched.clear()
        y_TD, exact_TD = getattr(mine, name)(x_TD, is_whole), getattr(theirs, name)(x_TD)
        assert len(launched) == len(kernels)
        assert all(part in kernel for part, kernel in zip(kernels, launched, strict=True)), launched
        assert (y_TD is None) == (is_whole and len(residual_TD) <= 16)
        if y_TD is None:
            assert close(mine.residual_TD, theirs.residual_TD + exact_TD)
            theirs.residual_TD += exact_TD
        else:
            assert close(y_TD, exact_TD) and close(mine.residual_TD, theirs.residual_TD)
    for cache, exact in zip(mine.caches, theirs.caches, strict=True):
        assert torch.equal(cache.isnan(), exact.isnan()) and close(cache.nan_to_num(), exact.nan_to_num())


def test_halves_beside_fp8_weights_take_torchs_product_from_five_tokens_on() -> None:
    case = paged_case([(5, 9)], num_heads=N, num_kv_heads=G, head_dim=H)
    layers = [Halves(table(), case, normal(5, D, seed=20), FP8) for _ in range(2)]
    for name in ("attention", "feed_forward"):
        y_TD, single_TD = getattr(layers[0], name)(None, True), getattr(layers[1], name)(None)
        assert torch.equal(y_TD, single_TD) and torch.equal(layers[0].residual_TD, layers[1].residual_TD)


SMALL = tiny_config(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip
"""The interpreter takes ten milliseconds for a program, of which a GEMV has one per output or two."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_whole_model_generates_the_same_tokens(deterministic: bool) -> None:
    config = SMALL
    tensors = random_tensors(config)
    prompts = [[5, 9, 2, 7, 1, 3], [4] * 21]
    sampling = SamplingParams(max_new_tokens=2, logprobs=0)
    outputs = []
    for ops in (table(deterministic), select_ops(CPU, num_threads=1, force="reference")):
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
        ops = table(deterministic)
        runner = make_runner(config, tensors, TPGroup.single(CPU), ops=ops, dtype=torch.bfloat16)
        engine = make_engine(runner, max_num_batched_tokens=chunk)
        if together:
            return generate(engine, prompts, sampling)
        return [generate(engine, [prompt], sampling)[0] for prompt in prompts]

    expected = answers(True, True, 64)
    assert answers(True, False, 64) == expected
    assert answers(True, True, 9) == expected
    assert answers(False, True, 64) != answers(False, False, 64)
