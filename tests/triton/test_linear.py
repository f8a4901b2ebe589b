"""The Triton linear layers, interpreted on the CPU: products within their bounds, fusions, and bits that stay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.triton import interpreter as interpreter  # first: what follows imports triton

from megatron_infer.kernels.triton import linear as layers  # isort: skip
from megatron_infer.kernels.triton import linear_deterministic, linear_gemv  # isort: skip
from megatron_infer.kernels.triton.linear_rope import norm_qkv_rope_store_kv  # isort: skip
from megatron_infer.model.formats import dequantize, quantize  # isort: skip
from megatron_infer.ops import GROUP, INT4, QUANTIZED, Heads, LayerKV, PackedLinear, Rope, reference  # isort: skip
from megatron_infer.dispatch.selfcheck_inputs import tokens_at  # isort: skip
from megatron_infer.ops.fp8 import FP8, quantize_rows  # isort: skip

from tests.support.ops_cases import CPU, bounds_of, normal, packed, same_bits  # isort: skip

REFERENCE = reference.ReferenceOps()
OPS = SimpleNamespace(
    allocate_linear=layers.allocate_linear, pack_rows=layers.pack_rows, pack_quantized=layers.pack_quantized
)
KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.int8, torch.bfloat16),
    (torch.int8, torch.float32),
    (INT4, torch.bfloat16),
    (INT4, torch.float32),
    (FP8, torch.bfloat16),
    (FP8, torch.float32),
]
"""Of the weights and of the activations."""


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as of a large layer in a small one: what the interpreter needs a second for is a program."""
    monkeypatch.setattr(linear_gemv, "_MIN_PROGRAMS", 1)


def rounded_to_fp8(x_TK: Tensor) -> Tensor:
    """Row by row, in float64."""
    values_TK, scales_T = quantize_rows(x_TK)
    return values_TK.double() * scales_T.double()[:, None]


