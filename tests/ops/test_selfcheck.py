"""A kernel with a fault is found before it is used, and an honest one is not suspected.

The faults are built into torch's own ops, one at a time, each as kernels have them: one element wrong, one class of
token counts, a tile left out, a slot read that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_infer.dispatch.selfcheck import TOKENS, find_faults
from megatron_infer.dispatch.selfcheck_inputs import CheckInputs as Inputs
from megatron_infer.dispatch.selfcheck_inputs import CheckShape
from megatron_infer.ops import INT4, OP_NAMES, LayerKV, Ops
from megatron_infer.ops.fp8 import FP8
from megatron_infer.ops.reference import ReferenceOps
from megatron_infer.ops.vendor import VendorOps
from tests.support.ops_cases import CPU, changed

SHAPE = CheckShape(
    hidden_size=64, intermediate_size=208, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=83, block_size=16, tp=1,
    dtype=torch.float32, kv_dtype=torch.float32, linear_dtype=torch.float32, head_dtype=torch.float32,
)  # fmt: skip
VENDOR = VendorOps()


def shape_of(dtype: torch.dtype, linear: torch.dtype, head: torch.dtype, tp: int = 1) -> CheckShape:
    return replace(SHAPE, dtype=dtype, kv_dtype=dtype, linear_dtype=linear, head_dtype=head, tp=tp)


def fault_of(candidate: Ops, shape: CheckShape = SHAPE, *, deterministic: bool = False) -> str | None:
    return first_fault(candidate, CPU, shape, deterministic=deterministic)


def first_fault(candidate: Ops, device: torch.device = CPU, shape: CheckShape = SHAPE, **options) -> str | None:
    """The reason of the first one."""
    fault = next(find_faults(candidate, VENDOR, device, shape, **options), None)
    return None if fault is None else fault.reason


class HonestOps(VendorOps):
    """Half a layer that adds what it may add."""

    def attention_layer(self, stream, norm, qkv, out, rope, batch, kv, heads, completes_sum) -> None:
        VENDOR.attention_layer(stream, norm, qkv, out, rope, batch, kv, heads, completes_sum)
        if completes_sum:
            stream.settle()

    def feed_forward_layer(self, stream, norm, gate_up, down, completes_sum) -> None:
        VENDOR.feed_forward_layer(stream, norm, gate_up, down, completes_sum)
        if completes_sum:
            stream.settle()


HONEST = HonestOps()
BF16 = torch.bfloat16
FORMATS = [
    (torch.float32, torch.float32, torch.float32, 1),
    (BF16, BF16, BF16, 1),
    (BF16, torch.int8, torch.int8, 2),
    (BF16, INT4, torch.int8, 4),
    (BF16, FP8, BF16, 1),
]


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_an_honest_table_passes_in_every_weight_format(formats) -> None:
    assert fault_of(HONEST, shape_of(*formats)) is None


@pytest.mark.parametrize("formats", [(BF16, BF16, BF16), (torch.float32, torch.int8, torch.int8)], ids=str)
def test_another_honest_implementation_passes(formats, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions, which sum in another order and round activations beside int8 weights; deterministic, too."""
    monkeypatch.setattr("megatron_infer.dispatch.selfcheck.BATCHES", ([(1, 1)], [(1, 40), (5, 9), (3, 300)]))
    assert fault_of(ReferenceOps(), shape_of(*formats), deterministic=True) is None


def one_off(y: Tensor) -> Tensor:
    """The last value of the last row is a tenth of the largest away from where it should be."""
    y = y.clone()
    y.view(-1)[-1] += (0.1 * y.abs().amax()).to(y.dtype) if y.dtype.is_floating_point else 1
    return y


def spoiled(name: str) -> Callable:
    op = getattr(HONEST, name)

    def run(*args):
        y = op(*args)
        if y is None:  # half a layer
            stream = args[0]
            stream.residual_TD = one_off(stream.settle())
            stream.pending_TD = torch.zeros_like(stream.residual_TD)
            return None
        return (one_off(y[0]), y[1]) if isinstance(y, tuple) else one_off(y)

    return run


