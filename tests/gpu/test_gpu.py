"""On a GPU: every op gives what its definition says, in every weight format and for every class of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_infer.dispatch.select import select_ops
from megatron_infer.dispatch.selfcheck_inputs import CheckShape
from megatron_infer.model.formats import quantize
from megatron_infer.model.rope import rope_tables
from megatron_infer.ops import (
    GROUP,
    INT4,
    QUANTIZED,
    BatchView,
    Heads,
    LayerKV,
    NormWeight,
    Ops,
    PackedLinear,
    Rope,
    SingleOps,
    Stream,
)
from megatron_infer.ops.fp8 import FP8, quantize_rows
from megatron_infer.ops.reference import ReferenceOps
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
    moved = {
        name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in vars(case.batch).items()
    }
    kv = LayerKV(case.kv.k.to(CUDA), case.kv.v.to(CUDA))
    return Paged(case.q_TNH.to(CUDA, dtype), BatchView(**moved), kv, case.scale)


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
    tables_SB = case.batch.block_tables_SB
    padded_SB = torch.nn.functional.pad(tables_SB, (0, 1024 - tables_SB.shape[1]))
    moved = on_gpu(replace(case, batch=replace(case.batch, block_tables_SB=padded_SB)), torch.bfloat16)
    assert close(ops.paged_attention(*moved.arguments()), attention_float64(case), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Norms, SwiGLU, arg-max and rows of the embedding."""
    x_TD, residual_TD, weight_D = normal(7, 4096).to(dtype), normal(7, 4096, seed=1).to(dtype), normal(4096, seed=2)
    total = (x_TD.float() + residual_TD.float()).to(dtype).double()
    residual, norm = residual_TD.to(CUDA), NormWeight(weight_D.to(CUDA), 1e-5)
    for base, normed in (
        (residual_TD.double(), ops.rms_norm(residual, norm)),
        (total, ops.add_rms_norm(x_TD.to(CUDA), residual, norm)),
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS[1:3], ids=str)
def test_rope_store_kv(ops: Ops, dtype: torch.dtype, lengths) -> None:
    config = tiny_config(max_position_embeddings=4096)
    case = paged_case(lengths, num_heads=8, head_dim=32, dtype=dtype)
    qkv_TC = normal(case.q_TNH.shape[0], 12 * 32).to(dtype)
    moved, rope, heads = on_gpu(case, dtype), Rope(*rope_tables(config, 4096)), Heads(8, 2, case.scale)
    expected = ReferenceOps().rope_store_kv(qkv_TC.float(), rope, case.batch, case.kv, heads)
    moved_rope = Rope(*(table.to(CUDA) for table in rope))
    q_TNH = ops.rope_store_kv(qkv_TC.to(CUDA), moved_rope, moved.batch, moved.kv, heads)
    assert close(q_TNH, expected, BOUNDS[dtype])
    for actual, wanted in zip(moved.kv, case.kv, strict=True):
        assert torch.equal(actual.isnan().cpu(), wanted.isnan())
        assert close(actual.nan_to_num(), wanted.nan_to_num(), BOUNDS[dtype])


LAYER_LENGTHS = [[(1, 300)], [(1, 17), (3, 300)], [(7, 60)], [(40, 40), (1, 90)]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("has_pending", "completes_sum"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("lengths", LAYER_LENGTHS, ids=str)
def test_halves_of_a_layer_give_what_their_ops_give(weights, has_pending: bool, completes_sum: bool, lengths) -> None:
    ops = select_ops(CUDA, num_threads=1, force="triton")
    single = SingleOps(ops)
    dtype, hidden, ffn = torch.bfloat16, 256, 416
    stored = dtype if weights == "plain" else weights
    shapes = ((12 * 32, hidden), (hidden, 8 * 32), (2 * ffn, hidden), (hidden, ffn))
    qkv, out, gate_up, down = (
        packed_weight(ops, normal(*shape, seed=i) * shape[1] ** -0.5, stored)[0] for i, shape in enumerate(shapes)
    )
    case = paged_case(lengths, num_heads=8, head_dim=32, dtype=dtype)
    batch, kv = (moved := on_gpu(case, dtype)).batch, moved.kv
    rope, heads = Rope(*(table.to(CUDA) for table in rope_tables(tiny_config(), 512))), Heads(8, 2, case.scale)
    pending_TD, residual_TD = (normal(len(case.q_TNH), hidden, seed=seed).to(CUDA, dtype) for seed in (10, 11))
    pending_TD = pending_TD if has_pending else None
    norm = NormWeight(normal(hidden, seed=12).to(CUDA), 1e-5)

    expected, actual = (Stream(residual_TD.clone(), pending_TD) for _ in range(2))
    single_kv, fused_kv = kv.clone(), kv.clone()
    single.attention_layer(expected, norm, qkv, out, rope, batch, single_kv, heads, completes_sum)
    ops.attention_layer(actual, norm, qkv, out, rope, batch, fused_kv, heads, completes_sum)
    assert completes_sum or actual.pending_TD is not None
    assert close(actual.settle(), expected.settle(), BOUNDS[stored])
    for a, b in zip(fused_kv, single_kv, strict=True):
        assert close(a.nan_to_num(), b.nan_to_num(), BOUNDS[stored])

    expected, actual = (Stream(residual_TD.clone(), pending_TD) for _ in range(2))
    single.feed_forward_layer(expected, norm, gate_up, down, completes_sum)
    ops.feed_forward_layer(actual, norm, gate_up, down, completes_sum)
    assert completes_sum or actual.pending_TD is not None
    assert close(actual.settle(), expected.settle(), BOUNDS[stored])


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