def stored(weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """What the packed weight stands for, in float64."""
    if dtype == FP8:
        return rounded_to_fp8(weight_NK)
    if dtype not in QUANTIZED:
        return weight_NK.to(dtype).double()
    return dequantize(*quantize(weight_NK, dtype), GROUP).double()


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest value, beyond the rounding of the result itself."""
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    assert actual.shape == expected.shape
    beyond = (actual.double() - expected).abs() - rounding * expected.abs()
    return float(beyond.max() / expected.abs().max())


@pytest.mark.parametrize(("dtype", "x_dtype"), KINDS)
@pytest.mark.parametrize(
    ("tokens", "out_dim", "in_dim"), [(1, 3, 77), (3, 2, 200), (5, 34, 200), (16, 7, 77), (20, 35, 300)]
)
def test_linear_is_the_matrix_product(
    dtype: torch.dtype, x_dtype: torch.dtype, tokens: int, out_dim: int, in_dim: int
) -> None:
    x_TK, weight_NK = normal(tokens, in_dim).to(x_dtype), normal(out_dim, in_dim, seed=1)
    weight = packed(OPS, weight_NK, dtype)
    weight.bias = normal(out_dim, seed=2)
    y_TN = layers.linear(x_TK, weight)
    # Beyond 4 tokens value * scale is rounded to the dtype of x, and torch rounds before the bias.
    bound = 1e-6 if x_dtype == torch.float32 or tokens <= 4 else 2 * torch.finfo(x_dtype).eps
    operand_TK = x_TK.double()
    if dtype == FP8 and tokens > 4:
        operand_TK, bound = rounded_to_fp8(x_TK), 2 * torch.finfo(torch.bfloat16).eps
    assert y_TN.dtype == x_dtype
    assert error(y_TN, operand_TK @ stored(weight_NK, dtype).T + weight.bias.double()) <= bound


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("dtype", "x_dtype"), KINDS)
def test_large_layers_have_more_rows_in_a_tile(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for tokens, in_dim in [(1, 4500), (4, 1100)]:
        x_TK, weight_NK = normal(tokens, in_dim).to(x_dtype), normal(9, in_dim, seed=1)
        y_TN = layers.linear(x_TK, packed(OPS, weight_NK, dtype))
        assert error(y_TN, x_TK.double() @ stored(weight_NK, dtype).T) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 4])
def test_tiles_of_the_7b_layers_fill_the_machine(tokens: int) -> None:
    def tile_of(out_dim: int, in_dim: int) -> tuple[int, int, int]:
        tile = linear_gemv.tile_of(tokens, out_dim, in_dim // 8, parts=1, planes=1, fields=1)
        return tile.block_n, tile.vectors, tile.num_warps

    for out_dim, in_dim in [(6144, 4096), (4096, 4096), (4096, 14464), (49152, 4096)]:
        assert tile_of(out_dim, in_dim) == (8, 128, 4)
    # A rank of eight: fewer rows and, where K is short, fewer warps.
    assert tile_of(768, 4096) == (1, 128, 4) and tile_of(4096, 512) == (8, 64, 2)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 6e-4), (INT4, 1e-2)])
@pytest.mark.parametrize("tokens", [2, 6])
def test_quantized_differs_from_the_reference_by_its_rounding_of_activations(
    dtype: torch.dtype, bound: float, tokens: int
) -> None:
    x_TK, weight_NK = normal(tokens, 150), normal(16, 150, seed=1)
    expected = REFERENCE.linear(x_TK, packed(REFERENCE, weight_NK, dtype))
    assert error(layers.linear(x_TK, packed(OPS, weight_NK, dtype)), expected.double()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, *QUANTIZED])
def test_rows_can_be_packed_piecewise(dtype: torch.dtype) -> None:
    weight_NK = normal(15, 83)
    pieces = layers.allocate_linear(15, 83, bounds_of(83, dtype), dtype, CPU)
    for rows in (slice(4, 9), slice(0, 1), slice(9, 15), slice(1, 4)):
        if dtype in QUANTIZED:
            layers.pack_quantized(pieces, rows.start, *quantize(weight_NK[rows], dtype))
        else:
            layers.pack_rows(pieces, rows.start, weight_NK[rows])
    whole = packed(OPS, weight_NK, dtype)
    assert torch.equal(pieces.data.view(torch.uint8), whole.data.view(torch.uint8))
    for scales, of_whole in [
        (pieces.layout.scales_NG, whole.layout.scales_NG),
        (pieces.layout.scales_N, whole.layout.scales_N),
    ]:
        assert (scales is None and of_whole is None) or torch.equal(scales, of_whole)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", [torch.float32, FP8, *QUANTIZED])
@pytest.mark.parametrize("tokens", [3, 6])
def test_a_non_finite_row_or_weight_shows_and_touches_nothing_else(dtype: torch.dtype, tokens: int) -> None:
    x_TK, weight_NK = normal(tokens, 96), normal(10, 96, seed=1)
    clean = layers.linear(x_TK, packed(OPS, weight_NK, dtype))
    x_TK[2, 40], weight_NK[7, 70] = float("nan"), float("inf")
    non_finite = layers.linear(x_TK, packed(OPS, weight_NK, dtype))
    assert not non_finite[2].isfinite().any() and not non_finite[:, 7].isfinite().any()
    non_finite[2], non_finite[:, 7] = clean[2], clean[:, 7]
    assert same_bits(non_finite, clean)


FUSED_KINDS = [KINDS[0], KINDS[1], KINDS[3], KINDS[5], KINDS[7]]


def normed(x_TK: Tensor, norm_K: Tensor, eps: float) -> Tensor:
    """RMSNorm in float64."""
    x_TK = x_TK.double()
    return x_TK * (x_TK.square().mean(1, keepdim=True) + eps).rsqrt() * norm_K.double()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("dtype", "x_dtype"), FUSED_KINDS)
@pytest.mark.parametrize("tokens", [2, 7])
def test_fused_launches_give_what_their_parts_give(dtype: torch.dtype, x_dtype: torch.dtype, tokens: int) -> None:
    x_TK, weight_NK, norm_K = normal(tokens, 200).to(x_dtype), normal(12, 200, seed=1), 1 + normal(200, seed=2)
    weight, bias_N, eps = packed(OPS, weight_NK, dtype), normal(12, seed=3), 1e-5
    weight.bias = bias_N
    if tokens > layers.max_fused_tokens(weight):
        with pytest.raises(AssertionError):
            layers.linear_add(x_TK, weight, normal(tokens, 12).to(x_dtype))
        return

    def product(x_TK: Tensor) -> Tensor:
        return x_TK @ stored(weight_NK, dtype).T + bias_N.double()

    def gated(y_TN: Tensor) -> Tensor:
        return torch.nn.functional.silu(y_TN[:, :6]) * y_TN[:, 6:]

    bound = 2e-6 if x_dtype == torch.float32 or tokens <= 4 else 2 * torch.finfo(x_dtype).eps
    x = x_TK.double()
    assert error(layers.gate_up_silu(x_TK, weight), gated(product(x))) <= bound
    residual_TN = normal(tokens, 12, seed=4).to(x_dtype)
    total = residual_TN.double() + product(x)
    layers.linear_add(x_TK, weight, residual_TN)
    assert error(residual_TN, total) <= bound
    if tokens <= layers.MAX_NORM_TOKENS:
        gate_up = layers.norm_gate_up_silu(x_TK, norm_K, eps, weight)
        assert error(gate_up, gated(product(normed(x_TK, norm_K, eps)))) <= bound


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("dtype", "x_dtype"), FUSED_KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens", "with_norm"),
    [(3, 1, 16, 1, True), (4, 2, 6, 4, True), (1, 1, 8, 2, False)],
)
def test_one_launch_fills_the_cache(
    dtype: torch.dtype, x_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, tokens: int, with_norm: bool
) -> None:
    """From the residual to rotated q and k and to v, rounded once, to their slots and to no other."""
    out_dim, eps = (heads + 2 * kv_heads) * head_dim, 1e-5
    x_TK, weight_NK = normal(tokens, 70).to(x_dtype), normal(out_dim, 70, seed=1)
    norm_K = 1 + normal(70, seed=2) if with_norm else None
    weight = packed(OPS, weight_NK, dtype)
    weight.bias = normal(out_dim, seed=3)
    angle_PH = normal(9, head_dim // 2, seed=4)
    positions_T = torch.tensor([8, 0, 3, 4], dtype=torch.int32)[:tokens]
    slots_T = torch.tensor([11, 0, 15, 6])[:tokens]
    indices = (angle_PH.cos(), angle_PH.sin(), positions_T, slots_T)
    caches = [torch.full((4, kv_heads, 4, head_dim), 7.0, dtype=x_dtype) for _ in range(2)]
    q_TNH = norm_qkv_rope_store_kv(x_TK, norm_K, eps, weight, *indices, *caches, heads, kv_heads)
    operand_TK = x_TK.double() if norm_K is None else normed(x_TK, norm_K, eps)
    qkv_TC = (operand_TK @ stored(weight_NK, dtype).T + weight.bias.double()).float()
    exact = [torch.full((4, kv_heads, 4, head_dim), 7.0) for _ in range(2)]
    exact_TNH = REFERENCE.rope_store_kv(
        qkv_TC, Rope(*indices[:2]), tokens_at(positions_T, slots_T), LayerKV(*exact), Heads(heads, kv_heads, 1.0)
    )
    assert q_TNH.dtype == x_dtype
    for actual, expected in zip((q_TNH, *caches), (exact_TNH, *exact), strict=True):
        assert error(actual, expected.double()) <= 2e-6
    untouched = torch.ones(4, 4, dtype=torch.bool)
    untouched.view(-1)[slots_T] = False
    assert all((cache.transpose(1, 2)[untouched] == 7.0).all() for cache in caches)


@pytest.mark.usefixtures("few_programs")
def test_bits_of_a_row_do_not_depend_on_the_other_rows() -> None:
    for dtype, tokens in [(torch.bfloat16, 4), (torch.bfloat16, 9), (INT4, 3), (torch.int8, 9), (INT4, 20), (FP8, 4)]:
        weight = packed(OPS, normal(12, 64), dtype)
        x_TK, others_TK = normal(tokens, 64, seed=1).bfloat16(), normal(tokens, 64, seed=2).bfloat16()
        others_TK[1] = x_TK[1]
        assert torch.equal(layers.linear(x_TK, weight)[1], layers.linear(others_TK, weight)[1])


def shards(weight_NK: Tensor, dtype: torch.dtype, ranks: int) -> list[tuple[slice, PackedLinear]]:
    """Each rank's columns of a row-parallel layer."""
    bounds = bounds_of(weight_NK.shape[1], dtype)
    found = []
    for rank in range(ranks):
        own = bounds[rank * 8 // ranks : (rank + 1) * 8 // ranks + 1]
        columns = slice(own[0], own[-1])
        found.append((columns, packed(OPS, weight_NK[:, columns], dtype, tuple(bound - own[0] for bound in own))))
    return found


@pytest.mark.parametrize(
    ("dtype", "in_dim"), [(torch.float32, 200), (torch.bfloat16, 1100), (torch.int8, 280), (INT4, 280)]
)
def test_deterministic_bits_depend_on_neither_tokens_nor_ranks(dtype: torch.dtype, in_dim: int) -> None:
    x_TK, weight_NK = normal(70, in_dim), normal(20, in_dim, seed=1)
    weight = packed(OPS, weight_NK, dtype)
    whole_TN = linear_deterministic.linear(x_TK, weight)
    exact_TN = x_TK.double() @ stored(weight_NK, dtype).T
    assert whole_TN.dtype == torch.float32
    # x and value * scale are rounded to bf16.
    assert error(whole_TN, exact_TN) <= (1e-6 if dtype == torch.float32 else torch.finfo(torch.bfloat16).eps)
    for first, last in [(69, 70), (3, 40)]:
        assert same_bits(linear_deterministic.linear(x_TK[first:last], weight), whole_TN[first:last])
    for ranks in (2, 4, 8) if dtype not in QUANTIZED else (4,):
        parts = [linear_deterministic.linear(x_TK[:2, cols], part) for cols, part in shards(weight_NK, dtype, ranks)]
        assert same_bits(reference._tree(parts), whole_TN[:2])


def test_the_order_of_sums_is_what_makes_ranks_agree() -> None:
    """The control: the fast kernel's sums of shards are not its sum of the whole."""
    x_TK, weight_NK = normal(16, 1100).bfloat16(), normal(34, 1100, seed=1)
    whole_TN = layers.linear(x_TK.float(), packed(OPS, weight_NK, torch.float32))
    parts = [layers.linear(x_TK[:, cols].float(), part) for cols, part in shards(weight_NK, torch.float32, 8)]
    assert not torch.equal(reference._tree(parts), whole_TN)


def test_deterministic_adds_the_bias_last_and_takes_no_tokens() -> None:
    x_TK, weight = normal(3, 64), packed(OPS, normal(5, 64, seed=1), torch.float32)
    plain_TN = linear_deterministic.linear(x_TK, weight)
    weight.bias = normal(5, seed=2)
    assert same_bits(linear_deterministic.linear(x_TK, weight), plain_TN + weight.bias)
    assert linear_deterministic.linear(x_TK[:0], weight).shape == layers.linear(x_TK[:0], weight).shape == (0, 5)


OVERLAP_PROGRAM = """
from tests.triton.compiling import compile_launches
from tests.triton.launches_linear import LAUNCHES
names = ("decode layer, bf16", "decode layer, int4", "decode layer of 1, fp8")
compile_launches({name: LAUNCHES[name] for name in names}, [80, 90])
"""


def test_programs_wait_for_the_kernel_before_them_with_weights_under_way(tmp_path: Path) -> None:
    """From compute capability 9.0 on. Weights are what is loaded evict_first, and of quantised ones prefetched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", OVERLAP_PROGRAM], cwd=root, env=environment, check=True)
    waiting: set[str] = set()
    for path in tmp_path.rglob("*.ptx"):
        text = path.read_text("utf-8")
        memory = re.findall(r"(?:ld|st|atom|prefetch|red)\.global\S*|griddepcontrol\.\w+", text)
        if ".target sm_80" in text:
            assert not [access for access in memory if access.startswith("griddepcontrol")]
            continue
        waiting.add(path.stem)
        start, wait = memory.index("griddepcontrol.launch_dependents"), memory.index("griddepcontrol.wait")
        assert wait == start + 1 and start > 0
        assert all("evict_first" in access or access.startswith("prefetch") for access in memory[:start])
        assert [access for access in memory[wait:] if access.startswith("st.global")]
    assert waiting == {"gemv_kernel", "gemv_rope_kernel"}
