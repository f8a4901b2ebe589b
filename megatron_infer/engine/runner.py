"""Executes one Step on this rank: batch, forward pass, logits, sampling.

Every rank runs the same code; rank 0 alone returns tokens. It does not know requests, queues or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, starmap
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.engine.batch import Batch, Layout, Uploads
from megatron_infer.engine.graphs import Graphs, Key, Outputs, Recorder
from megatron_infer.engine.logits import NEVER
from megatron_infer.engine.request import Draw, Sampled
from megatron_infer.engine.sampler import NOT_FINITE, draw_numbers, logprobs_on_device, sample, sample_on_device
from megatron_infer.engine.step import Ints, Step
from megatron_infer.engine.topology import use_device
from megatron_infer.model.transformer import Transformer

_ROWS_AT_ONCE = 128
"""Rows whose logits are held together, beyond one per sequence: 74 MiB in fp32 for a vocabulary of 151936."""


class Pending(Protocol):
    """A started step."""

    def wait(self) -> list[list[Sampled]]:
        """On rank 0 a list per sequence, with a Sampled for each of its tokens that yields one; elsewhere none."""
        ...


class ModelRunner:
    """The model and its KV cache on one tensor-parallel rank.

    Attributes:
        is_asynchronous: steps run on the device while the host goes on; rows are then sampled there, and the next step
            may be started before this one's samples are known. Else rows are sampled on the host.
        gaps: ranges [start, stop) of ids that stand for no token, which are never sampled.
        graphs: recorded steps, once record_graphs() was called.
    """

    def __init__(
        self, model: Transformer, kv: KVCache, *, gaps: Sequence[tuple[int, int]] = (),
        is_asynchronous: bool | None = None,
    ) -> None:  # fmt: skip
        self.model, self.kv, self.tp = model, kv, model.tp
        self.is_asynchronous = self.tp.device.type == "cuda" if is_asynchronous is None else is_asynchronous
        self.graphs: Graphs | None = None
        head = model.head
        own = [i - head.start for start, stop in gaps for i in range(max(start, head.start), min(stop, head.stop))]
        self._gaps = torch.tensor(own, dtype=torch.int64, device=self.tp.device) if own else None
        """Of this rank's logits, those that stand for no token."""
        self._uploads = Uploads(self.tp.device)
        self._last_ids = torch.zeros(0, dtype=torch.int64, device=self.tp.device)
        """Samples of the last step, for the ids of the next that stand for them."""

    @torch.no_grad()
    def record_graphs(
        self, recorder: Recorder, keys: Sequence[Key], *, max_model_len: int, max_num_seqs: int, memory_bytes: int
    ) -> None:
        """Record steps of these shapes; collective over the group. See engine.graphs."""
        # Of a fixed size and place from now on: recorded steps read and write it.
        self._last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.tp.device)
        self.graphs = Graphs(
            self._compute,
            recorder,
            self._uploads,
            keys=keys,
            block_size=self.kv.block_size,
            table_width=-(-max_model_len // self.kv.block_size),
            padding_block=self.kv.padding_block,
            memory_bytes=memory_bytes,
            most=lambda own: max(self.tp.gather_number(own)),
        )

    def close(self) -> None:
        """Leave the group, which has not failed. Idempotent."""
        if self.graphs is not None:
            # First, or NCCL waits for the graphs that hold its collectives.
            if self.tp.device.type == "cuda":
                torch.cuda.synchronize(self.tp.device)
            self.graphs = None
        self.tp.close()

    @torch.no_grad()
    def start(self, step: Step, draws: Sequence[Draw] = ()) -> Pending:
        """Start one step; collective over the group.

        Args:
            step: the plan, the same on every rank.
            draws: rank 0, where the step asks for full logits: how to sample each row that it marks, in order.
        """
        use_device(self.tp.device)
        self.kv.copy_heads(step.copies_C3.tolist())
        on_device = self.is_asynchronous and step.full_logits
        numbers = [draw_numbers(draw) for draw in draws] if on_device else []
        graphs = None if step.op_by_op else self.graphs
        key = graphs.key_of(step) if graphs is not None else None
        if graphs is not None and key is not None:
            batch, outputs = graphs.replay(key, step, numbers)
            return _Samples(step.num_samples_S, [self._sample(outputs, batch, step.full_logits, draws)])
        layout = Layout.of(step, len(numbers))
        batch = layout.batch(layout.upload(step, self.kv.block_size, self._uploads, numbers))
        hidden_TD = self.model.forward(self._resolved(batch), self.kv)
        # The same blocks on every rank. A step that another may be planned ahead of has one: a row per sequence.
        num_rows = max(_ROWS_AT_ONCE, layout.num_seqs)
        parts: list[_Part] = []
        for start in range(0, layout.num_samples, num_rows):
            rows = slice(start, start + num_rows)
            part = replace(batch, sample_rows=batch.sample_rows[rows], draws_S5=batch.draws_S5[rows])
            parts.append(self._sample(self._outputs(hidden_TD, part), part, step.full_logits, draws[rows]))
        return _Samples(step.num_samples_S, parts)

    def _sample(self, outputs: Outputs, batch: Batch, full_logits: bool, draws: Sequence[Draw]) -> _Part:
        """Samples of the rows of `outputs`; on rank 0, elsewhere none."""
        local_SV, ids_S = outputs
        if not full_logits:
            return _Known([]) if self.tp.rank else _Fetched(_Fetch(ids_S))
        logits_SV = self.model.head.gather(local_SV)
        if self.is_asynchronous:
            return self._sample_on_device(logits_SV, batch, draws)
        if self.tp.rank:
            return _Known([])
        rows = logits_SV.float().cpu().numpy()
        return _Known([sample(*row) for row in zip(rows, draws, strict=True)])

    def _compute(self, batch: Batch) -> Outputs:
        """What a graph records."""
        return self._outputs(self.model.forward(self._resolved(batch), self.kv), batch)

    def _outputs(self, hidden_TD: Tensor, batch: Batch) -> Outputs:
        """This rank's logits of the sampled rows and their greedy ids, for the next step too."""
        # While all decode, every row is sampled.
        is_all = batch.sample_rows.shape[0] == hidden_TD.shape[0]
        local_SV = self.model.logits(hidden_TD if is_all else hidden_TD.index_select(0, batch.sample_rows))
        if self._gaps is not None:
            local_SV.index_fill_(1, self._gaps, NEVER)
        ids_S = self._greedy(local_SV)
        if self.is_asynchronous:
            self._remember(ids_S, batch)
        return local_SV, ids_S

    def _resolved(self, batch: Batch) -> Batch:
        """With the samples of the last step in place of the ids that stand for them."""
        if not self.is_asynchronous or not self._last_ids.shape[0]:
            return batch
        ids_T = batch.token_ids_T
        # ~id is -1 - id: the index of the sample that a negative id stands for.
        sampled_T = self._last_ids.index_select(0, (~ids_T).clamp_(min=0))
        return replace(batch, token_ids_T=torch.where(ids_T < 0, sampled_T, ids_T))

    def _remember(self, ids_S: Tensor, batch: Batch) -> None:
        num_ids = ids_S.shape[0]
        if num_ids > batch.context_lens_S.shape[0]:
            return  # with drafts, what comes next is not known before the host has seen them
        if num_ids > self._last_ids.shape[0]:
            self._last_ids = torch.zeros_like(ids_S)
        # A row without a sample (-1) goes on with any id: its request has ended.
        torch.clamp(ids_S, min=0, out=self._last_ids[:num_ids])

    def _greedy(self, local_SV: Tensor) -> Tensor:
        """ids_S, -1 for a row with NaN or Inf. Ranks exchange (max, index) pairs and come to the same result.

        A vocabulary below 2^24 keeps the index exact in fp32.
        """
        values_S, indices_S = self.model.ops.argmax(local_SV)
        if self.tp.size > 1:
            pairs_S2 = torch.stack([values_S.float(), (indices_S + self.model.head.start).float()], dim=1)
            gathered = self.tp.all_gather(pairs_S2)
            # The first rank's among equals: it has the lower ids.
            values_S, ranks_S = self.model.ops.argmax(gathered[:, ::2].contiguous())
            indices_S = gathered[:, 1::2].gather(1, ranks_S[:, None])[:, 0].long()
        return torch.where(values_S.isnan(), -1, indices_S)

    def _sample_on_device(self, logits_SV: Tensor, batch: Batch, draws: Sequence[Draw]) -> _Part:
        """Rank 0 draws; the others get its ids, for the next step."""
        if self.tp.rank == 0:
            ids_S = sample_on_device(logits_SV, batch.draws_S5[: len(draws)], draws)
        else:
            ids_S = torch.zeros_like(logits_SV[:, 0]).long()
        if self.tp.size > 1:
            ids_S = self.tp.all_gather(ids_S[:, None])[:, 0].contiguous()
        self._remember(ids_S, batch)
        counts = [draw.num_logprobs for draw in draws]
        if self.tp.rank:
            return _Known([])
        logprobs = []
        if any(count is not None for count in counts):
            most = max(count or 0 for count in counts)
            logprobs = [_Fetch(values) for values in logprobs_on_device(logits_SV, ids_S, most)]
        return _Fetched(_Fetch(ids_S), logprobs, counts)


@dataclass(frozen=True)
class _Samples:
    """Those of a step: of as many rows as `num_samples_S` adds up to."""

    num_samples_S: Ints
    parts: Sequence[_Part]

    def wait(self) -> list[list[Sampled]]:
        rows = chain.from_iterable(part.wait() for part in self.parts)
        return [list(islice(rows, num_samples)) for num_samples in self.num_samples_S.tolist()]


@dataclass(frozen=True)
class _Known:
    """Samples that the host has."""

    sampled: list[Sampled]

    def wait(self) -> Iterable[Sampled]:
        return self.sampled


@dataclass(frozen=True)
class _Fetched:
    """Samples on their way to the host."""

    ids: _Fetch
    logprobs: Sequence[_Fetch] = ()
    """The three of `logprobs_on_device`, or none"""
    counts: Sequence[int | None] = ()
    """Draw.num_logprobs of each row"""

    def wait(self) -> Iterable[Sampled]:
        if not self.logprobs:
            return map(_sampled, self.ids.values())
        rows = zip(self.ids.values(), *(fetch.values() for fetch in self.logprobs), self.counts, strict=True)
        return starmap(_with_logprobs, rows)


_Part = _Known | _Fetched
"""Samples of some rows."""


class _Fetch:
    """A tensor being copied to the host."""

    def __init__(self, values: Tensor) -> None:
        if values.device.type == "cpu":
            self._host, self._copied = values.clone(), None  # the next step may overwrite them
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def values(self) -> list[Any]:
        """Numbers, nested like the tensor; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[Any] = self._host.tolist()
        return values


def _sampled(token_id: int) -> Sampled:
    return Sampled(0, error=NOT_FINITE) if token_id < 0 else Sampled(token_id)


def _with_logprobs(
    token_id: int, logprob: float, top: Sequence[float], top_ids: Sequence[int], count: int | None
) -> Sampled:
    if token_id < 0 or count is None:
        return _sampled(token_id)
    return Sampled(token_id, logprob, tuple(zip(top_ids[:count], top[:count], strict=True)))
