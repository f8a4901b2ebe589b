"""The device's view of a Step: index tensors, all cut from one buffer that is copied to the device once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_infer.engine.step import Step

_ZERO = np.zeros(1, dtype=np.int64)


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
        """Lay out `step` on the host and move it over in one copy: first what is int64, then what is int32."""
        num_seqs = len(step.query_lens_S)
        ends = step.query_lens_S.cumsum()
        sequence_T = np.arange(num_seqs).repeat(step.query_lens_S)
        positions_T = np.arange(len(sequence_T)) + (step.context_lens_S - ends)[sequence_T]
        tables_SB = np.zeros((num_seqs, max(map(len, step.block_tables))), dtype=np.int64)
        for row, table in enumerate(step.block_tables):
            tables_SB[row, : len(table)] = table
        slots_T = tables_SB[sequence_T, positions_T // block_size] * block_size + positions_T % block_size
        wide = (step.token_ids_T, slots_T, (ends - 1)[step.sample_S != 0])
        narrow = (positions_T, _ZERO, ends, step.context_lens_S, tables_SB.reshape(-1))
        num_wide, num_narrow = sum(map(len, wide)), sum(map(len, narrow))
        host = np.empty(num_wide + (num_narrow + 1) // 2, dtype=np.int64)
        np.concatenate(wide, out=host[:num_wide])
        np.concatenate(narrow, out=host.view(np.int32)[2 * num_wide :][:num_narrow], casting="same_kind")
        buffer = torch.from_numpy(host).to(device)
        num_tokens, num_table = len(positions_T), tables_SB.size
        ids, slots, rows, _ = buffer.split_with_sizes([num_tokens, num_tokens, len(wide[2]), len(host) - num_wide])
        _, positions, query_start, contexts, tables, _ = buffer.view(torch.int32).split_with_sizes(
            [2 * num_wide, num_tokens, num_seqs + 1, num_seqs, num_table, num_narrow % 2]
        )
        return cls(ids, positions, slots, query_start, contexts, tables.view(tables_SB.shape), rows)
