"""The device's view of a Step: index tensors, all cut from one buffer that is copied to the device once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_infer.engine.step import Step
from megatron_infer.ops import BatchView

_ZERO = np.zeros(1, dtype=np.int64)
DRAW_FIELDS = 5
"""Numbers per sampled row; see sampler.draw_numbers."""

Draws = Sequence[Sequence[float]]
"""DRAW_FIELDS numbers for each row that the device samples."""
Buffer = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch(BatchView):
    """One step's tokens, packed, and which of them are sampled."""

    sample_rows: Tensor
    """int64: rows of T whose logits are wanted"""
    draws_S5: Tensor
    """float64: how each of those rows is drawn, where the device draws; else no rows"""


@dataclass(frozen=True)
class Layout:
    """Sizes of a batch's tensors, hence where each lies in the buffer: first what takes 8 bytes, then what is int32."""

    num_tokens: int
    num_seqs: int
    num_samples: int
    num_draws: int
    table_width: int
    max_query_len: int

    @classmethod
    def of(cls, step: Step, num_draws: int = 0) -> Layout:
        """The smallest that holds `step`."""
        return cls(
            num_tokens=len(step.token_ids_T),
            num_seqs=len(step.query_lens_S),
            num_samples=int(step.num_samples_S.sum()),
            num_draws=num_draws,
            table_width=max(map(len, step.block_tables)),
            max_query_len=int(step.query_lens_S.max()),
        )

    @property
    def num_wide(self) -> int:
        return 2 * self.num_tokens + self.num_samples + DRAW_FIELDS * self.num_draws

    @property
    def num_narrow(self) -> int:
        return self.num_tokens + 2 * self.num_seqs + 1 + self.num_seqs * self.table_width

    @property
    def size(self) -> int:
        """Of the buffer, in int64."""
        return self.num_wide + (self.num_narrow + 1) // 2

    def upload(
        self, step: Step, block_size: int, uploads: Uploads, draws: Draws = (), into: Tensor | None = None
    ) -> Tensor:
        """The buffer of `step` on the device, in one copy. The step has just these sizes, but for narrower tables."""
        return uploads(self.size, lambda host: self._fill(host, step, block_size, draws), into)

    def _fill(self, host: Buffer, step: Step, block_size: int, draws: Draws) -> None:
        ends = step.query_lens_S.cumsum()
        sequence_T = np.arange(self.num_seqs).repeat(step.query_lens_S)
        rows_T = np.arange(self.num_tokens)
        positions_T = rows_T + (step.context_lens_S - ends)[sequence_T]
        sample_rows = rows_T[rows_T >= (ends - step.num_samples_S)[sequence_T]]
        tables_SB = np.zeros((self.num_seqs, self.table_width), dtype=np.int64)
        for row, table in enumerate(step.block_tables):
            tables_SB[row, : len(table)] = table
        slots_T = tables_SB[sequence_T, positions_T // block_size] * block_size + positions_T % block_size
        wide = (step.token_ids_T, slots_T, sample_rows)
        narrow = (positions_T, _ZERO, ends, step.context_lens_S, tables_SB.reshape(-1))
        num_wide, num_ids = self.num_wide, 2 * self.num_tokens + self.num_samples
        np.concatenate(wide, out=host[:num_ids])
        np.concatenate(narrow, out=host.view(np.int32)[2 * num_wide :][: self.num_narrow], casting="same_kind")
        if draws:
            host[num_ids:][: DRAW_FIELDS * len(draws)].view(np.float64)[:] = np.ravel(draws)

    def batch(self, buffer: Tensor) -> Batch:
        """The tensors in `buffer`, int64 of this size."""
        tokens, seqs, num_wide, num_narrow = self.num_tokens, self.num_seqs, self.num_wide, self.num_narrow
        ids, slots, rows, numbers, _ = buffer.split_with_sizes(
            [tokens, tokens, self.num_samples, DRAW_FIELDS * self.num_draws, (num_narrow + 1) // 2]
        )
        _, positions, query_start, contexts, tables, _ = buffer.view(torch.int32).split_with_sizes(
            [2 * num_wide, tokens, seqs + 1, seqs, seqs * self.table_width, num_narrow % 2]
        )
        return Batch(
            token_ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            query_start_S1=query_start,
            context_lens_S=contexts,
            block_tables_SB=tables.view(seqs, self.table_width),
            sample_rows=rows,
            draws_S5=numbers.view(torch.float64).view(self.num_draws, DRAW_FIELDS),
            max_query_len=self.max_query_len,
        )


class Uploads:
    """Copies buffers to the device: for a GPU through two pinned ones in turn, so that no copy is waited for.

    One is written again only once its last copy is done, which for a host that is one step ahead it long is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = [torch.empty(0, dtype=torch.int64, device="cpu")] * 2
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __call__(self, size: int, fill: Callable[[Buffer], None], into: Tensor | None = None) -> Tensor:
        """What `fill` writes into `size` int64, on the device: in `into` or a new tensor."""
        if self._device.type == "cpu":
            host = torch.empty(size, dtype=torch.int64, device="cpu")
            fill(host.numpy())
            return host if into is None else into.copy_(host)
        self._turn ^= 1
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if self._pinned[self._turn].numel() < size:
            self._pinned[self._turn] = torch.empty(2 * size, dtype=torch.int64, device="cpu", pin_memory=True)
        pinned = self._pinned[self._turn][:size]
        fill(pinned.numpy())
        if into is None:
            into = torch.empty(size, dtype=torch.int64, device=self._device)
        into.copy_(pinned, non_blocking=True)
        self._copied[self._turn] = event = torch.cuda.Event()
        event.record()
        return into