@pytest.mark.parametrize("name", [*OP_NAMES[3:], "attention_layer", "feed_forward_layer"])
def test_one_wrong_value_in_any_op_is_found(name: str) -> None:
    fault = fault_of(changed(HonestOps, **{name: spoiled(name)}))
    assert fault is not None and fault.startswith(f"{name} of ") and " differs from " in fault and "on cpu" in fault


def test_wrongly_packed_weights_are_found() -> None:
    """Each through the products that it spoils."""

    def allocate(out_dim, in_dim, chunk_bounds, dtype, device):
        return VENDOR.allocate_linear(out_dim + 1, in_dim, chunk_bounds, dtype, device)

    def shifted(pack: Callable) -> Callable:
        return lambda packed, start, *rows: pack(packed, max(0, start - 1), *rows)

    quantized = shape_of(BF16, torch.int8, torch.int8)
    for shape, changes in (
        (SHAPE, {"allocate_linear": allocate}),
        (SHAPE, {"pack_rows": shifted(VENDOR.pack_rows)}),
        (quantized, {"pack_quantized": shifted(VENDOR.pack_quantized)}),
    ):
        fault = fault_of(changed(HonestOps, **changes), shape)
        assert fault is not None and fault.startswith("linear ")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17])
def test_a_fault_of_one_class_of_token_counts_is_found(tokens: int) -> None:
    def linear(x_TK, packed):
        y_TN = VENDOR.linear(x_TK, packed)
        return one_off(y_TN) if len(x_TK) == tokens else y_TN

    assert f"linear of {tokens} tokens" in str(fault_of(changed(HonestOps, linear=linear)))


