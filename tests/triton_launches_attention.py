"""Attention as models of several shapes launch it; see tests/triton_compile.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_infer.kernels.triton import attention

SHAPES = {  # heads, KV heads, head_dim, dtype
    "aixcoder": (32, 8, 128, torch.bfloat16),
    "head64": (24, 3, 64, torch.bfloat16),
    "head96": (32, 32, 96, torch.float16),
    "head128": (16, 2, 128, torch.bfloat16),
    "head256": (16, 8, 256, torch.bfloat16),
    "fp32": (32, 8, 128, torch.float32),
}


def attend(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tokens: int, sequences: int) -> None:
    def index(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    q_TNH = torch.empty(tokens, heads, head_dim, dtype=dtype, device="meta")
    k_cache, v_cache = torch.empty(2, 500, kv_heads, 16, head_dim, dtype=dtype, device="meta")
    tables = (index(sequences, 256), index(sequences + 1), index(sequences))
    attention.paged_attention(q_TNH, k_cache, v_cache, *tables, 0.1, num_sms=132)


LAUNCHES: dict[str, Callable[[], None]] = {
    f"{phase} {name}": partial(attend, *shape, tokens, sequences)
    for name, shape in SHAPES.items()
    for phase, tokens, sequences in [
        ("decode", 64, 64),
        ("decode one", 1, 1),
        ("decode drafts", 40, 8),
        ("prefill", 600, 1),
    ]
}
