"""Executes one Step on this rank: batch, forward pass, logits, sampling.

Every rank runs the same code; rank 0 alone samples and returns tokens. It does not know requests, queues or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.engine.batch import Batch
from megatron_infer.engine.request import Sampled
from megatron_infer.engine.sampler import NOT_FINITE, Draw, sample
from megatron_infer.engine.step import Step
from megatron_infer.model.transformer import Transformer


class ModelRunner:
    """The model and its KV cache on one tensor-parallel rank."""

    def __init__(self, model: Transformer, kv: KVCache) -> None:
        self.model, self.kv, self.tp = model, kv, model.tp

    @torch.no_grad()
    def execute(self, step: Step, draws: Sequence[Draw] = ()) -> list[Sampled]:
        """Run one step; collective over the group.

        Args:
            step: the plan, the same on every rank.
            draws: rank 0: how to sample each row that the step marks as sampled, in order.
        Returns:
            Rank 0: one Sampled per marked row. Other ranks: nothing.
        """
        if self.tp.device.type == "cuda":
            # Kernels are launched on the current device, which is each thread's own.
            torch.cuda.set_device(self.tp.device)
        batch = Batch.load(step, self.kv.block_size, self.tp.device)
        self.kv.copy_heads(step.copies_C3.tolist())
        hidden_TD = self.model.forward(batch, self.kv)
        num_sampled = batch.sample_rows.shape[0]
        if not num_sampled:
            return []
        # While all decode, every row is sampled.
        sampled_SD = hidden_TD if num_sampled == hidden_TD.shape[0] else hidden_TD.index_select(0, batch.sample_rows)
        local_SV = self.model.logits(sampled_SD)
        if step.full_logits:
            return self._sample(local_SV, draws)
        return self._argmax(local_SV)

    def _sample(self, local_SV: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        logits_SV = self.model.head.gather(local_SV)
        if self.tp.rank:
            return []
        rows = logits_SV.float().cpu().numpy()
        return [sample(row, draw) for row, draw in zip(rows, draws, strict=True)]

    def _argmax(self, local_SV: Tensor) -> list[Sampled]:
        """Greedy: ranks exchange (max, index) pairs. A vocabulary below 2^24 keeps the index exact in fp32."""
        values_S, indices_S = self.model.ops.argmax(local_SV)
        if self.tp.size == 1:
            return [_best([pair]) for pair in zip(values_S.tolist(), indices_S.tolist(), strict=True)]
        pairs_S2 = torch.stack([values_S.float(), (indices_S + self.model.head.start).float()], dim=1)
        gathered = self.tp.all_gather(pairs_S2)
        if self.tp.rank:
            return []
        return [_best(list(zip(row[::2], row[1::2], strict=True))) for row in gathered.tolist()]


def _best(pairs: Sequence[tuple[float, float]]) -> Sampled:
    """The index with the largest value among (value, index) of every rank; the first rank's among equals."""
    if not all(math.isfinite(value) for value, _ in pairs):
        return Sampled(0, error=NOT_FINITE)
    return Sampled(int(max(pairs, key=itemgetter(0))[1]))
