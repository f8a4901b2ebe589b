"""Each kernel of a step by itself: GB/s of every linear layer and format, attention, prefill, dependent launch.

Where a whole step misses its goal, this says where. Weights and caches are taken in turn, so that none is still in the
L2 cache when it is read again; on a GPU a round of them is one CUDA graph, so that the host's time does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.ceilings import seconds_of
from benchmarks.gpu.engine import without_dependent_launch
from benchmarks.gpu.precompile import shape_of
from benchmarks.gpu.workload import Workload
from megatron_infer.dispatch.select import select_ops
from megatron_infer.dispatch.selfcheck_inputs import CheckInputs
from megatron_infer.ops import Ops, PackedLinear, Stream

Call = Callable[[], object]
_REPEATS = 8


def measure(work: Workload, device: torch.device, quantization: str) -> dict[str, Any]:
    """Of one weight format; attention with the plain one.

    Kernels are measured as they are, whether or not the self-check would take them.
    """
    ops = select_ops(device, num_threads=1, force="triton" if device.type == "cuda" else "native")
    inner = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = CheckInputs(device, shape_of(work.model, quantization), inner)
    figures: dict[str, Any] = {
        "weights": quantization,
        "linear": list(_linear(ops, inputs, work)),
        "layers": list(_layers(ops, inputs, work)),
    }
    if quantization == "none":
        figures["attention"] = list(_attention(ops, inputs, work))
        figures["prefill_attention"] = [_prefill(ops, inputs, work, tokens) for tokens in work.prefills]
    return figures


def seconds_in_turn(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds of one call, of many that are made one after the other."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return seconds_of(all_of_them, device, _REPEATS) / len(calls)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        all_of_them()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            all_of_them()
        seconds = seconds_of(graph.replay, device, _REPEATS) / len(calls)
    del graph
    return seconds


def packed_bytes(packed: PackedLinear) -> int:
    """What reading the weight once reads, scales included."""
    layout = packed.layout
    scales = [getattr(layout, name, None) for name in ("scales_NG", "scales_N")]
    return packed.data.nbytes + sum(tensor.nbytes for tensor in scales if tensor is not None)


def _linear(ops: Ops, inputs: CheckInputs, work: Workload) -> Iterator[dict[str, Any]]:
    for name in inputs.linears():
        weights = inputs.packed(name, ops)
        weight, size = weights[0], packed_bytes(weights[0])
        while len(weights) * size < work.evicting_bytes:
            weights += inputs.packed(name, ops)
        for num_tokens in work.kernel_tokens:
            x_TK = inputs.normal(num_tokens, weight.in_dim, dtype=inputs.inner)
            seconds = seconds_in_turn([partial(ops.linear, x_TK, each) for each in weights], inputs.device)
            yield {
                "layer": name, "tokens": num_tokens, "rows": weight.out_dim, "columns": weight.in_dim,
                "microseconds": 1e6 * seconds, "gb_per_second": size / seconds / 1e9,
            }  # fmt: skip


def _layers(ops: Ops, inputs: CheckInputs, work: Workload) -> Iterator[dict[str, Any]]:
    """A decoder layer of one token in its few launches, with kernels that overlap and without."""
    size, layers = 0, []
    while len(layers) < 2 or len(layers) * size < work.evicting_bytes:
        layers.append([inputs.packed(name, ops)[0] for name in ("qkv", "out", "gate_up", "down")])
        size = sum(map(packed_bytes, layers[0]))
    context, norm, rope = work.contexts[0], inputs.norm_weight(), inputs.rope(work.max_model_len)
    _, batch, kv = inputs.paged([(1, context)])
    stream = Stream(inputs.normal(1, inputs.shape.hidden_size, dtype=inputs.inner))

    def layer(qkv: PackedLinear, out: PackedLinear, gate_up: PackedLinear, down: PackedLinear) -> None:
        ops.attention_layer(stream, norm, qkv, out, rope, batch, kv, inputs.heads, True)
        ops.feed_forward_layer(stream, norm, gate_up, down, True)

    switches = {"on": nullcontext, "off": without_dependent_launch}
    for name, switch in switches.items() if inputs.device.type == "cuda" else [("not there", nullcontext)]:
        with switch():
            seconds = seconds_in_turn([partial(layer, *each) for each in layers], inputs.device)
        yield {
            "dependent_launch": name, "context": context, "microseconds": 1e6 * seconds,
            "gb_per_second": size / seconds / 1e9,
        }  # fmt: skip


def _attention(ops: Ops, inputs: CheckInputs, work: Workload) -> Iterator[dict[str, Any]]:
    """Of one query per sequence: one sequence at every context, then batches."""
    shape = inputs.shape
    rows = [(1, context) for context in work.contexts] + [(batch, work.batch_context) for batch in work.batches]
    for sequences, context in rows:
        size = (
            2 * sequences * context * inputs.shape.num_kv_heads * inputs.shape.head_dim * inputs.shape.kv_dtype.itemsize
        )
        calls = []
        for _ in range(work.evicting_bytes // size + 1):
            q_TNH, batch, kv = inputs.paged([(1, context)] * sequences)
            # As wide as the engine has them: what is launched depends on it.
            tables_SB = batch.block_tables_SB.new_zeros(sequences, -(-work.max_model_len // shape.block_size))
            tables_SB[:, : batch.block_tables_SB.shape[1]] = batch.block_tables_SB
            batch = replace(batch, block_tables_SB=tables_SB)
            calls.append(partial(ops.paged_attention, q_TNH, batch, kv, inputs.heads.scale))
        seconds = seconds_in_turn(calls, inputs.device)
        yield {
            "batch": sequences, "context": context, "microseconds": 1e6 * seconds, "gb_per_second": size / seconds / 1e9
        }  # fmt: skip


def _prefill(ops: Ops, inputs: CheckInputs, work: Workload, tokens: int) -> dict[str, Any]:
    """The last chunk of a prompt."""
    queries = min(tokens, work.prefill_rows)
    q_TNH, batch, kv = inputs.paged([(queries, tokens)])
    call = partial(ops.paged_attention, q_TNH, batch, kv, inputs.heads.scale)
    seconds = seconds_in_turn([call], inputs.device)
    seen = queries * tokens - queries * (queries - 1) // 2
    flops = 4 * inputs.heads.num * inputs.shape.head_dim * seen
    return {
        "queries": queries, "context": tokens, "microseconds": 1e6 * seconds, "tflop_per_second": flops / seconds / 1e12
    }  # fmt: skip