def blind_to(first: int, last: int) -> Callable:
    """Attention that leaves out the keys first .. last of longer contexts."""

    def attention(q, batch, kv, scale):
        k_cache, block = kv.k.clone(), kv.k.shape[2]
        starts, contexts, tables = batch.query_start_S1, batch.context_lens_S, batch.block_tables_SB
        for s in range(len(contexts)):
            if int(contexts[s]) >= last:
                k_cache[tables[s, first // block : last // block].long()] = -1e4 * torch.sign(q[starts[s], :1, None])
        return VENDOR.paged_attention(q, batch, LayerKV(k_cache, kv.v), scale)

    return attention


def acausal(q, batch, kv, scale):
    if batch.max_query_len <= 100:
        return VENDOR.paged_attention(q, batch, kv, scale)
    parts = []
    for s, context in enumerate(batch.context_lens_S.tolist()):
        row = slice(*batch.query_start_S1[s : s + 2].tolist())
        # Every query at the last position: as a batch of single queries.
        count = row.stop - row.start
        single = replace(
            batch,
            block_tables_SB=batch.block_tables_SB[s : s + 1].repeat(count, 1),
            context_lens_S=torch.full((count,), context, dtype=torch.int32),
            query_start_S1=torch.arange(count + 1, dtype=torch.int32),
            max_query_len=1,
        )
        parts.append(VENDOR.paged_attention(q[row], single, kv, scale))
    return torch.cat(parts)


def unmasked(q, batch, kv, scale):
    """Reads to the end of the last block, where nobody wrote."""
    block = kv.k.shape[2]
    rounded = (batch.context_lens_S + block - 1) // block * block
    return VENDOR.paged_attention(q, replace(batch, context_lens_S=rounded), kv, scale)


@pytest.mark.parametrize("attention", [blind_to(896, 1024), acausal, unmasked], ids=["tile", "causal", "unwritten"])
def test_faults_of_attention_are_found(attention: Callable) -> None:
    fault = fault_of(changed(HonestOps, paged_attention=attention))
    assert fault is not None and fault.startswith("paged_attention of queries and contexts")


def test_a_cache_written_beside_its_slots_is_found() -> None:
    def rope_store_kv(qkv_TC, rope, batch, kv, heads):
        q_TNH = VENDOR.rope_store_kv(qkv_TC, rope, batch, kv, heads)
        kv.k.view(-1)[0] += 1
        return q_TNH

    fault = fault_of(changed(HonestOps, rope_store_kv=rope_store_kv))
    assert fault is not None and "rope_store_kv of" in fault and "(keys)" in fault


def test_layers_that_break_their_contract_are_found() -> None:
    def eager(*args):
        HONEST.feed_forward_layer(*args[:-1], True)

    fault = fault_of(changed(HonestOps, feed_forward_layer=eager))
    assert "AssertionError: partial sums were added to the residual" in str(fault)

    def forgetful(*args):
        HONEST.attention_layer(*args)
        if args[-1]:
            args[0].residual_TD.zero_()

    fault = fault_of(changed(HonestOps, attention_layer=forgetful))
    assert fault is not None and fault.startswith("attention_layer of") and "differs from its single ops'" in fault


def test_a_kernel_that_fails_is_a_fault_in_one_line_and_a_traceback() -> None:
    def silu_mul(gate_up_T2F):
        raise RuntimeError("no kernel image\nis available")

    assert fault_of(changed(HonestOps, silu_mul=silu_mul)) == "silu_mul fails on cpu: RuntimeError: no kernel image"
    (fault,) = (f for f in find_faults(changed(HonestOps, silu_mul=silu_mul), VENDOR, CPU, SHAPE) if f.op == "silu_mul")
    assert "no kernel image\nis available" in fault.details and "in silu_mul" in fault.details


def test_every_op_is_tried_whatever_was_wrong_before() -> None:
    faulty = changed(HonestOps, linear=spoiled("linear"), argmax=spoiled("argmax"))
    linear, argmax, *_ = find_faults(faulty, VENDOR, CPU, SHAPE)
    assert (linear.op, argmax.op) == ("linear", "argmax")
    told = linear.details.splitlines()
    assert told[0] == linear.reason and sum("(down)" in line for line in told) == len(TOKENS)


def test_bits_that_depend_on_the_batch_are_a_fault_of_deterministic_mode_only() -> None:
    def row_by_row(x_TK, packed):
        return torch.cat([VENDOR.linear(row, packed) for row in x_TK.split(1)])

    def linear(x_TK, packed):
        y_TN = row_by_row(x_TK, packed)
        return torch.nextafter(y_TN, torch.tensor(9.0)) if len(x_TK) == 5 else y_TN

    mended = changed(VendorOps, linear=row_by_row)
    assert first_fault(mended, names=("linear",), deterministic=True) is None
    assert "differs from its rows alone" in str(fault_of(changed(VendorOps, linear=linear), deterministic=True))
    assert fault_of(changed(VendorOps, linear=linear)) is None

    exact = ReferenceOps()
    for sloppy, whose in ((3, "its last queries alone"), (1, "its sequences alone")):

        def attention(*args, sloppy=sloppy):
            o_TNH = exact.paged_attention(*args)
            counts = (args[1].max_query_len, len(args[1].context_lens_S))
            return torch.nextafter(o_TNH, torch.tensor(9.0)) if sloppy in counts else o_TNH

        batch = [(3, 9)] if sloppy == 3 else [(2, 3), (2, 9)]
        names = ("paged_attention",)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_infer.dispatch.selfcheck.BATCHES", (batch,))
            assert first_fault(exact, names=names, deterministic=True) is None
            faulty = changed(ReferenceOps, paged_attention=attention)
            fault = first_fault(faulty, names=names, deterministic=True)
        assert fault is not None and whose in fault


def test_only_the_named_ops_are_run_and_nobody_elses_random_numbers_change() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    faulty = changed(HonestOps, linear=spoiled("linear"), silu_mul=spoiled("silu_mul"))
    assert "silu_mul" in str(first_fault(faulty, names=("silu_mul",)))
    assert first_fault(faulty, names=("rms_norm", "argmax")) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lost_gpu_is_not_mistaken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access torch's kernels would fail as well: there is nothing to fall back on."""

    def lost(*args):
        raise RuntimeError("an illegal memory access was encountered")

    # The inputs must be drawn on this machine; only what is asked of the device afterwards is acted.
    device = type("Device", (), {"type": "cuda", "__str__": lambda self: "cuda:0"})()
    monkeypatch.setattr("megatron_infer.dispatch.selfcheck.CheckInputs", lambda _, *rest: Inputs(CPU, *rest))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match=r"the kernel of rms_norm left cuda:0 unusable .* with ops='vendor'"):
        first_fault(changed(HonestOps, rms_norm=lost), device, names=("rms_norm",))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    fault = first_fault(changed(HonestOps, rms_norm=lost), device, names=("rms_norm",))
    assert fault == "rms_norm fails on cuda:0: RuntimeError: an illegal memory access was encountered"
