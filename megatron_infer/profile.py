"""Where a step's time goes: seconds, bytes and floating-point operations of every op, by phase.

Who wants to know passes a Profile to LLM, which then times the ops and collectives of rank 0 into it. Without one
nothing is wrapped and nothing is paid. On a GPU every timed call waits for the device, so a profiled run is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron_infer.ops import (
    OP_NAMES,
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
from megatron_infer.tensor_parallel.backend import Backend

Phase = Literal["prefill", "decode"]
P = ParamSpec("P")
R = TypeVar("R")
ATTENTION = "attention"
COLLECTIVES = ("all_reduce", "all_gather", "broadcast")
_LOADING = ("allocate_linear", "pack_rows", "pack_quantized")
"""Ops that a step does not call."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a call is called in the profile, the bytes it must read, and the floating-point operations it must do."""

    name: str
    num_bytes: int = 0
    flops: int = 0


@dataclass
class OpTotals:
    """Sums over all calls of one op."""

    calls: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    flops: int = 0


@dataclass
class PhaseTotals:
    """Sums over the steps of one phase. `engine_seconds` has an entry per step: its time outside all timed calls."""

    num_steps: int = 0
    seconds: float = 0.0
    ops: dict[str, OpTotals] = field(default_factory=dict)
    engine_seconds: list[float] = field(default_factory=list)


class Profile:
    """Records while recording(), for one rank and one thread.

    A step lasts from the end of the one before it, or from the start of the recording, to its own end: queueing,
    planning and text count. It is a prefill step when some sequence has more than one query token in it, drafts aside,
    else a decode step. The recording itself is left out of every figure.

    Args:
        op_by_op: have the halves of a layer made of single ops, so that each is seen. The answers are the same; steps
            take longer by the launches.
    """

    def __init__(self, *, op_by_op: bool) -> None:
        self.is_active, self._op_by_op = False, op_by_op
        self.phases: dict[Phase, PhaseTotals] = {"prefill": PhaseTotals(), "decode": PhaseTotals()}
        self._calls: list[tuple[Work, float]] = []
        self._has_prefill = False
        self._step_began = 0.0
        self._recording_seconds = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps within, in addition to what is recorded already."""
        self._begin_step()
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False

    def timed(self, device: torch.device, work_of: Callable[P, Work], call: Callable[P, R]) -> Callable[P, R]:
        """`call`, recorded under what `work_of` makes of its arguments."""
        wait = torch.cuda.synchronize if device.type == "cuda" else None

        def run(*args: P.args, **options: P.kwargs) -> R:
            if not self.is_active:
                return call(*args, **options)
            if wait is not None:
                wait(device)
            began = time.perf_counter()
            result = call(*args, **options)
            if wait is not None:
                wait(device)
            ended = time.perf_counter()
            self._calls.append((work_of(*args, **options), ended - began))
            self._recording_seconds += time.perf_counter() - ended
            return result

        return run

    def timed_ops(self, ops: Ops, device: torch.device) -> Ops:
        """The same ops with every one of a step recorded; linear layers go by the name of their weight."""
        works: dict[str, Callable[..., Work]] = {
            "linear": _linear_work,
            "paged_attention": self._attention_work,
            "attention_layer": self._attention_layer_work,
            "feed_forward_layer": _feed_forward_layer_work,
        }
        names = [name for name in OP_NAMES if name not in _LOADING]
        if not self._op_by_op:
            names += ["attention_layer", "feed_forward_layer"]
        timed = SingleOps(ops)
        for name in names:
            # In place of the methods, so that a half of a layer that is made of single ops calls the timed ones.
            setattr(timed, name, self.timed(device, works.get(name, named(name)), getattr(ops, name)))
        return timed

    def timed_backend(self, backend: Backend, device: torch.device) -> Backend:
        """The same backend with its collectives recorded; what peers keep this rank waiting counts."""
        labels = {"all_reduce": "all_reduce", "add_all_reduce": "all_reduce", "all_gather": "all_gather"}
        for name, label in {**labels, "broadcast_ints": "broadcast"}.items():
            setattr(backend, name, self.timed(device, named(label), getattr(backend, name)))
        return backend

    def end_step(self) -> None:
        """The step is over, its text included."""
        if not self.is_active:
            return
        seconds = time.perf_counter() - self._step_began - self._recording_seconds
        totals = self.phases["prefill" if self._has_prefill else "decode"]
        totals.num_steps += 1
        totals.seconds += seconds
        for work, call_seconds in self._calls:
            op = totals.ops.setdefault(work.name, OpTotals())
            op.calls += 1
            op.seconds += call_seconds
            op.num_bytes += work.num_bytes
            op.flops += work.flops
        totals.engine_seconds.append(seconds - sum(call_seconds for _, call_seconds in self._calls))
        self._begin_step()

    def begin(self, *, is_prefill: bool) -> None:
        """What the step in progress is."""
        self._has_prefill |= is_prefill

    def _begin_step(self) -> None:
        self._calls.clear()
        self._has_prefill = False
        self._recording_seconds = 0.0
        self._step_began = time.perf_counter()

    def _attention_work(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Work:
        """Every sequence's keys and values read once; two products (q k, p v) with each position a query row sees."""
        return self._attention_of(q_TNH.shape[1], batch, kv.k)

    def _attention_of(self, num_heads: int, batch: BatchView, k_cache: Tensor) -> Work:
        head_dim = k_cache.shape[3]
        starts, contexts = batch.query_start_S1.tolist(), batch.context_lens_S.tolist()
        position_bytes = 2 * k_cache.shape[1] * head_dim * k_cache.element_size()
        seen = 0
        for start, end, context in zip(starts, starts[1:], contexts, strict=False):
            rows = end - start
            seen += rows * (context - rows) + rows * (rows + 1) // 2
        return Work(ATTENTION, sum(contexts) * position_bytes, 4 * num_heads * head_dim * seen)

    def _attention_layer_work(
        self, stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView,
        kv: LayerKV, heads: Heads, completes_sum: bool,
    ) -> Work:  # fmt: skip
        """Of the bytes only the weights', so that they can be told from attention's."""
        attention = self._attention_of(heads.num, batch, kv.k)
        linears = [_linear_work(stream.residual_TD, packed) for packed in (qkv, out)]
        flops = sum(work.flops for work in (attention, *linears))
        return Work("attention_layer", sum(work.num_bytes for work in linears), flops)


def named(name: str) -> Callable[..., Work]:
    """Recorded as `name`, whatever the arguments."""
    work = Work(name)
    return lambda *_, **options: work


def _feed_forward_layer_work(
    stream: Stream, norm: NormWeight, gate_up: PackedLinear, down: PackedLinear, completes_sum: bool
) -> Work:
    first, second = (_linear_work(stream.residual_TD, packed) for packed in (gate_up, down))
    return Work("feed_forward_layer", first.num_bytes + second.num_bytes, first.flops + second.flops)


def _linear_work(x_TK: Tensor, packed: PackedLinear) -> Work:
    """The packed weight read once; a multiplication and an addition per weight and token."""
    num_bytes = packed.data.numel() * packed.data.element_size()
    return Work(packed.name, num_bytes, 2 * x_TK.shape[0] * packed.out_dim * packed.in_dim)
