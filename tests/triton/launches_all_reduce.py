"""The launches of the all-reduce, in the shapes of aiXcoder-7B and of odd ones; see compiling.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_infer.kernels.triton.all_reduce import MAX_PROGRAMS, Peers, all_reduce

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launch(ranks: int, tokens: int, dim: int, x: torch.dtype, y: torch.dtype, add: bool = True) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    peers = Peers(meta(ranks, dtype=torch.int64), meta(2, MAX_PROGRAMS), meta(1), rank=1)
    all_reduce(meta(tokens, dim, dtype=x), meta(tokens, dim, dtype=y), peers, add=add)


LAUNCHES: dict[str, Callable[[], None]] = {
    "decode 8 ranks": partial(launch, 8, 1, 4096, BF16, BF16),
    "decode 2 ranks": partial(launch, 2, 1, 4096, BF16, BF16),
    "decode 4 ranks, fp16": partial(launch, 4, 4, 4096, FP16, FP32),
    "decode 8 ranks, largest": partial(launch, 8, 16, 8192, FP32, FP32),
    "decode 8 ranks, 32 tokens": partial(launch, 8, 32, 8192, BF16, FP32),
    "decode 2 ranks, odd width": partial(launch, 2, 3, 77, FP32, BF16),
    "decode sum": partial(launch, 4, 1, 4096, BF16, BF16, add=False),
    "decode sum, fp32": partial(launch, 8, 16, 4096, FP32, FP32, add=False),
}
