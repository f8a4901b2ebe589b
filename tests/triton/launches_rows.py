"""The launches of the row-wise kernels, in the shapes of aiXcoder-7B and of odd ones; see compiling.py."""

from __future__ import annotations

import torch

from megatron_infer.kernels.triton.activation import silu_mul
from megatron_infer.kernels.triton.argmax import argmax
from megatron_infer.kernels.triton.norm import add_rms_norm, rms_norm
from megatron_infer.kernels.triton.rope import rope_store_kv


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def norms(tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight = meta(tokens, dim, dtype=dtype), meta(dim, dtype=torch.float32)
    rms_norm(x, weight, 1e-5)
    add_rms_norm(meta(tokens, dim, dtype=dtype), x, weight, 1e-5)


def rope(tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    angles = meta(32768, head_dim // 2, dtype=torch.float32)
    positions, slots = meta(tokens, dtype=torch.int32), meta(tokens, dtype=torch.int64)
    cache = meta(64, kv_heads, 16, head_dim)
    qkv = meta(tokens, (heads + 2 * kv_heads) * head_dim)
    rope_store_kv(qkv, angles, angles, positions, slots, cache, cache, heads, kv_heads)


LAUNCHES = {
    "decode norm": lambda: norms(1, 4096),
    "decode norm, 8192 wide, fp16": lambda: norms(1, 8192, torch.float16),
    "decode norm, 896 wide, fp32": lambda: norms(1, 896, torch.float32),
    "decode rope": lambda: rope(1, 32, 8, 128),
    "decode rope, head_dim 80": lambda: rope(1, 7, 1, 80),
    "decode rope, head_dim 256": lambda: rope(1, 16, 2, 256),
    "decode silu_mul": lambda: silu_mul(meta(1, 2 * 14464)),
    "decode silu_mul, odd width": lambda: silu_mul(meta(1, 2 * 201)),
    "decode argmax": lambda: argmax(meta(1, 49152)),
    "decode argmax, fp32, odd width": lambda: argmax(meta(5, 152065, dtype=torch.float32)),
}
