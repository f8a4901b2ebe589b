"""Whole steps as CUDA graphs: recorded once per shape at start, then replayed with one launch from the host.

Owns which shapes are recorded, within how much memory, and their static index buffers. Does not know what a step
computes: that is a function of a Batch. How a device records is a Recorder, so that tests can stand in for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_infer.engine.batch import Batch, Draws, Layout, Uploads
from megatron_infer.engine.step import Step

MAX_QUERY_LEN = 16
"""Of the shapes of one sequence: a keystroke's new tokens behind a cached prompt."""

Key = tuple[int, int, int]
"""(num_seqs, q_len, num_samples): every sequence has q_len query tokens, the last num_samples of which are sampled."""
Outputs = tuple[Tensor, ...]


class Recording(Protocol):
    """A recorded function; `outputs` are what it returned, overwritten by each replay."""

    outputs: Outputs

    def replay(self) -> None: ...


class Recorder(Protocol):
    """A device that records the launches of a function, without its host code."""

    def record(self, work: Callable[[], Outputs]) -> Recording: ...
    def used_bytes(self) -> int:
        """Of the device's memory, by everybody."""
        ...


def graph_keys(max_num_seqs: int, *, has_drafts: bool = False) -> list[Key]:
    """The shapes worth recording, the most wanted first: one sequence, then more and more of them.

    Decoding sequences are padded to 1, 2, 4, a multiple of 8, or max_num_seqs; a single sequence may have more tokens,
    of a prompt or, with `has_drafts`, of a draft: then all are sampled.
    """
    sizes = {2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    prompts = [(1, q_len, 1) for q_len in range(1, MAX_QUERY_LEN + 1)]
    drafts = [(1, q_len, q_len) for q_len in range(2, MAX_QUERY_LEN + 1) if has_drafts]
    return [*prompts, *drafts, *((size, 1, 1) for size in sorted(sizes) if 1 < size <= max_num_seqs)]


@dataclass(frozen=True)
class _Graph:
    layout: Layout
    buffer: Tensor
    batch: Batch
    recording: Recording


class Graphs:
    """Recorded steps by shape.

    Args:
        run: what a step computes from its Batch: tensors whose first dimension is the sampled rows.
        recorder: of the device. uploads: to it.
        keys: shapes to record, in order; see graph_keys.
        block_size: tokens per block. table_width: blocks of the longest context.
        padding_block: where the rows that fill up a shape write their keys and values.
        memory_bytes: budget. The first shape that exceeds it, and those behind it, are left out.
        most: the largest of what each rank passes; all ranks must record the same shapes.
    """

    def __init__(
        self, run: Callable[[Batch], Outputs], recorder: Recorder, uploads: Uploads, *, keys: Sequence[Key],
        block_size: int, table_width: int, padding_block: int, memory_bytes: int, most: Callable[[int], int],
    ) -> None:  # fmt: skip
        self._uploads, self._block_size, self._padding_block = uploads, block_size, padding_block
        self._graphs: dict[Key, _Graph] = {}
        self.memory_bytes = 0
        began_bytes = recorder.used_bytes()
        for key in keys:
            graph = self._record(key, table_width, run, recorder)
            used_bytes = most(recorder.used_bytes() - began_bytes)
            if used_bytes > memory_bytes:
                break
            self._graphs[key] = graph
            self.memory_bytes = used_bytes
        self._sizes = sorted(num_seqs for num_seqs, q_len, _ in self._graphs if q_len == 1)

    def _record(self, key: Key, table_width: int, run: Callable[[Batch], Outputs], recorder: Recorder) -> _Graph:
        num_seqs, _, num_samples = key
        padding = self._padding(*key)
        layout = replace(Layout.of(padding, num_draws=num_seqs * num_samples), table_width=table_width)
        buffer = layout.upload(padding, self._block_size, self._uploads)
        batch = layout.batch(buffer)
        return _Graph(layout, buffer, batch, recorder.record(lambda: run(batch)))

    def _padding(self, num_seqs: int, q_len: int, num_samples: int) -> Step:
        """A step of this shape that disturbs nobody."""
        return Step(
            token_ids_T=np.zeros(num_seqs * q_len, dtype=np.int32),
            query_lens_S=np.full(num_seqs, q_len, dtype=np.int32),
            context_lens_S=np.full(num_seqs, q_len, dtype=np.int32),
            block_tables=[np.full(-(-q_len // self._block_size), self._padding_block, dtype=np.int32)] * num_seqs,
            num_samples_S=np.full(num_seqs, num_samples, dtype=np.int32),
            copies_C3=np.empty((0, 3), dtype=np.int32),
            full_logits=False,
        )

    @property
    def keys(self) -> tuple[Key, ...]:
        """The shapes that were recorded."""
        return tuple(self._graphs)

    def key_of(self, step: Step) -> Key | None:
        """The recorded shape that holds `step`; None: it has to be launched operation by operation."""
        num_seqs, q_len, num_samples = len(step.query_lens_S), int(step.query_lens_S[0]), int(step.num_samples_S[0])
        if (step.query_lens_S != q_len).any() or (step.num_samples_S != num_samples).any():
            return None
        size = num_seqs if q_len > 1 else next((size for size in self._sizes if size >= num_seqs), 0)
        key = (size, q_len, num_samples)
        return key if key in self._graphs else None

    def replay(self, key: Key, step: Step, draws: Draws) -> tuple[Batch, Outputs]:
        """Run `step` in the recorded shape `key`: the padded batch, and its own rows' outputs until the next replay."""
        graph, num_seqs = self._graphs[key], len(step.query_lens_S)
        if num_seqs < key[0]:
            step = _joined(step, self._padding(key[0] - num_seqs, *key[1:]))
        graph.layout.upload(step, self._block_size, self._uploads, draws, graph.buffer)
        graph.recording.replay()
        return graph.batch, tuple(output[: num_seqs * key[2]] for output in graph.recording.outputs)


def _joined(step: Step, more: Step) -> Step:
    """The sequences of both."""
    return replace(
        step,
        token_ids_T=np.concatenate([step.token_ids_T, more.token_ids_T]),
        query_lens_S=np.concatenate([step.query_lens_S, more.query_lens_S]),
        context_lens_S=np.concatenate([step.context_lens_S, more.context_lens_S]),
        block_tables=[*step.block_tables, *more.block_tables],
        num_samples_S=np.concatenate([step.num_samples_S, more.num_samples_S]),
    )


class CudaRecording:
    """A CUDA graph and the tensors it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Outputs) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Records on a GPU; all graphs share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Callable[[], Outputs]) -> CudaRecording:
        """Run `work` once, so that nothing is compiled or allocated for the first time while it is recorded."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()
        torch.cuda.synchronize(self._device)
        return CudaRecording(graph, outputs)

    def used_bytes(self) -> int:
        """Of the GPU's memory; what was only needed to warm up is given back first."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
