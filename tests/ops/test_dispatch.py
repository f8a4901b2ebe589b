"""The choice of ops on a GPU: its order, what may refuse a candidate, and packages that replace single ops.

There is no GPU here: torch.cuda is made to answer as if there were, and ops are checked on the CPU. The packages are
fakes in sys.modules that do what their documentation says in plain torch and check what they are given strictly; the
real ones have not been run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_infer.dispatch import select as dispatch
from megatron_infer.dispatch.select import select_ops
from megatron_infer.dispatch.selfcheck import Fault, find_faults
from megatron_infer.dispatch.selfcheck_inputs import CheckInputs, CheckShape
from megatron_infer.ops import OP_NAMES, BatchView, LayerKV, NormWeight, Ops, Stream
from megatron_infer.ops.optional import ApexOps, FlashAttentionOps
from megatron_infer.ops.vendor import VendorOps
from tests.support.ops_cases import CPU, Paged, attention_float64, changed, normal, packed, paged_case

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
SHAPE = CheckShape(
    hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=80, block_size=16, tp=1,
    dtype=BF16, kv_dtype=BF16, linear_dtype=BF16, head_dtype=BF16,
)  # fmt: skip
VENDOR = VendorOps()


class FakeTritonOps(VendorOps):
    is_recordable = True


@dataclass
class Machine:
    """What seems to be there."""

    monkeypatch: pytest.MonkeyPatch
    capability: tuple[int, int] = (9, 0)

    def install(self, name: str, **functions: object) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        self.monkeypatch.setitem(sys.modules, name, module)

    def offer(self, **ops: Callable) -> None:
        """Let the Triton kernels be torch's ops but for these."""

        def make(num_sms: int, device: torch.device) -> Ops:
            return changed(FakeTritonOps, **ops)

        module = SimpleNamespace(TritonOps=make, DeterministicTritonOps=make)
        self.monkeypatch.setitem(sys.modules, "megatron_infer.dispatch.triton_ops", module)
        self.monkeypatch.setattr("megatron_infer.dispatch.triton_ops", module, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: sys.modules[name].__spec__ if name in sys.modules else None)

    def on_the_cpu(candidate: Ops, trusted: Ops, device: torch.device, shape: CheckShape, **options) -> Iterator[Fault]:
        assert device == CUDA
        return find_faults(candidate, trusted, CPU, shape, **options)

    monkeypatch.setattr(dispatch, "find_faults", on_the_cpu)
    found.install("triton")
    found.offer()
    return found


def lines(**options) -> dict[str, str]:
    """Op -> the report of its choice."""
    report = select_ops(CUDA, num_threads=1, **options).report
    return dict(line.split(": ", 1) for line in report)


def test_on_a_gpu_triton_comes_first(machine: Machine) -> None:
    for options in ({}, {"shape": SHAPE}, {"force": "triton", "shape": SHAPE}):
        report = lines(**options)
        assert list(report) == list(OP_NAMES)
        assert all(line.startswith("triton (sm_90, 132 SMs)") for line in report.values())
    assert report["linear"] == "triton (sm_90, 132 SMs)"
    assert select_ops(CUDA, num_threads=1).is_recordable
    assert lines(deterministic=True)["linear"].startswith("triton (sm_90, 132 SMs, deterministic); native refused")


