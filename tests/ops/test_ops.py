"""Every implementation of every op gives what its definition says, and the choice among them is explained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_infer.dispatch.select import select_ops
from megatron_infer.dispatch.selfcheck_inputs import tokens_at
from megatron_infer.kernels.cpu import abi
from megatron_infer.model.formats import quantize
from megatron_infer.ops import (
    GROUP,
    INT4,
    NUM_CHUNKS,
    OP_NAMES,
    QUANTIZED,
    Heads,
    LayerKV,
    NormWeight,
    Ops,
    Rope,
    chunk_bounds,
)
from tests.support.ops_cases import CPU, attention_float64, bounds_of, normal, packed, paged_case, same_bits

KINDS = ["native", "vendor", "reference"]


@pytest.fixture(params=KINDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "native" and not abi.LIBRARY.exists():
        pytest.skip("the native library is not built")
    return select_ops(CPU, num_threads=2, force=request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    return bool(error <= bound)


def test_chunk_bounds_split_k_in_eight_at_multiples_of_the_unit() -> None:
    assert chunk_bounds(4096) == tuple(range(0, 4097, 512))
    bounds = chunk_bounds(14464, unit=128)
    assert len(bounds) == NUM_CHUNKS + 1 and bounds[0] == 0 and bounds[-1] == 14464
    assert all(bound % 128 == 0 for bound in bounds)
    assert chunk_bounds(5) == (0, 0, 1, 1, 2, 3, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "out_dim", "in_dim"), [(1, 16, 64), (3, 37, 77), (17, 130, 5), (2, 1, 300)])
def test_linear_is_the_matrix_product(ops: Ops, dtype: torch.dtype, tokens: int, out_dim: int, in_dim: int) -> None:
    x_TK, weight_NK, bias_N = normal(tokens, in_dim), normal(out_dim, in_dim, seed=1), normal(out_dim, seed=2)
    weight = packed(ops, weight_NK, dtype)
    weight.bias = bias_N
    expected = x_TK.double() @ weight_NK.to(dtype).double().T + bias_N.double()
    assert close(ops.linear(x_TK, weight), expected, 2e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 6e-4), (INT4, 1e-2)])
@pytest.mark.parametrize(("tokens", "out_dim", "in_dim"), [(1, 16, 64), (3, 37, 77), (17, 130, 5), (50, 20, 300)])
def test_quantized_linear_is_the_product_with_the_rounded_weights(
    ops: Ops, dtype: torch.dtype, bound: float, tokens: int, out_dim: int, in_dim: int
) -> None:
    """What is left is the rounding of the activations: 12 bits beside int8, 8 beside int4."""
    x_TK, weight_NK = normal(tokens, in_dim), normal(out_dim, in_dim, seed=1)
    values_NK, scales_NG = quantize(weight_NK, dtype)
    rounded_NK = values_NK.double() * scales_NG.double().repeat_interleave(GROUP, dim=1)[:, :in_dim]
    assert close(ops.linear(x_TK, packed(ops, weight_NK, dtype)), x_TK.double() @ rounded_NK.T, bound)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_rows_can_be_packed_piecewise(ops: Ops, dtype: torch.dtype) -> None:
    weight_NK = normal(75, 83)
    whole, pieces = packed(ops, weight_NK, dtype), ops.allocate_linear(75, 83, bounds_of(83, dtype), dtype, CPU)
    for begin, end in [(20, 41), (0, 3), (41, 75), (3, 20)]:
        ops.pack_quantized(pieces, begin, *quantize(weight_NK[begin:end], dtype))
    x_TK = normal(9, 83, seed=1)
    assert same_bits(ops.linear(x_TK, pieces), ops.linear(x_TK, whole))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_non_finite_row_or_weight_shows(ops: Ops, dtype: torch.dtype) -> None:
    """NaN and infinities cannot hide in an integer: the row, or the output column, is NaN and no other is touched."""
    x_TK, weight_NK = normal(6, 96), normal(20, 96, seed=1)
    clean = ops.linear(x_TK, packed(ops, weight_NK, dtype))
    for spoiler in (float("nan"), float("inf"), float("-inf")):
        x_TK[2, 40], weight_NK[7, 70] = spoiler, spoiler
        non_finite = ops.linear(x_TK, packed(ops, weight_NK, dtype))
        assert not non_finite[2].isfinite().any() and not non_finite[:, 7].isfinite().any()
        non_finite[2], non_finite[:, 7] = clean[2], clean[:, 7]
        assert same_bits(non_finite, clean)
        x_TK, weight_NK = normal(6, 96), normal(20, 96, seed=1)


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.int8, -127, 127), (INT4, -8, 7)])
def test_quantize_rounds_each_group_to_half_a_step(dtype: torch.dtype, low: int, high: int) -> None:
    weight_NK = normal(40, 150) * torch.logspace(-6, 6, 40)[:, None]
    weight_NK[3, 32:64] = 0.0
    values_NK, scales_NG = quantize(weight_NK, dtype)
    assert values_NK.dtype == torch.int8 and scales_NG.dtype == torch.bfloat16 and scales_NG.shape == (40, 5)
    assert int(values_NK.min()) == low and int(values_NK.max()) == high
    steps_NK = scales_NG.float().repeat_interleave(GROUP, dim=1)[:, :150]
    error_NK = (values_NK * steps_NK - weight_NK).abs()
    # Only a value opposite to the largest one of its int4 group can be cut off; the scale itself is rounded to 8 bits.
    within = error_NK <= steps_NK.abs() * (0.5 + high / 256)
    assert bool((within | ((values_NK == high) & (high == 7))).all())
    assert not (error_NK > steps_NK.abs() * 1.04).any()
    assert torch.equal(quantize(weight_NK[5:6, 64:96], dtype)[0], values_NK[5:6, 64:96])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_can_be_packed_piecewise_from_any_float_dtype(ops: Ops, dtype: torch.dtype, source: torch.dtype) -> None:
    weight_NK = normal(75, 83).to(source)
    weight = ops.allocate_linear(75, 83, chunk_bounds(83), dtype, CPU)
    wide = torch.cat([weight_NK, weight_NK], dim=1)
    for begin, end in [(20, 41), (0, 3), (41, 75), (3, 20)]:
        ops.pack_rows(weight, begin, wide[begin:end, 83:])
    identity = torch.eye(83)
    assert torch.equal(ops.linear(identity, weight).T, weight_NK.to(dtype).float())


@pytest.mark.parametrize("dim", [8, 64, 100, 257])
def test_rms_norm_and_its_fused_addition(ops: Ops, dim: int) -> None:
    x_TD, residual_TD, norm = 3 * normal(5, dim), normal(5, dim, seed=1), NormWeight(normal(dim, seed=2), 1e-5)
    total = residual_TD.double() + x_TD.double()
    expected = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight_D.double()
    assert close(ops.rms_norm(x_TD + residual_TD, norm), expected, 1e-6)
    assert close(ops.add_rms_norm(x_TD, residual_TD, norm), expected, 1e-6)
    assert close(residual_TD, total, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_rope_rotates_halves_and_writes_only_its_slots(ops: Ops, dtype: torch.dtype, head_dim: int) -> None:
    heads, kv_heads, block_size, tokens = 4, 2, 8, 5
    qkv_TC = normal(tokens, (heads + 2 * kv_heads) * head_dim)
    angle = normal(50, head_dim // 2, seed=1)
    positions_T = torch.tensor([0, 3, 49, 4, 5], dtype=torch.int32)
    slots_T = torch.tensor([17, 0, 63, 8, 30])
    kv = LayerKV(*(torch.full((8, kv_heads, block_size, head_dim), 7.0, dtype=dtype) for _ in range(2)))
    rope, batch = Rope(angle.cos(), angle.sin()), tokens_at(positions_T, slots_T)
    q_TNH = ops.rope_store_kv(qkv_TC, rope, batch, kv, Heads(heads, kv_heads, 1.0))
    x = qkv_TC.double().unflatten(1, (-1, head_dim))
    turn = torch.polar(torch.ones(tokens, 1, head_dim // 2).double(), angle[positions_T.long(), None].double())
    rotated = torch.view_as_real(torch.complex(*x.chunk(2, dim=2)) * turn).movedim(3, 2).flatten(2)
    assert close(q_TNH, rotated[:, :heads], 3e-7)
    precision = 3e-7 if dtype == torch.float32 else 4e-3
    written_k = kv.k.transpose(1, 2).flatten(0, 1)[slots_T].float()
    assert close(written_k, rotated[:, heads : heads + kv_heads], precision)
    assert torch.equal(kv.v.transpose(1, 2).flatten(0, 1)[slots_T], x[:, heads + kv_heads :].to(dtype))
    untouched = torch.ones(64, dtype=torch.bool).index_fill(0, slots_T, False)
    assert all((cache.transpose(1, 2).flatten(0, 1)[untouched] == 7).all() for cache in kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "block_size"),
    [
        ([(1, 1)], 1, 1, 8, 16),
        ([(1, 16), (1, 17), (1, 300)], 8, 1, 16, 16),
        ([(33, 33)], 6, 2, 20, 4),
        ([(7, 260), (1, 40), (20, 20)], 4, 4, 32, 32),
        ([(270, 290)], 2, 1, 16, 16),
    ],
)
def test_paged_attention_is_causal_softmax_attention(
    ops: Ops, dtype: torch.dtype, lengths: list, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    case = paged_case(
        lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    assert close(ops.paged_attention(*case.arguments()), attention_float64(case), 2e-6)


@pytest.mark.parametrize("lengths", [[(1, 40), (1, 7), (1, 33)], [(3, 40), (3, 3)], [(20, 33)]], ids=str)
def test_vendor_attention_of_equally_many_queries_waits_for_no_index(lengths: list) -> None:
    """A tensor without contents cannot be read by the host: a CUDA graph can hold the op."""
    ops = select_ops(CPU, num_threads=1, force="vendor")
    case = paged_case(lengths)
    unreadable = replace(case.batch, query_start_S1=case.batch.query_start_S1.to("meta"))
    o_TNH = ops.paged_attention(case.q_TNH, unreadable, case.kv, case.scale)
    assert o_TNH.is_contiguous() and close(o_TNH, attention_float64(case), 2e-6)


def test_silu_mul_over_the_whole_range(ops: Ops) -> None:
    gate_TF = torch.cat([torch.linspace(-110, 110, 997), 4 * normal(1003)]).reshape(2, 1000)
    up_TF = normal(2, 1000, seed=1)
    expected = gate_TF.double() * gate_TF.double().sigmoid() * up_TF.double()
    actual = ops.silu_mul(torch.cat([gate_TF, up_TF], dim=1)).double()
    assert ((actual - expected).abs() <= 4e-7 * expected.abs() + 1e-35).all()


def test_argmax_takes_the_first_of_equals_and_refuses_non_finite_rows(ops: Ops) -> None:
    logits_SV = normal(7, 1003).clamp(max=2.0)
    logits_SV[1, 500] = float("nan")
    logits_SV[2, 1002] = float("inf")
    logits_SV[3, 0] = float("-inf")
    logits_SV[4] = -5.0
    logits_SV[5, 1002] = 3.0
    values_S, indices_S = ops.argmax(logits_SV)
    assert values_S.isnan().tolist() == [False, True, True, True, False, False, False]
    for row in (0, 4, 5, 6):
        assert values_S[row] == logits_SV[row].max()
        assert indices_S[row] == (logits_SV[row] == values_S[row]).nonzero()[0, 0]
    assert ops.argmax(torch.empty(2, 0))[0].tolist() == [float("-inf")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gather_rows_reads_the_table(ops: Ops, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    table_VD = (normal(40, 33) * torch.logspace(-7, 4, 33)).to(dtype)
    table_VD[7, :3] = torch.tensor([float("inf"), float("-inf"), 0.0])
    ids_T = torch.tensor([39, 0, 7, 7], dtype=ids_dtype)
    assert same_bits(ops.gather_rows(table_VD, ids_T), table_VD[ids_T.long()].float())


def test_reference_bits_do_not_depend_on_the_batch() -> None:
    ops = select_ops(CPU, num_threads=1, force="reference")
    weight = packed(ops, normal(37, 100), torch.bfloat16)
    x_TK = normal(9, 100, seed=1)
    whole = ops.linear(x_TK, weight)
    assert all(same_bits(ops.linear(x_TK[t : t + 1], weight), whole[t : t + 1]) for t in range(9))
    case = paged_case([(30, 280), (1, 5)], head_dim=8, num_heads=2, num_kv_heads=1)
    whole = ops.paged_attention(*case.arguments())
    for first, last in [(0, 30), (0, 7), (7, 30), (29, 30)]:
        alone = ops.paged_attention(*case.part(0, first, last).arguments())
        assert same_bits(alone, whole[first:last])


def test_the_choice_is_made_per_device_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = select_ops(torch.device("cuda"), num_threads=1).report
    assert len(cuda) == len(OP_NAMES) and all(": vendor" in line and "native refused" in line for line in cuda)
    exact = select_ops(torch.device("cuda"), num_threads=1, deterministic=True).report
    assert all(": reference" in line and "deterministic" in line for line in exact)
    assert all("triton refused: torch finds no usable GPU" in line for line in exact)
    monkeypatch.setattr(abi, "LIBRARY", tmp_path / "absent.so")
    fallback = select_ops(CPU, num_threads=1).report
    assert all(": reference" in line and "pip install -e ." in line for line in fallback)
    with pytest.raises(ValueError, match=r"absent\.so is missing"):
        select_ops(CPU, num_threads=1, force="native")


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        select_ops(CPU, num_threads=0)
    with pytest.raises(ValueError, match="force is 'fast'"):
        select_ops(CPU, num_threads=1, force="fast")
    with pytest.raises(ValueError, match="native ops cannot be used on cuda"):
        select_ops(torch.device("cuda"), num_threads=1, force="native")
