"""The CPU kernels give the same bits whatever the batch, threads, instruction set and tensor-parallel degree."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_infer.dispatch.selfcheck_inputs import tokens_at
from megatron_infer.kernels.cpu import abi, native
from megatron_infer.ops import QUANTIZED, Heads, LayerKV, NormWeight, Rope, SingleOps, Stream, chunk_bounds
from tests.support.ops_cases import CPU, bounds_of, normal, packed, paged_case, same_bits

pytestmark = pytest.mark.skipif(not abi.LIBRARY.exists(), reason="the native library is not built")

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ["avx512", "avx2", "neon", "generic"]
DTYPES = [torch.float32, torch.bfloat16]
STORED = [*DTYPES, *QUANTIZED]
_KERNELS: dict[tuple[str, int], native.CpuKernels] = {}


def kernels(isa: str = "auto", threads: int = 1) -> native.CpuKernels:
    """One pool per setting for the whole file; skips what this CPU lacks."""
    key = (isa, threads)
    if key not in _KERNELS:
        try:
            _KERNELS[key] = native.CpuKernels(threads, isa)
        except abi.Unavailable as refusal:
            pytest.skip(str(refusal))
    return _KERNELS[key]


def settings() -> list[native.CpuKernels]:
    """Every variant of this CPU, with 1, 2 and 3 threads for the fastest."""
    found = [kernels("auto", 1), kernels("auto", 2), kernels("auto", 3)]
    for variant in VARIANTS:
        try:
            found.append(kernels(variant, 1))
        except pytest.skip.Exception:
            continue
    return found


def fused_multiply_add(a: float, b: float, c: float) -> float:
    """a * b + c rounded once to fp32: exact, then rounded to odd in fp64, so that the second rounding does no harm."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    value = np.float64(float(exact))
    if Fraction(float(value)) != exact and int(value.view(np.int64)) % 2 == 0:
        value = np.nextafter(value, np.inf if Fraction(float(value)) < exact else -np.inf)
    return float(np.float32(value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_linear_is_the_contract_to_the_bit(dtype: torch.dtype, chunks: int) -> None:
    x_TK, weight_NK, bias_N = normal(2, 75), normal(5, 75, seed=1).to(dtype), normal(5, seed=2)
    bounds = (*(75 * c // chunks for c in range(chunks)), 75)
    weight = packed(kernels(), weight_NK, dtype, bounds)
    weight.bias = bias_N
    y_TN = kernels().linear(x_TK, weight)
    for t, n in [(0, 0), (1, 4), (1, 2)]:
        sums = []
        for begin, end in pairwise(bounds):
            total = 0.0
            for k in range(begin, end):
                total = fused_multiply_add(float(x_TK[t, k]), float(weight_NK[n, k]), total)
            sums.append(np.float32(total))
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert float(y_TN[t, n]) == float(sums[0] + np.float32(bias_N[n]))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("out_dim", "in_dim"), [(1, 8), (37, 77), (16, 5), (130, 256), (300, 203), (0, 16)])
def test_linear_bits_do_not_depend_on_batch_threads_or_variant(dtype: torch.dtype, out_dim: int, in_dim: int) -> None:
    x_TK, weight_NK, bias_N = normal(33, in_dim), normal(out_dim, in_dim, seed=1), normal(out_dim, seed=2)
    weight = packed(kernels(), weight_NK, dtype)
    weight.bias = bias_N
    whole = kernels().linear(x_TK, weight)
    for ops in settings():
        again = packed(ops, weight_NK, dtype)
        assert torch.equal(again.data, weight.data)
        again.bias = bias_N
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 25, 33):
            first = 33 - tokens
            assert same_bits(ops.linear(x_TK[first:].contiguous(), again), whole[first:])


@pytest.mark.parametrize("dtype", STORED)
def test_linear_with_many_rows_is_the_sum_of_its_parts(dtype: torch.dtype) -> None:
    """More rows than one task takes, more panels than one task takes."""
    x_TK, weight_NK = normal(501, 72), normal(400, 72, seed=1)
    weight = packed(kernels(), weight_NK, dtype)
    whole = kernels("auto", 3).linear(x_TK, weight)
    parts = [kernels().linear(rows.contiguous(), weight) for rows in x_TK.split(29)]
    assert same_bits(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 14])
def test_linear_bits_do_not_depend_on_the_tensor_parallel_degree(dtype: torch.dtype, degree: int, tokens: int) -> None:
    ops, x_TK, weight_NK = kernels("auto", 2), normal(tokens, 203), normal(200, 203, seed=1)
    whole = ops.linear(x_TK, packed(ops, weight_NK, dtype))
    columns = [ops.linear(x_TK, packed(ops, rows, dtype)) for rows in weight_NK.split(200 // degree)]
    assert same_bits(torch.cat(columns, dim=1), whole)
    bounds, partial = bounds_of(203, dtype), []
    for rank in range(degree):
        own = bounds[rank * 8 // degree : (rank + 1) * 8 // degree + 1]
        weight = packed(ops, weight_NK[:, own[0] : own[-1]], dtype, tuple(bound - own[0] for bound in own))
        partial.append(ops.linear(x_TK[:, own[0] : own[-1]].contiguous(), weight))
    while len(partial) > 1:
        partial = [a + b for a, b in zip(partial[::2], partial[1::2], strict=True)]
    assert same_bits(partial[0], whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_panels_are_packed_like_single_rows(dtype: torch.dtype, source: torch.dtype) -> None:
    """Panels of 16 rows are transposed in blocks; rows one by one are not. Includes subnormals and infinities."""
    weight_NK = (normal(53, 2155) * torch.logspace(-8, 4, 2155)).to(source)
    weight_NK[20, 1000:1003] = torch.tensor([float("inf"), float("-inf"), 0.0], dtype=source)
    one_by_one = kernels().allocate_linear(53, 2155, chunk_bounds(2155), dtype, CPU)
    for n in range(53):
        kernels().pack_rows(one_by_one, n, weight_NK[n : n + 1])
    finite = torch.arange(53) != 20
    columns = kernels().linear(torch.eye(2155)[::97].contiguous(), one_by_one)
    assert torch.equal(columns.T[finite], weight_NK[finite, ::97].to(dtype).float())
    for ops in settings():
        assert torch.equal(packed(ops, weight_NK, dtype).data, one_by_one.data)


def test_another_order_of_addition_is_noticed() -> None:
    """The negative control: these comparisons can fail."""
    ops, x_TK, weight_NK = kernels(), normal(8, 1000), normal(96, 1000, seed=1)
    right = ops.linear(x_TK, packed(ops, weight_NK))
    assert not same_bits(ops.linear(x_TK, packed(ops, weight_NK, bounds=(0, 1000))), right)
    assert not same_bits(ops.linear(x_TK, packed(ops, weight_NK, bounds=(*range(0, 993, 124)[:8], 1000))), right)
    assert not same_bits(x_TK @ weight_NK.T, right)
    case = paged_case([(1, 600)])
    whole = ops.paged_attention(*case.arguments())
    case.kv = LayerKV(*(cache.nan_to_num() for cache in case.kv))
    flipped_SB = case.batch.block_tables_SB.flip(1).contiguous().clamp(max=case.kv.k.shape[0] - 1)
    case.batch = replace(case.batch, block_tables_SB=flipped_SB)
    assert not same_bits(ops.paged_attention(*case.arguments()), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(1, 16, 16), (2, 40, 4), (3, 8, 32), (8, 64, 16), (5, 18, 7)]
)
def test_attention_bits_do_not_depend_on_the_batch(
    dtype: torch.dtype, group: int, head_dim: int, block_size: int
) -> None:
    lengths = [(1, 600), (37, 37), (1, 1), (60, 300), (3, 256), (2, 257)]
    case = paged_case(
        lengths, num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    whole = kernels().paged_attention(*case.arguments())
    assert whole.isfinite().all()
    for ops in settings():
        assert same_bits(ops.paged_attention(*case.arguments()), whole)
    for s, (length, _) in enumerate(lengths):
        cuts = sorted({0, min(1, length), length // 3, length - 1, length})
        parts = [kernels("auto", 2).paged_attention(*case.part(s, a, b).arguments()) for a, b in pairwise(cuts)]
        assert same_bits(torch.cat(parts), whole[case.rows(s)])
    halves = [kernels().paged_attention(*case.heads(g, g + 1).arguments()) for g in range(2)]
    assert same_bits(torch.cat(halves, dim=1), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(1, 2100), (1, 513)], [(4, 514)], [(1, 256), (1, 1), (2, 1025)]])
def test_few_queries_over_long_contexts_are_shared_by_threads(dtype: torch.dtype, lengths: list) -> None:
    """One KV head and fewer rows than threads could take: each split of the context is a task of its own."""
    case = paged_case(lengths, num_heads=4, num_kv_heads=1, head_dim=24, dtype=dtype)
    whole = kernels("auto", 1).paged_attention(*case.arguments())
    assert same_bits(kernels("auto", 3).paged_attention(*case.arguments()), whole)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("lengths", [[(1, 30), (1, 300)], [(37, 37), (1, 1), (600, 700)]])
def test_half_a_layer_in_one_launch_is_the_single_ops(dtype: torch.dtype, lengths: list) -> None:
    heads, kv_heads, head_dim, dim, ffn = 4, 2, 24, 80, 96
    case = paged_case(lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    tokens = case.q_TNH.shape[0]
    x_TD, residual_TD = normal(tokens, dim), normal(tokens, dim, seed=1)
    norm = NormWeight(normal(dim, seed=2), 1e-5)
    angle = normal(800, head_dim // 2, seed=3)
    rope, shape = Rope(angle.cos(), angle.sin()), Heads(heads, kv_heads, case.scale)
    slots_T = torch.randperm(case.kv.k.shape[0] * case.kv.k.shape[2])[:tokens]
    batch = replace(case.batch, positions_T=torch.arange(tokens, dtype=torch.int32), slots_T=slots_T)
    for ops in settings():
        qkv, out = (
            packed(ops, normal(rows, cols, seed=4) / 9, dtype)
            for rows, cols in (((heads + 2 * kv_heads) * head_dim, dim), (dim, heads * head_dim))
        )
        qkv.bias = normal(qkv.out_dim, seed=5)
        for x in (x_TD, None):
            results = []
            for table in (ops, SingleOps(ops)):
                stream, kv = Stream(residual_TD.clone(), x), case.kv.clone()
                table.attention_layer(stream, norm, qkv, out, rope, batch, kv, shape, True)
                results.append([stream.pending_TD, stream.residual_TD, *(cache.nan_to_num() for cache in kv)])
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        gate_up, down = packed(ops, normal(2 * ffn, dim, seed=6) / 9, dtype), packed(ops, normal(dim, ffn) / 9, dtype)
        gate_up.bias = normal(2 * ffn, seed=7)
        whole, single = (Stream(residual_TD.clone(), x_TD) for _ in range(2))
        ops.feed_forward_layer(whole, norm, gate_up, down, True)
        SingleOps(ops).feed_forward_layer(single, norm, gate_up, down, True)
        assert same_bits(whole.pending_TD, single.pending_TD) and same_bits(whole.residual_TD, single.residual_TD)


def test_a_non_finite_row_spoils_no_other() -> None:
    ops = kernels("auto", 2)
    x_TK = normal(20, 64)
    clean = ops.linear(x_TK, weight := packed(ops, normal(48, 64, seed=1)))
    x_TK[7, 3] = float("inf")
    x_TK[7, 4] = float("nan")
    non_finite = ops.linear(x_TK, weight)
    assert non_finite[7].isnan().all()
    assert same_bits(non_finite[:7], clean[:7]) and same_bits(non_finite[8:], clean[8:])
    case = paged_case([(5, 300), (9, 9)])
    clean = ops.paged_attention(*case.arguments())
    case.q_TNH[3, 1, 0] = float("nan")
    non_finite = ops.paged_attention(*case.arguments())
    assert non_finite[3, 1].isnan().all()
    non_finite[3, 1] = clean[3, 1]
    assert same_bits(non_finite, clean)


@pytest.mark.parametrize("dim", [16, 100, 333])
def test_row_by_row_ops_do_not_depend_on_batch_threads_or_variant(dim: int) -> None:
    x_TD, norm = 10 * normal(200, dim), NormWeight(normal(dim, seed=1), 1e-5)
    logits_SV = normal(200, dim).round(decimals=1)
    logits_SV[3, dim - 1] = float("nan")
    expected = [kernels().rms_norm(x_TD, norm), kernels().silu_mul(torch.cat([x_TD, x_TD], 1))]
    values_S, indices_S = kernels().argmax(logits_SV)
    for ops in settings():
        actual = [ops.rms_norm(x_TD, norm), ops.silu_mul(torch.cat([x_TD, x_TD], 1))]
        assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
        assert same_bits(ops.rms_norm(x_TD[77:78], norm), expected[0][77:78])
        assert same_bits(ops.silu_mul(torch.cat([x_TD[77:78], x_TD[77:78]], 1)), expected[1][77:78])
        residual_TD = x_TD / 4
        assert same_bits(ops.add_rms_norm(0.75 * x_TD, residual_TD, norm)[:1], expected[0][:1]) == same_bits(
            residual_TD[:1], x_TD[:1]
        )
        again_values, again_indices = ops.argmax(logits_SV)
        assert same_bits(again_values, values_S) and torch.equal(again_indices, indices_S)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_bits_and_cache_do_not_depend_on_threads_or_variant(dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, tokens = 6, 3, 20, 70
    qkv_TC, angle = normal(tokens, 12 * head_dim), normal(100, head_dim // 2, seed=1)
    positions_T = torch.arange(tokens, dtype=torch.int32)
    slots_T = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:tokens]
    rope, batch, results = Rope(angle.cos(), angle.sin()), tokens_at(positions_T, slots_T), []
    for ops in settings():
        kv = LayerKV(*(torch.zeros(6, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2)))
        q_TNH = ops.rope_store_kv(qkv_TC, rope, batch, kv, Heads(heads, kv_heads, 1.0))
        results.append([q_TNH, kv.k.float(), kv.v.float()])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_exp_is_accurate_to_a_few_units_in_the_last_place() -> None:
    """Far from zero silu(-x) is -x e^-x, so its relative error is that of exp and two more roundings."""
    x = torch.linspace(0.0, 80.0, 40001)
    y = kernels().silu_mul(torch.stack([-x, torch.ones_like(x)]).T.contiguous())[:, 0].double()
    expected = -x.double() * (-x.double()).sigmoid()
    assert ((y - expected).abs() <= 3 * 2.0**-24 * expected.abs()).all()


GUARD_SCRIPT = """
import ctypes, mmap, sys, torch
from megatron_infer.kernels.cpu import native
from megatron_infer.ops import BatchView, LayerKV, NormWeight
from tests.support.ops_cases import QUANTIZED, normal, packed, paged_case, quantize
libc, held = ctypes.CDLL(None, use_errno=True), []

def guarded(tensor):
    # A copy whose last byte is followed by a page that must not be touched, and whose first one is preceded by another.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // 4096)
    area = mmap.mmap(-1, (pages + 1) * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(address + pages * 4096), ctypes.c_size_t(4096), 0) == 0
    held.append(area)
    start = pages * 4096 - size
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    copy.copy_(tensor)
    return copy

for variant in {variants!r}:
    ops = native.CpuKernels(2, variant)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, n, k in ((1, 33, 21), (13, 50, 77)):
            x, w, bias = normal(tokens, k), normal(n, k, seed=1).to(dtype), normal(n, seed=2)
            weight = packed(ops, w, dtype)
            weight.bias = bias
            expected = ops.linear(x, weight)
            weight.data.zero_()
            ops.pack_rows(weight, 0, guarded(w))
            weight.data, weight.bias = guarded(weight.data), guarded(bias)
            assert torch.equal(ops.linear(guarded(x), weight), expected)
        for head_dim, block_size in ((32, 16), (18, 7)):
            case = paged_case([(3, 21), (1, 1), (9, 280)], head_dim=head_dim, block_size=block_size, dtype=dtype)
            expected = ops.paged_attention(*case.arguments())
            assert expected.isfinite().all()
            fields = vars(case.batch).items()
            batch = BatchView(**{{name: guarded(a) if isinstance(a, torch.Tensor) else a for name, a in fields}})
            kv = LayerKV(guarded(case.kv.k), guarded(case.kv.v))
            assert torch.equal(ops.paged_attention(guarded(case.q_TNH), batch, kv, case.scale), expected)
        table, ids = guarded(normal(5, 19).to(dtype)), guarded(torch.tensor([4, 0]))
        assert torch.equal(ops.gather_rows(table, ids), table[ids].float())
    for dtype, tokens in ((d, t) for d in QUANTIZED for t in (1, 13, 60)):
        x, weight = normal(tokens, 77), packed(ops, normal(50, 77, seed=1), dtype)
        expected = ops.linear(x, weight)
        values, scales = quantize(normal(50, 77, seed=1), dtype)
        weight.data.zero_()
        ops.pack_quantized(weight, 0, guarded(values), guarded(scales))
        weight.data = guarded(weight.data)
        assert torch.equal(ops.linear(guarded(x), weight), expected)
    x, norm = normal(3, 37), NormWeight(normal(37), 1e-5)
    guarded_norm = NormWeight(guarded(norm.weight_D), 1e-5)
    assert torch.equal(ops.rms_norm(guarded(x), guarded_norm), ops.rms_norm(x, norm))
    assert torch.equal(ops.silu_mul(guarded(normal(3, 38))), ops.silu_mul(normal(3, 38)))
    assert torch.equal(ops.argmax(guarded(x))[1], x.argmax(dim=1))
print("unharmed")
"""


def test_nothing_is_read_past_the_end_of_a_tensor() -> None:
    """Each tensor ends right before an inaccessible page, in a process of its own because a fault would kill it."""
    variants = sorted({ops.isa for ops in settings()})
    script = GUARD_SCRIPT.format(variants=variants)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "unharmed", (done.returncode, done.stderr[-2000:])


def test_ops_of_several_threads_take_turns_and_pools_are_independent() -> None:
    x_TK, weight_NK = normal(5, 256), normal(512, 256, seed=1)
    one, three = native.CpuKernels(1), native.CpuKernels(3)
    weight = packed(one, weight_NK)
    expected = one.linear(x_TK, weight)

    def many(ops: native.CpuKernels) -> bool:
        return all(same_bits(ops.linear(x_TK, weight), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(many, [one, three, three, one]))


def test_threads_start_with_the_pool_and_end_with_it() -> None:
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads through /proc")
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    single, triple = native.CpuKernels(1), native.CpuKernels(3)
    assert len(os.listdir("/proc/self/task")) == before + 2
    del single, triple
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_without_the_parents_threads() -> None:
    ops, x_TK = native.CpuKernels(3), normal(5, 256)
    weight = packed(ops, normal(512, 256, seed=1))
    expected = ops.linear(x_TK, weight)
    assert threading.active_count() >= 1
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(ops.linear(x_TK, weight), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_bits(ops.linear(x_TK, weight), expected)


def test_a_build_without_a_compiler_says_so_and_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found; install g++" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(abi.Unavailable, match="sse9"):
        native.CpuKernels(1, "sse9")
    ops = kernels()
    with pytest.raises(ValueError, match="set dtype to bfloat16"):
        ops.allocate_linear(4, 4, chunk_bounds(4), torch.float16, CPU)
    with pytest.raises(AssertionError):
        ops.linear(normal(2, 5), packed(ops, normal(3, 4)))
    case = paged_case([(1, 1)], num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="3 heads over 2 KV heads"):
        ops.paged_attention(*case.arguments())


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "kernels.h"
    header.write_bytes(abi.HEADER.read_bytes() + b"\n")
    with monkeypatch.context() as patch:
        patch.setattr(abi, "HEADER", header)
        with pytest.raises(abi.Unavailable, match=r"built from other sources.*pip install -e"):
            abi.load_library()
    with monkeypatch.context() as patch:
        patch.setattr(abi, "LINEAR", abi.Op("linear", y_TN="P"))
        with pytest.raises(abi.Unavailable, match=r"linear takes other arguments.*pip install -e"):
            native.CpuKernels(1)
    monkeypatch.setattr(abi, "LIBRARY", tmp_path / "empty.so")
    abi.LIBRARY.touch()
    with pytest.raises(abi.Unavailable, match="does not load"):
        abi.load_library()