def test_a_faulty_op_costs_that_op(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.offer(silu_mul=lambda gate_up: VENDOR.silu_mul(gate_up) * 1.1)
    ops = select_ops(CUDA, num_threads=1, force="triton", shape=SHAPE)
    report = dict(line.split(": ", 1) for line in ops.report)
    reason = "silu_mul of 1 tokens differs from torch's by 9.9e-02"
    assert report.pop("silu_mul").startswith(f"vendor (torch); triton refused: {reason}")
    assert all(line.startswith("triton (sm_90, 132 SMs)") for line in report.values())
    assert ops.chosen == "triton" and ops.is_recordable
    assert torch.equal(ops.silu_mul(gate_up := normal(2, 16)), VENDOR.silu_mul(gate_up))
    assert reason in caplog.text and "silu_mul of 130 tokens differs" in caplog.text
    # Unchecked, for whoever wants to see the fault.
    assert lines(force="triton")["silu_mul"].startswith("triton")


def test_linear_layers_go_together(machine: Machine) -> None:
    """Torch's product knows only torch's layout of weights, and what fuses products knows only its own."""
    machine.offer(linear=failing, feed_forward_layer=forgetful)
    ops = select_ops(CUDA, num_threads=1, shape=SHAPE)
    whose = {line.partition(": ")[0]: line.partition(": ")[2].partition(" ")[0] for line in ops.report}
    theirs = {"allocate_linear", "pack_rows", "pack_quantized", "linear"}
    assert {name for name, who in whose.items() if who == "vendor"} == theirs
    x_TK, weight = normal(3, 64), packed(VENDOR, normal(64, 64, seed=1))
    assert torch.equal(ops.linear(x_TK, weight), VENDOR.linear(x_TK, weight))
    norm, gate_up, down = NormWeight(torch.ones(64), 1e-5), packed(ops, normal(48, 64)), packed(ops, normal(64, 24))
    mine, expected = Stream(x_TK.clone()), Stream(x_TK.clone())
    ops.feed_forward_layer(mine, norm, gate_up, down, True)
    VENDOR.feed_forward_layer(expected, norm, gate_up, down, True)
    assert torch.equal(mine.settle(), expected.settle())


def test_without_attention_of_its_own_no_step_is_recorded(machine: Machine) -> None:
    """Torch's reads lengths on the host."""
    machine.offer(paged_attention=failing)
    ops = select_ops(CUDA, num_threads=1, shape=SHAPE)
    assert ops.chosen == "triton" and not ops.is_recordable


def test_a_table_with_faulty_products_and_attention_is_refused(machine: Machine) -> None:
    machine.offer(linear=failing, paged_attention=failing)
    report = lines(shape=SHAPE)
    assert all(line.startswith("vendor (torch); native refused") for line in report.values())
    assert "; triton refused: linear fails on cpu: RuntimeError: no kernel image" in report["silu_mul"]
    with pytest.raises(ValueError, match="triton ops cannot be used on cuda:0: linear fails on cpu"):
        select_ops(CUDA, num_threads=1, force="triton", shape=SHAPE)


def failing(*_: object) -> None:
    raise RuntimeError("no kernel image\nis available")


def forgetful(stream: Stream, *rest: object) -> None:
    stream.pending_TD = torch.zeros_like(stream.residual_TD)


def test_layer_ops_are_checked_too(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.offer(feed_forward_layer=forgetful)
    ops = select_ops(CUDA, num_threads=1, shape=SHAPE)
    assert all(": triton (sm_90" in line for line in ops.report), "single ops are made a layer of"
    assert ops.feed_forward_layer.func is Ops.feed_forward_layer  # type: ignore[attr-defined]
    assert "feed_forward_layer of 1 tokens" in caplog.text


def test_deterministic_refuses_what_depends_on_the_batch(machine: Machine) -> None:
    machine.offer(linear=lambda x, packed: VENDOR.linear(x, packed) * (1 + 1e-6 * (len(x) > 1)))
    shape = replace(SHAPE, dtype=torch.float32, kv_dtype=torch.float32, linear_dtype=torch.float32)
    assert lines(shape=shape)["linear"].startswith("triton")
    report = lines(shape=shape, deterministic=True)["linear"]
    assert report.startswith("reference") and "differs from its rows alone" in report
    assert "vendor refused: its bits depend on the batch" in report


def test_refusals_say_why(machine: Machine) -> None:
    machine.capability = (7, 5)
    report = lines()["linear"]
    assert report.startswith("vendor") and "triton refused: needs compute capability 8.0, this GPU has 7.5" in report
    machine.capability = (8, 0)
    machine.monkeypatch.delitem(sys.modules, "triton")
    assert "triton refused: triton is not installed" in lines()["linear"]
    with pytest.raises(ValueError, match="triton ops cannot be used on cpu: runs on CUDA, not on cpu"):
        select_ops(CPU, num_threads=1, force="triton")


# Packages that replace single ops


def fake_flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
) -> Tensor:  # fmt: skip
    """FlashAttention 3's signature and the checks of its mha_fwd, over float64 attention."""
    assert q.dtype == k_cache.dtype == v_cache.dtype and q.dtype in (BF16, torch.float16)
    assert q.ndim == 3 and q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    num_kv_heads, head_dim = k_cache.shape[2:]
    assert v_cache.shape == k_cache.shape and q.shape[2] == head_dim and head_dim % 8 == 0
    assert q.shape[1] % num_kv_heads == 0
    for index in (page_table, cu_seqlens_q, cache_seqlens):
        assert index.dtype == torch.int32 and index.stride(-1) == 1
    assert cu_seqlens_q.is_contiguous() and cache_seqlens.is_contiguous()
    assert page_table.shape[0] == len(cache_seqlens) == len(cu_seqlens_q) - 1
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert causal and isinstance(softmax_scale, float)
    unread = torch.empty(0)
    batch = BatchView(unread, unread, unread, cu_seqlens_q, cache_seqlens, page_table, max_seqlen_q)
    kv = LayerKV(k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    return attention_float64(Paged(q, batch, kv, softmax_scale)).to(q.dtype)


def fake_rms_forward_affine_mixed_dtypes(input, normalized_shape, weight, epsilon) -> tuple[Tensor, Tensor]:
    """apex' signature and checks; the result has the weight's dtype, the second is 1 / sqrt(mean square) in fp32."""
    assert input.is_contiguous() and weight.is_contiguous()
    assert isinstance(normalized_shape, list) and normalized_shape == list(weight.shape) == [input.shape[-1]]
    inverse = (input.float().square().mean(dim=-1) + epsilon).rsqrt()
    return (input.float() * inverse[:, None]).to(weight.dtype) * weight, inverse


def without_triton(machine: Machine) -> None:
    machine.monkeypatch.delitem(sys.modules, "triton")


def test_flash_attention_attends_as_defined() -> None:
    case = paged_case([(3, 40), (1, 17), (20, 20)], head_dim=16, dtype=BF16)
    case.q_TNH = case.q_TNH.bfloat16()
    o_TNH = FlashAttentionOps(VENDOR, fake_flash_attn_with_kvcache).paged_attention(*case.arguments())
    assert o_TNH.shape == case.q_TNH.shape and o_TNH.dtype == BF16
    assert (o_TNH.double() - attention_float64(case)).abs().max() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_apex_norms_as_defined(dtype: torch.dtype) -> None:
    x_TD, residual_TD = normal(5, 64).to(dtype), normal(5, 64, seed=1).to(dtype)
    norm = NormWeight(1 + normal(64, seed=2), 1e-5)
    ops = ApexOps(VENDOR, fake_rms_forward_affine_mixed_dtypes)
    y_TD = ops.rms_norm(x_TD, norm)
    assert y_TD.dtype == dtype and torch.allclose(y_TD, VENDOR.rms_norm(x_TD, norm), rtol=2.0**-7)
    mine, theirs = residual_TD.clone(), residual_TD.clone()
    y_TD = ops.add_rms_norm(x_TD, mine, norm)
    assert torch.allclose(y_TD, VENDOR.add_rms_norm(x_TD, theirs, norm), rtol=2.0**-7)
    assert torch.equal(mine, theirs)


def test_installed_packages_replace_single_ops_of_torchs_table(machine: Machine) -> None:
    without_triton(machine)
    machine.install("flash_attn_interface", flash_attn_with_kvcache=fake_flash_attn_with_kvcache)
    machine.install("fused_layer_norm_cuda", rms_forward_affine_mixed_dtypes=fake_rms_forward_affine_mixed_dtypes)
    ops = select_ops(CUDA, num_threads=1, shape=SHAPE)
    report = dict(line.split(": ", 1) for line in ops.report)
    assert report.pop("paged_attention").startswith("flash-attn (version 3); native refused")
    for name in ("rms_norm", "add_rms_norm"):
        assert report.pop(name).startswith("apex (fused RMSNorm); native refused")
    assert all(line.startswith("vendor (torch)") for line in report.values())
    assert type(ops).attention_layer is Ops.attention_layer, "the halves of a layer are made of them, too"
    x_TK, weight = normal(3, 64), packed(VENDOR, normal(8, 64, seed=1))
    assert torch.equal(ops.linear(x_TK, weight), VENDOR.linear(x_TK, weight))
    assert ops.is_recordable, "the table's padding is not read"
    arguments = (*CheckInputs(CPU, SHAPE, BF16).paged([(2, 30), (1, 7)]), 0.25)
    o_TNH = ops.paged_attention(*arguments)
    assert (o_TNH - VENDOR.paged_attention(*arguments)).abs().max() <= 2e-2


def test_without_them_everything_is_torchs(machine: Machine) -> None:
    without_triton(machine)
    report = lines(shape=SHAPE)
    assert not select_ops(CUDA, num_threads=1, shape=SHAPE).is_recordable
    assert report["paged_attention"].startswith("vendor (torch); native refused")
    assert report["paged_attention"].endswith("; flash-attn refused: not installed")
    assert report["rms_norm"].endswith("; apex refused: not installed")
    assert "apex" not in report["linear"] and "flash-attn" not in report["linear"]


@pytest.mark.parametrize(
    ("installed", "change", "capability", "reason"),
    [
        ("flash_attn", {}, (9, 0), "version 2 takes pages of multiples of 256 tokens, the cache has blocks of 16"),
        ("flash_attn_interface", {}, (10, 0), "version 3 has kernels for compute capability 8 and 9, .* has 10.0"),
        ("flash_attn_interface", {"kv_dtype": torch.float32}, (9, 0), "takes q and cache in bfloat16, not .*float32"),
        ("flash_attn_interface", {}, (9, 0), "cannot be loaded: .*flash_attn_with_kvcache"),
    ],
)
def test_flash_attention_is_refused_where_it_does_not_fit(
    machine: Machine, installed: str, change, capability: tuple[int, int], reason: str
) -> None:
    without_triton(machine)
    machine.install(installed)
    machine.capability = capability
    report = lines(shape=replace(SHAPE, **change))["paged_attention"]
    assert report.startswith("vendor")
    assert re.search(f"; flash-attn refused: {reason}", report), report


def test_a_package_must_prove_itself_too(machine: Machine) -> None:
    without_triton(machine)

    def stale(*args, **options):
        """An older release, without one of the arguments."""
        raise TypeError("unexpected keyword argument 'page_table'")

    def doubled(*args):
        y_TD, inverse_T = fake_rms_forward_affine_mixed_dtypes(*args)
        return y_TD * 2, inverse_T

    machine.install("flash_attn_interface", flash_attn_with_kvcache=stale)
    machine.install("fused_layer_norm_cuda", rms_forward_affine_mixed_dtypes=doubled)
    report = lines(shape=SHAPE)
    assert "; flash-attn refused: paged_attention fails on cpu: TypeError: unexpected" in report["paged_attention"]
    assert "; apex refused: rms_norm of 1 tokens differs from torch's by 1.0e+00" in report["rms_norm"]
    assert all(line.startswith("vendor") for line in report.values())


def test_apex_without_its_extension_is_refused(machine: Machine) -> None:
    without_triton(machine)
    machine.install("apex")
    assert lines(shape=SHAPE)["add_rms_norm"].endswith("; apex refused: built without its CUDA extensions")


def test_packages_do_not_replace_what_triton_fuses_or_determinism_needs(machine: Machine) -> None:
    machine.install("flash_attn_interface", flash_attn_with_kvcache=fake_flash_attn_with_kvcache)
    report = lines(shape=SHAPE)["paged_attention"]
    assert report.startswith("triton")
    assert report.endswith(
        "; flash-attn refused: it replaces ops of vendor, not of triton, whose layers call no other package"
    )
    without_triton(machine)
    report = lines(shape=SHAPE, deterministic=True)["paged_attention"]
    assert report.startswith("reference")
    assert report.endswith("; flash-attn refused: its bits depend on the batch, and deterministic is set")
