"""The row-wise Triton kernels, interpreted on the CPU, give what the reference ops give; a row's bits are its own.

In fp32 within a few roundings; in bf16 and fp16 within one rounding of the result to that type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.triton import interpreter as interpreter  # first: what follows imports triton

from megatron_infer.kernels.triton.activation import silu_mul  # isort: skip
from megatron_infer.kernels.triton.argmax import argmax  # isort: skip
from megatron_infer.kernels.triton.norm import add_rms_norm, rms_norm  # isort: skip
from megatron_infer.kernels.triton.rope import rope_store_kv  # isort: skip
from megatron_infer.ops import Heads, LayerKV, NormWeight, Rope  # isort: skip
from megatron_infer.ops.reference import ReferenceOps  # isort: skip
from megatron_infer.dispatch.selfcheck_inputs import tokens_at  # isort: skip

from tests.support.ops_cases import normal  # isort: skip

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def agrees(actual: Tensor, expected: Tensor, fp32_bound: float = 1e-6) -> bool:
    """Every element: relative to itself when rounded to few bits, and to the largest one for what fp32 sums lose."""
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    expected = expected.double()
    error, top = (actual.double() - expected).abs(), expected.abs().max()
    return actual.shape == expected.shape and bool((error <= rounding * expected.abs() + fp32_bound * top).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 100, 257, 4096])
def test_norms(dtype: torch.dtype, dim: int) -> None:
    x_TD, residual_TD, weight_D = (3 * normal(5, dim)).to(dtype), normal(5, dim, seed=1).to(dtype), normal(dim, seed=2)
    y_TD = rms_norm(x_TD, weight_D, 1e-5)
    assert y_TD.dtype == dtype and agrees(y_TD, REFERENCE.rms_norm(x_TD, NormWeight(weight_D, 1e-5)))
    alone_1D = residual_TD[3:4].clone()
    total_TD = residual_TD + x_TD
    y_TD = add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
    assert torch.equal(residual_TD, total_TD)
    assert y_TD.dtype == dtype and agrees(y_TD, REFERENCE.rms_norm(total_TD, NormWeight(weight_D, 1e-5)))
    assert torch.equal(add_rms_norm(x_TD[3:4], alone_1D, weight_D, 1e-5), y_TD[3:4])


def test_partial_sums_in_fp32_join_a_narrow_residual() -> None:
    x_TD, residual_TD, weight_D = normal(2, 64), normal(2, 64, seed=1).bfloat16(), normal(64, seed=2)
    total_TD = (residual_TD.float() + x_TD).bfloat16()
    y_TD = add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
    assert torch.equal(residual_TD, total_TD) and y_TD.dtype == torch.bfloat16
    assert agrees(y_TD, REFERENCE.rms_norm(total_TD, NormWeight(weight_D, 1e-5)))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 128), (7, 7, 32), (8, 1, 64), (6, 2, 80), (4, 2, 96), (2, 1, 256)]
)
def test_rope_writes_the_references_slots(
    dtype: torch.dtype, cache_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    qkv_TC = normal(5, (heads + 2 * kv_heads) * head_dim).to(dtype)
    # Infinities and NaN in a value stay where they are.
    qkv_TC[1, -3:] = torch.tensor([float("inf"), float("nan"), float("-inf")])
    angle_PH = normal(50, head_dim // 2, seed=1)
    positions_T = torch.tensor([0, 3, 49, 4, 5], dtype=torch.int32)
    slots_T = torch.tensor([17, 0, 63, 8, 30])
    rope, batch = Rope(angle_PH.cos(), angle_PH.sin()), tokens_at(positions_T, slots_T)
    shape = (8, kv_heads, 8, head_dim)
    caches = [torch.full(shape, 7.0, dtype=cache_dtype) for _ in range(4)]
    q_TNH = rope_store_kv(qkv_TC, *rope, positions_T, slots_T, *caches[:2], heads, kv_heads)
    assert q_TNH.dtype == dtype
    exact = REFERENCE.rope_store_kv(qkv_TC, rope, batch, LayerKV(*caches[2:]), Heads(heads, kv_heads, 1.0))
    assert agrees(q_TNH, exact, 3e-7)
    # What nobody wrote is 7 in both.
    assert agrees(caches[0], caches[2], 3e-7)
    assert torch.equal(caches[1].isnan(), caches[3].isnan())
    assert torch.equal(caches[1].nan_to_num(), caches[3].nan_to_num())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 200, 1024, 3616])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up_T2F = torch.cat([torch.linspace(-110, 110, 3 * width).reshape(3, -1), normal(3, width)], dim=1).to(dtype)
    y_TF, expected_TF = silu_mul(gate_up_T2F), REFERENCE.silu_mul(gate_up_T2F).double()
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert y_TF.dtype == dtype
    # Near zero a subnormal of the type is the smallest step.
    smallest = 2.0**-24 if dtype == torch.float16 else 1e-35
    assert ((y_TF.double() - expected_TF).abs() <= rounding * expected_TF.abs() + smallest).all()
    assert torch.equal(silu_mul(gate_up_T2F[1:2]), y_TF[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 2048, 5003])
def test_argmax(dtype: torch.dtype, width: int) -> None:
    # Few different values: the largest occurs again and again, in several parts of a row.
    logits_SV = normal(9, width).mul(2).round().to(dtype)
    for row, spoiler in enumerate(["nan", "inf", "-inf"], start=1):
        logits_SV[row, (row * width) // 5] = float(spoiler)
    logits_SV[4] = -5.0
    logits_SV[5, -1] = 100.0
    logits_SV[6, 0] = 100.0
    logits_SV[7] = torch.finfo(dtype).min
    values_S, indices_S = argmax(logits_SV)
    expected_values_S, expected_indices_S = REFERENCE.argmax(logits_SV)
    assert values_S.dtype == torch.float32 and torch.equal(values_S.isnan(), expected_values_S.isnan())
    assert torch.equal(values_S.nan_to_num(), expected_values_S.nan_to_num())
    assert indices_S.dtype == torch.int64 and torch.equal(indices_S, expected_indices_S)


def test_argmax_of_an_empty_share_of_the_vocabulary() -> None:
    values_S, indices_S = argmax(torch.empty(2, 0))
    assert values_S.tolist() == [float("-inf")] * 2 and indices_S.tolist() == [0, 0]


def test_no_rows_is_no_work() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert argmax(torch.empty(0, 8))[0].shape == (0,)
