"""Attention as models of several shapes launch it; see compiling.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_infer.kernels.triton import attention

SHAPES = {  # heads, KV heads, head_dim, dtype
    "aixcoder": (32, 8, 128, torch.bfloat16),
    "head64": (24, 3, 64, torch.bfloat16),
    "group1": (8, 8, 64, torch.bfloat16),
    "group7": (28, 4, 128, torch.bfloat16),
    "head96": (32, 32, 96, torch.float16),
    "head128": (16, 2, 128, torch.bfloat16),
    "head256": (16, 8, 256, torch.bfloat16),
    "fp32": (32, 8, 128, torch.float32),
}


def attend(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
    tokens: int, sequences: int, longest: int, deterministic: bool,
) -> None:  # fmt: skip
    def index(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    q_TNH = torch.empty(tokens, heads, head_dim, dtype=dtype, device="meta")
    k_cache, v_cache = torch.empty(2, 500, kv_heads, 16, head_dim, dtype=dtype, device="meta")
    tables = (index(sequences, 256), index(sequences + 1), index(sequences))
    attention.paged_attention(
        q_TNH, k_cache, v_cache, *tables, longest, 0.1,
        num_sms=132, counters=attention.make_counters(torch.device("meta")), deterministic=deterministic,
    )  # fmt: skip


LAUNCHES: dict[str, Callable[[], None]] = {
    f"{phase} {name}": partial(attend, *shape, *batch)
    for name, shape in SHAPES.items()
    for phase, *batch in [
        ("decode", 8, 8, 1, False),
        ("decode drafts", 40, 8, 5, False),
        ("decode whole", 601, 2, 600, True),
        ("prefill", 600, 1, 600, False),
        ("mixture", 601, 2, 600, False),
    ]
}
