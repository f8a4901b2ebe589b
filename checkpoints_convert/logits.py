"""Two checkpoints by what the network computes from them: greedy continuations of one fixed prompt, and all logits.

Runs the network itself on one CPU rank, one checkpoint after the other, so one whole model is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints_convert.network import CPU, load_network, one_sequence, one_sequence_cache
from megatron_infer.dispatch.select import select_ops
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model_config import ModelConfig

_PROMPT_TOKENS = 24
_NEW_TOKENS = 8
_STRIDE = 7919  # a prime, so that the prompt's ids spread over any vocabulary


@dataclass(frozen=True)
class LogitComparison:
    """max_abs_diff: over all logits of prompt and continuation, up to the first token that differs."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    max_abs_diff: float

    def within(self, tolerance: float) -> bool:
        """Whether the greedy tokens agree and no logit differs by more than `tolerance`."""
        return self.ids[0] == self.ids[1] and self.max_abs_diff <= tolerance


def compare_logits(a: Checkpoint, b: Checkpoint, *, num_threads: int | None = None) -> LogitComparison:
    """Continue a fixed prompt greedily with each checkpoint and compare tokens and logits.

    Weights are used as bfloat16 where both checkpoints store that, else as float32; quantised ones as they are.
    """
    dtypes = {c.dtype_of(name) for c in (a, b) for name in c.names()}
    dtype = torch.bfloat16 if dtypes <= {torch.bfloat16, torch.int8, torch.uint8} else torch.float32
    threads = num_threads or torch.get_num_threads()
    (ids_a, logits_a), (ids_b, logits_b) = (_greedy(c, dtype, threads) for c in (a, b))
    # The logits that chose token n depend on tokens before n only.
    agreed = next((n for n, (x, y) in enumerate(zip(ids_a, ids_b, strict=True)) if x != y), _NEW_TOKENS)
    rows = _PROMPT_TOKENS + min(agreed, _NEW_TOKENS - 1)
    diff = (logits_a[:rows] - logits_b[:rows]).abs().nan_to_num(nan=torch.inf)
    return LogitComparison((tuple(ids_a), tuple(ids_b)), float(diff.max()))


@torch.no_grad()
def _greedy(checkpoint: Checkpoint, dtype: torch.dtype, num_threads: int) -> tuple[list[int], Tensor]:
    """New token ids, and the logits at every position from the prompt's first on."""
    config, num_tokens = checkpoint.config, _PROMPT_TOKENS + _NEW_TOKENS
    model = load_network(checkpoint, config, dtype, select_ops(CPU, num_threads=num_threads), num_tokens)
    kv = one_sequence_cache(config, config.num_hidden_layers, num_tokens)
    ids = _prompt(config)
    new: list[int] = []
    logits = []
    start = 0
    while len(new) < _NEW_TOKENS:
        hidden_TD = model.forward(one_sequence(ids, start, kv.num_blocks), kv)
        logits.append(model.logits(hidden_TD)[:, : config.vocab_size])
        start += len(ids)
        ids = [int(logits[-1][-1].argmax())]
        new += ids
    return new, torch.cat(logits)


def _prompt(config: ModelConfig) -> list[int]:
    return [(1 + i * _STRIDE) % config.vocab_size for i in range(_PROMPT_TOKENS)]
