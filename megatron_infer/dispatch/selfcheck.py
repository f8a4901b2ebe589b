"""Kernels that prove themselves at load: every op of a table on random inputs, beside a table that is trusted.

Owns which cases are run and the bounds; keeps nothing. Knows no candidates: dispatch.select decides what a fault means.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_infer.dispatch.selfcheck_inputs import CheckInputs, CheckShape, Lengths, last_queries
from megatron_infer.ops import INT4, NormWeight, Ops, PackedLinear, SingleOps, Stream
from megatron_infer.ops.fp8 import FP8

TOKENS = (1, 2, 3, 4, 5, 16, 17, 130)
"""Kernels differ for 1, 2, 3, 4, up to 16 and more tokens."""
BATCHES: tuple[Lengths, ...] = (
    [(1, 1)],
    [(1, 2500)],
    [(1, 17), (1, 300), (1, 1), (1, 1100)],
    [(4, 600), (4, 5), (4, 4)],
    [(16, 700), (1, 40), (3, 3)],
    [(130, 130)],
    [(70, 500)],
    [(150, 150), (1, 900), (40, 333), (1, 1)],
)
"""(query length, context length) of each sequence: decode, drafts, prefill whole and in chunks, mixtures."""
BOUNDS = {
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
    torch.int8: 1.5e-2,
    INT4: 2e-2,
    FP8: 6e-2,
}
"""Largest difference in a row, relative to its largest value. Types of quantised weights also stand for what kernels
round of the activations: 12 bits are kept beside int8, 8 beside int4, 4 beside fp8, or all."""


class _Comparison(NamedTuple):
    what: str
    actual: Tensor
    expected: Tensor
    bound: float
    whose: str = "torch's"


_Comparisons = Iterator[_Comparison]


class Fault(NamedTuple):
    """An op that fails or differs: the reason in one line, and everything known, a traceback or all differences."""

    op: str
    reason: str
    details: str


def find_faults(
    candidate: Ops, trusted: Ops, device: torch.device, shape: CheckShape, *, names: tuple[str, ...] | None = None,
    deterministic: bool = False,
) -> Iterator[Fault]:  # fmt: skip
    """Each op among `names`, or of all, that fails or differs from the trusted one by more than BOUNDS.

    Halves of a layer that are launches of their own are compared with the candidate's single ops; they come last, so
    that whoever replaces a faulty op before asking for the next fault has them compared with what it put there. The
    cost, beside compiling kernels: the weights of one layer and of the head, twice, and a few hundred launches.

    Args:
        deterministic: also that no row's bits depend on the rows beside it, of its own sequence or others.
    Raises:
        RuntimeError: a kernel left the GPU unusable to this process, so that nothing can be chosen any more.
    """
    for compare in _Check(candidate, trusted, device, shape, deterministic).all():
        if names is None or compare.__name__ in names:
            fault = _fault_of(compare, device)
            if fault is not None:
                yield fault
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fault_of(compare: Callable[[], _Comparisons], device: torch.device) -> Fault | None:
    name, found = compare.__name__, []
    try:
        for what, actual, expected, bound, whose in compare():
            error = _difference(actual, expected)
            if not error <= bound:
                found.append(f"{name} of {what} differs from {whose} by {error:.1e} on {device}")
    except Exception as error:
        _require_alive(device, name, error)
        found.append(f"{name} fails on {device}: {type(error).__name__}: {error}".partition("\n")[0])
        return Fault(name, found[0], "\n".join((*found, traceback.format_exc())))
    return Fault(name, found[0], "\n".join(found)) if found else None


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The largest over the rows, NaN where either has one."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, expected = (t.double().reshape(t.shape[0], -1) for t in (actual, expected))
    size = expected.abs().amax(dim=1).clamp(min=1e-30)
    return float(((actual - expected).abs().amax(dim=1) / size).max())


def _require_alive(device: torch.device, name: str, cause: Exception) -> None:
    """After an illegal access every call on the GPU fails until the process ends."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception:
        raise RuntimeError(
            f"the kernel of {name} left {device} unusable to this process: {cause}. Please report this. Torch's "
            "own kernels are used with ops='vendor' where flash-attn and apex are not installed."
        ) from cause


