"""On a GPU: every op gives what its definition says, in every weight format and for every class of batches."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from megatron_infer.model.formats import quantize
from megatron_infer.model.rope import rope_tables
from megatron_infer.ops import GROUP, INT4, QUANTIZED, Ops, PackedLinear, reference
from megatron_infer.ops.dispatch import select_ops
from megatron_infer.ops.fp8 import FP8, quantize_rows
from megatron_infer.ops.selfcheck_inputs import CheckShape
from tests.gpu.gpu_cases import CUDA, WEIGHTS, needs_gpu
from tests.support.ops_cases import Paged, attention_float64, bounds_of, normal, paged_case
from tests.support.tiny_models import tiny_config

pytestmark = needs_gpu

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.int8: 1.5e-2, INT4: 2e-2, FP8: 6e-2}
"""Largest error relative to the largest value: bf16 results carry 8 bits, activations beside fp8 weights 4."""
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["triton", "vendor"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select_ops(CUDA, num_threads=1, force=request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    assert actual.shape == expected.shape
    expected = expected.double().cpu()
    return bool((actual.double().cpu() - expected).abs().max() <= bound * expected.abs().max())


def packed_weight(ops: Ops, weight_NK: torch.Tensor, stored: torch.dtype) -> tuple[PackedLinear, torch.Tensor]:
    """The weight as `ops` store it, and in float64 what it then stands for."""
    out_dim, in_dim = weight_NK.shape
    packed = ops.allocate_linear(out_dim, in_dim, bounds_of(in_dim, stored), stored, CUDA)
    if stored in QUANTIZED:
        values_NK, scales_NG = quantize(weight_NK, stored)
        ops.pack_quantized(packed, 0, values_NK.to(CUDA), scales_NG.to(CUDA))
        return packed, values_NK.double() * scales_NG.double().repeat_interleave(GROUP, dim=1)[:, :in_dim]
    ops.pack_rows(packed, 0, weight_NK.to(CUDA))
    if stored == FP8:
        values_NK, scales_N = quantize_rows(weight_NK)
        return packed, values_NK.double() * scales_N.double()[:, None]
    return packed, weight_NK.to(stored).double()


LINEARS = [
    (1, 64, 128), (2, 37, 96), (3, 304, 416), (4, 37, 96), (7, 304, 416), (16, 64, 128), (17, 37, 96), (300, 304, 416)
]  # fmt: skip
"""(tokens, out_dim, in_dim): kernels differ for 1, 2, 3, 4, up to 16 and more tokens."""


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("tokens", "out_dim", "in_dim"), LINEARS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(ops: Ops, dtype: torch.dtype, weights, tokens: int, out_dim: int, in_dim: int, has_bias: bool) -> None:
    stored = dtype if weights == "plain" else weights
    if stored == FP8:  # takes multiples of 16 only
        out_dim = -(-out_dim // 16) * 16
    x_TK = normal(tokens, in_dim).to(dtype)
    packed, exact_NK = packed_weight(ops, normal(out_dim, in_dim, seed=1), stored)
    expected = x_TK.double() @ exact_NK.T
    if has_bias:
        packed.bias = normal(out_dim, seed=2).to(CUDA)
        expected += packed.bias.double().cpu()
    assert close(ops.linear(x_TK.to(CUDA), packed), expected, max(BOUNDS[stored], BOUNDS[dtype]))


def on_gpu(case: Paged, dtype: torch.dtype) -> Paged:
    moved = {spec.name: getattr(case, spec.name) for spec in fields(Paged)}
    moved = {name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    return Paged(**{**moved, "q_TNH": moved["q_TNH"].to(dtype)})


LENGTHS = [[(1, 1)], [(1, 300), (1, 17), (1, 4096)], [(5, 900), (1, 33), (16, 16)], [(128, 128), (1, 77), (40, 700)]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (8, 1, 64), (32, 8, 128)])
def test_paged_attention(ops: Ops, dtype: torch.dtype, lengths, heads: int, kv_heads: int, dim: int) -> None:
    case = paged_case(lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
    case.q_TNH = case.q_TNH.to(dtype).float()
    moved = on_gpu(case, dtype)
    for _ in range(2):  # the second launch finds the counters as the first one left them
        assert close(ops.paged_attention(*moved.arguments()), attention_float64(case), BOUNDS[dtype])


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 300), (1, 17), (1, 1)], [(5, 900)]], ids=str)
def test_paged_attention_with_tables_as_wide_as_a_graph_holds_them(ops: Ops, lengths) -> None:
    case = paged_case(lengths, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    case.q_TNH = case.q_TNH.bfloat16().float()
    padded = torch.nn.functional.pad(case.block_tables_SB, (0, 1024 - case.block_tables_SB.shape[1]))
    moved = on_gpu(replace(case, block_tables_SB=padded), torch.bfloat16)
    assert close(ops.paged_attention(*moved.arguments()), attention_float64(case), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Norms, SwiGLU, arg-max and rows of the embedding."""
    x_TD, residual_TD, weight_D = normal(7, 4096).to(dtype), normal(7, 4096, seed=1).to(dtype), normal(4096, seed=2)
    total = (x_TD.float() + residual_TD.float()).to(dtype).double()
    residual = residual_TD.to(CUDA)
    for base, normed in (
        (residual_TD.double(), ops.rms_norm(residual, weight_D.to(CUDA), 1e-5)),
        (total, ops.add_rms_norm(x_TD.to(CUDA), residual, weight_D.to(CUDA), 1e-5)),
    ):
        expected = base * torch.rsqrt(base.square().mean(dim=1, keepdim=True) + 1e-5) * weight_D.double()
        assert close(normed, expected, BOUNDS[dtype])
    assert close(residual, total, BOUNDS[dtype])
    gate_up = normal(5, 2 * 416).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert close(ops.silu_mul(gate_up.to(CUDA)), torch.nn.functional.silu(gate) * up, BOUNDS[dtype])
    logits = normal(4, 49152).to(dtype)
    logits[1, 30000], logits[2, 5] = float("nan"), float("inf")
    logits[3, 100] = logits[3, 40000] = logits[3].max() + 1
    values, indices = ops.argmax(logits.to(CUDA))
    assert indices[0] == logits[0].argmax() and indices[3] == 100
    assert values[1].isnan() and values[2].isnan()
    ids_T = torch.tensor([6, 0, 6], device=CUDA)
    assert torch.equal(ops.gather_rows(x_TD.to(CUDA), ids_T).cpu(), x_TD[ids_T.cpu()])


