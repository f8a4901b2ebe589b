"""The device's view of a Step: index tensors, all cut from one buffer that is copied to the device once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_infer.engine.step import Step


@dataclass(frozen=True)
class Batch:
    """One step's tokens, packed. T tokens of S sequences, B blocks in the longest block table.

    Sequence s has the query rows query_start_S1[s] .. query_start_S1[s + 1], which are its last positions.
    """

    token_ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int32"""
    slots_T: Tensor
    """int64: block * block_size + offset, where each token's key and value are written"""
    query_start_S1: Tensor
    """int32"""
    context_lens_S: Tensor
    """int32: positions of each sequence, this step's included"""
    block_tables_SB: Tensor
    """int32"""
    sample_rows: Tensor
    """int64: rows of T whose logits are wanted"""

    @classmethod
    def load(cls, step: Step, block_size: int, device: torch.device) -> Batch:
        """Lay out `step` on the host and move it over in one copy."""
        query_lens = np.asarray(step.query_lens_S, dtype=np.int64)
        context_lens = np.asarray(step.context_lens_S, dtype=np.int64)
        ends = np.cumsum(query_lens)
        num_tokens, num_seqs = int(ends[-1]), len(query_lens)
        starts = ends - query_lens
        sequence_T = np.repeat(np.arange(num_seqs), query_lens)
        positions_T = np.arange(num_tokens) - starts[sequence_T] + (context_lens - query_lens)[sequence_T]
        width = max(len(table) for table in step.block_tables)
        tables_SB = np.zeros((num_seqs, width), dtype=np.int64)
        for row, table in enumerate(step.block_tables):
            tables_SB[row, : len(table)] = table
        slots_T = tables_SB[sequence_T, positions_T // block_size] * block_size + positions_T % block_size
        sample_rows = (ends - 1)[np.asarray(step.sample_S, dtype=bool)]
        parts = [
            step.token_ids_T,
            slots_T,
            sample_rows,
            positions_T,
            np.concatenate(([0], ends)),
            context_lens,
            tables_SB.reshape(-1),
        ]
        buffer = torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)).to(device)
        ids, slots, rows, positions, query_start, contexts, tables = buffer.split([len(part) for part in parts])
        narrow = buffer[len(ids) + len(slots) + len(rows) :].to(torch.int32)
        positions, query_start, contexts, tables = narrow.split(
            [len(positions), len(query_start), len(contexts), len(tables)]
        )
        return cls(ids, positions, slots, query_start, contexts, tables.view(num_seqs, width), rows)