class _Check:
    """One method per op, which yields what the candidate gives beside what it should: the trusted op, in fp32."""

    def __init__(
        self, candidate: Ops, trusted: Ops, device: torch.device, shape: CheckShape, deterministic: bool
    ) -> None:
        self.candidate, self.trusted = candidate, trusted
        self.device, self.shape, self.deterministic = device, shape, deterministic
        # In deterministic mode activations between norms are fp32.
        self.inner = torch.float32 if deterministic else shape.dtype
        self.inputs = CheckInputs(device, shape, self.inner)
        self.bound = BOUNDS[shape.dtype]

    def all(self) -> list[Callable[[], _Comparisons]]:
        """What to compare, the layers last: they are made of the rest."""
        checks = [self.linear, self.rms_norm, self.add_rms_norm, self.rope_store_kv, self.paged_attention]
        checks += [self.silu_mul, self.argmax, self.gather_rows]
        made = type(self.candidate)
        if made.attention_layer is not Ops.attention_layer:
            checks.append(self.attention_layer)
        if made.feed_forward_layer is not Ops.feed_forward_layer:
            checks.append(self.feed_forward_layer)
        return checks

    def rows_alone(
        self, what: str, together: Tensor, op: Callable[..., Tensor], x: Tensor, *others: object
    ) -> _Comparisons:
        """In deterministic mode: each row by itself gives the same bits."""
        if self.deterministic:
            alone = torch.cat([op(row, *others) for row in x[:17].split(1)])
            yield _Comparison(what, together[:17], alone, 0.0, "its rows alone")

    def linear(self) -> _Comparisons:
        for name in self.inputs.linears():
            mine, theirs = self.inputs.packed(name, self.candidate, self.trusted)
            entry = self.shape.dtype if name in ("qkv", "gate_up", "head") else self.inner
            bound = max(self.bound, BOUNDS[mine.dtype])
            for num_tokens in TOKENS:
                x_TK, what = self.inputs.normal(num_tokens, mine.in_dim, dtype=entry), f"{num_tokens} tokens ({name})"
                y_TN = self.candidate.linear(x_TK, mine)
                yield _Comparison(what, y_TN, self.trusted.linear(x_TK.float(), theirs), bound)
                yield from self.rows_alone(what, y_TN, self.candidate.linear, x_TK, mine)

    def rms_norm(self) -> _Comparisons:
        norm = self.inputs.norm_weight()
        for num_tokens in TOKENS:
            what = f"{num_tokens} tokens"
            x_TD = self.inputs.normal(num_tokens, self.shape.hidden_size, dtype=self.shape.dtype)
            y_TD = self.candidate.rms_norm(x_TD, norm)
            yield _Comparison(what, y_TD, self.trusted.rms_norm(x_TD.float(), norm), self.bound)
            yield from self.rows_alone(what, y_TD, self.candidate.rms_norm, x_TD, norm)

    def add_rms_norm(self) -> _Comparisons:
        norm = self.inputs.norm_weight()
        for num_tokens in TOKENS:
            x_TD = self.inputs.normal(num_tokens, self.shape.hidden_size, dtype=self.inner)
            mine = self.inputs.normal(num_tokens, self.shape.hidden_size, dtype=self.shape.dtype)
            theirs = mine.clone()
            actual = self.candidate.add_rms_norm(x_TD, mine, norm)
            expected = self.trusted.add_rms_norm(x_TD, theirs, norm)
            yield _Comparison(f"{num_tokens} tokens", actual, expected, self.bound)
            yield _Comparison(f"{num_tokens} tokens (residual)", mine, theirs, self.bound)

    def rope_store_kv(self) -> _Comparisons:
        shape, heads = self.shape, self.inputs.heads
        bound = max(self.bound, BOUNDS[shape.kv_dtype])
        for num_tokens in TOKENS:
            qkv_TC = self.inputs.normal(num_tokens, (heads.num + 2 * heads.num_kv) * shape.head_dim, dtype=self.inner)
            num_blocks, what = 3 + num_tokens // shape.block_size, f"{num_tokens} tokens"
            batch, rope = self.inputs.scattered(num_tokens, num_blocks), self.inputs.rope(200)
            # What is written already must be left alone.
            mine = self.inputs.cache(num_blocks)
            theirs = mine.clone()
            actual = self.candidate.rope_store_kv(qkv_TC, rope, batch, mine, heads)
            expected = self.trusted.rope_store_kv(qkv_TC, rope, batch, theirs, heads)
            yield _Comparison(what, actual, expected, bound)
            yield _Comparison(f"{what} (keys)", mine.k, theirs.k, bound)
            yield _Comparison(f"{what} (values)", mine.v, theirs.v, bound)

    def paged_attention(self) -> _Comparisons:
        attend, scale = self.candidate.paged_attention, self.inputs.heads.scale
        for lengths in BATCHES:
            (q_TNH, batch, kv), what = self.inputs.paged(lengths), f"queries and contexts {lengths}"
            actual = attend(q_TNH, batch, kv, scale)
            expected = self.trusted.paged_attention(q_TNH.float(), batch, kv, scale)
            yield _Comparison(what, actual, expected, self.bound)
            if self.deterministic:
                for most, those, whose in (
                    (batch.max_query_len, actual, "its sequences alone"),
                    (1, actual[batch.query_start_S1[1:].long() - 1], "its last queries alone"),
                ):
                    parts = [last_queries(q_TNH, batch, s, most) for s in range(len(lengths))]
                    alone = torch.cat([attend(*part, kv, scale) for part in parts])
                    yield _Comparison(what, those, alone, 0.0, whose)

    def silu_mul(self) -> _Comparisons:
        width = 2 * self.inputs.linears()["down"][1][-1]
        for num_tokens in TOKENS:
            x_T2F, what = (4 * self.inputs.normal(num_tokens, width)).to(self.inner), f"{num_tokens} tokens"
            y_TF = self.candidate.silu_mul(x_T2F)
            yield _Comparison(what, y_TF, self.trusted.silu_mul(x_T2F.float()), self.bound)
            yield from self.rows_alone(what, y_TF, self.candidate.silu_mul, x_T2F)

    def argmax(self) -> _Comparisons:
        """Ties, and rows with NaN or infinity."""
        vocab = self.shape.vocab_size
        logits_SV = self.inputs.normal(7, vocab, dtype=self.inner)
        logits_SV[1, vocab // 3], logits_SV[2, vocab - 1], logits_SV[3, 0] = float("nan"), float("inf"), float("-inf")
        logits_SV[4], logits_SV[5, vocab // 2 :] = -5.0, 9.0
        (values, indices), (expected, first) = self.candidate.argmax(logits_SV), self.trusted.argmax(logits_SV)
        yield _Comparison("non-finite rows", values.isnan(), expected.isnan(), 0.0)
        good = ~expected.isnan()
        yield _Comparison("values", values[good], expected[good], 0.0)
        yield _Comparison("indices", indices[good], first[good], 0.0)

    def gather_rows(self) -> _Comparisons:
        table_VD = self.inputs.normal(50, self.shape.hidden_size, dtype=self.shape.dtype)
        for num_tokens in TOKENS:
            ids_T = self.inputs.integers(50, num_tokens)
            actual, expected = self.candidate.gather_rows(table_VD, ids_T), self.trusted.gather_rows(table_VD, ids_T)
            yield _Comparison(f"{num_tokens} tokens", actual, expected, 0.0)

    def half_layer(self, what: str, num_tokens: int, run: Callable[[Ops, Stream, bool], None]) -> _Comparisons:
        """The residual after half a layer of single ops or one, with and without something to add to it first."""
        hidden, bound = self.shape.hidden_size, 2 * max(self.bound, BOUNDS[self.shape.linear_dtype])
        for has_pending, completes_sum in product((False, True), repeat=2):
            pending_TD = self.inputs.normal(num_tokens, hidden, dtype=self.inner) if has_pending else None
            residual_TD = self.inputs.normal(num_tokens, hidden, dtype=self.shape.dtype)
            mine, theirs = Stream(residual_TD, pending_TD), Stream(residual_TD.clone(), pending_TD)
            run(SingleOps(self.candidate), theirs, completes_sum)
            run(self.candidate, mine, completes_sum)
            assert completes_sum or mine.pending_TD is not None, "partial sums were added to the residual"
            yield _Comparison(what, mine.settle(), theirs.settle(), bound, "its single ops'")

    def attention_layer(self) -> _Comparisons:
        norm = self.inputs.norm_weight()
        (qkv,), (out,) = (self.inputs.packed(name, self.candidate) for name in ("qkv", "out"))
        for lengths in BATCHES:
            yield from self.attention_half(lengths, norm, qkv, out)

    def attention_half(self, lengths: Lengths, norm: NormWeight, qkv: PackedLinear, out: PackedLinear) -> _Comparisons:
        """One batch of attention_layer, and the cache that it leaves behind."""
        (_, batch, mine), what = self.inputs.paged(lengths), f"queries and contexts {lengths}"
        theirs, rope = mine.clone(), self.inputs.rope(max(context for _, context in lengths))

        def run(ops: Ops, stream: Stream, completes_sum: bool) -> None:
            kv = mine if ops is self.candidate else theirs
            ops.attention_layer(stream, norm, qkv, out, rope, batch, kv, self.inputs.heads, completes_sum)

        yield from self.half_layer(what, len(batch.slots_T), run)
        bound = max(self.bound, BOUNDS[self.shape.linear_dtype], BOUNDS[self.shape.kv_dtype])
        for name, actual, expected in zip(("keys", "values"), mine, theirs, strict=True):
            # What nobody owns is NaN, and must be afterwards.
            actual, expected = actual.nan_to_num(1e3), expected.nan_to_num(1e3)
            yield _Comparison(f"{what} ({name})", actual, expected, bound, "its single ops'")

    def feed_forward_layer(self) -> _Comparisons:
        norm = self.inputs.norm_weight()
        (gate_up,), (down,) = (self.inputs.packed(name, self.candidate) for name in ("gate_up", "down"))

        def run(ops: Ops, stream: Stream, completes_sum: bool) -> None:
            ops.feed_forward_layer(stream, norm, gate_up, down, completes_sum)

        for num_tokens in TOKENS:
            yield from self.half_layer(f"{num_tokens} tokens", num_tokens, run)