def slots_of(case: Paged) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions_T int32, slots_T int64) of the query rows."""
    block_size = case.k_cache.shape[2]
    positions, slots = [], []
    for s, context in enumerate(case.context_lens_S.tolist()):
        rows = case.rows(s)
        for position in range(context - (rows.stop - rows.start), context):
            positions.append(position)
            slots.append(int(case.block_tables_SB[s, position // block_size]) * block_size + position % block_size)
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(slots)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS[1:3], ids=str)
def test_rope_store_kv(ops: Ops, dtype: torch.dtype, lengths) -> None:
    config = tiny_config(max_position_embeddings=4096)
    case = paged_case(lengths, num_heads=8, head_dim=32, dtype=dtype)
    qkv_TC = normal(case.q_TNH.shape[0], 12 * 32).to(dtype)
    caches = [cache.to(CUDA) for cache in (case.k_cache, case.v_cache)]
    arguments = (*rope_tables(config, 4096), *slots_of(case))
    expected = reference.rope_store_kv(qkv_TC.float(), *arguments, case.k_cache, case.v_cache, 8, 2)
    moved = (tensor.to(CUDA) for tensor in arguments)
    assert close(ops.rope_store_kv(qkv_TC.to(CUDA), *moved, *caches, 8, 2), expected, BOUNDS[dtype])
    for actual, wanted in zip(caches, (case.k_cache, case.v_cache), strict=True):
        assert torch.equal(actual.isnan().cpu(), wanted.isnan())
        assert close(actual.nan_to_num(), wanted.nan_to_num(), BOUNDS[dtype])


LAYER_LENGTHS = [[(1, 300)], [(1, 17), (3, 300)], [(7, 60)], [(40, 40), (1, 90)]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("has_x", "is_whole"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("lengths", LAYER_LENGTHS, ids=str)
def test_halves_of_a_layer_give_what_their_ops_give(weights, has_x: bool, is_whole: bool, lengths) -> None:
    ops = select_ops(CUDA, num_threads=1, force="triton")
    assert ops.attention_layer is not None and ops.feed_forward_layer is not None
    dtype, hidden, ffn = torch.bfloat16, 256, 416
    stored = dtype if weights == "plain" else weights
    shapes = ((12 * 32, hidden), (hidden, 8 * 32), (2 * ffn, hidden), (hidden, ffn))
    qkv, out, gate_up, down = (
        packed_weight(ops, normal(*shape, seed=i) * shape[1] ** -0.5, stored)[0] for i, shape in enumerate(shapes)
    )
    case = paged_case(lengths, num_heads=8, head_dim=32, dtype=dtype)
    positions_T, slots_T = slots_of(case)
    moved = on_gpu(case, dtype)
    rope = [table.to(CUDA) for table in rope_tables(tiny_config(), 512)]
    places = (*rope, positions_T.to(CUDA), slots_T.to(CUDA))
    tables = (moved.block_tables_SB, moved.query_start_S1, moved.context_lens_S, moved.max_query_len)
    x_TD, residual_TD = (normal(len(slots_T), hidden, seed=seed).to(CUDA, dtype) for seed in (10, 11))
    x_TD = x_TD if has_x else None
    norm_D = normal(hidden, seed=12).to(CUDA)

    def norm(residual: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(residual, norm_D, 1e-5) if x_TD is None else ops.add_rms_norm(x_TD, residual, norm_D, 1e-5)

    expected, actual = residual_TD.clone(), residual_TD.clone()
    caches, fused_caches = ([cache.clone() for cache in (moved.k_cache, moved.v_cache)] for _ in range(2))
    q_TNH = ops.rope_store_kv(ops.linear(norm(expected), qkv), *places, *caches, 8, 2)
    attended = ops.paged_attention(q_TNH, *caches, *tables, moved.scale)
    expected += ops.linear(attended.flatten(1), out)
    y_TD = ops.attention_layer(
        x_TD, actual, norm_D, 1e-5, qkv, out, *places, *fused_caches, *tables, 8, 2, moved.scale, is_whole
    )
    assert is_whole or y_TD is not None
    assert close(actual if y_TD is None else actual + y_TD, expected, BOUNDS[stored])
    for a, b in zip(fused_caches, caches, strict=True):
        assert close(a.nan_to_num(), b.nan_to_num(), BOUNDS[stored])

    expected, actual = residual_TD.clone(), residual_TD.clone()
    expected += ops.linear(ops.silu_mul(ops.linear(norm(expected), gate_up)), down)
    y_TD = ops.feed_forward_layer(x_TD, actual, norm_D, 1e-5, gate_up, down, is_whole)
    assert is_whole or y_TD is not None
    assert close(actual if y_TD is None else actual + y_TD, expected, BOUNDS[stored])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_triton_kernels_prove_themselves_on_this_gpu(deterministic: bool, weights) -> None:
    if deterministic and weights == FP8:
        pytest.skip("fp8 is never deterministic")
    dtype = torch.bfloat16
    stored = dtype if weights == "plain" else weights
    shape = CheckShape(
        hidden_size=4096, intermediate_size=14464, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=49152,
        block_size=16, tp=1, dtype=dtype, kv_dtype=dtype, linear_dtype=stored,
        head_dtype=torch.int8 if stored in QUANTIZED else dtype,
    )  # fmt: skip
    report = select_ops(CUDA, num_threads=1, shape=shape, deterministic=deterministic).report
    assert any(line.startswith("linear: triton") for line in report), report
