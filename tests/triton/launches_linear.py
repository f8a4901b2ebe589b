"""The launches of the linear layers, in the shapes of aiXcoder-7B and of odd ones; see compiling.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from triton.runtime import driver

from megatron_infer.kernels.triton import linear as layers
from megatron_infer.kernels.triton import linear_deterministic
from megatron_infer.kernels.triton.linear_rope import norm_qkv_rope_store_kv
from megatron_infer.ops import GROUP, INT4, QUANTIZED, PackedLinear, chunk_bounds

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
QKV, OUT, GATE_UP, DOWN = (6144, 4096), (4096, 4096), (28928, 4096), (4096, 14464)
DOWN_OF_EIGHT = (4096, 1824)
"""Of the largest of eight ranks, quantised: 57 groups."""


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> PackedLinear:
    bounds = chunk_bounds(shape[1], GROUP if dtype in QUANTIZED else 1)
    packed = layers.allocate_linear(*shape, bounds, dtype, torch.device("meta"))
    packed.bias = meta(shape[0], dtype=torch.float32) if bias else None
    return packed


def linear(tokens: int, shape: tuple[int, int], dtype: torch.dtype, x: torch.dtype = BF16, bias: bool = False) -> None:
    layers.linear(meta(tokens, shape[1], dtype=x), weight(shape, dtype, bias))


def qkv_rope(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norm: torch.Tensor | None,
    in_dim: int = 4096, x: torch.dtype = BF16, bias: bool = False,
) -> None:  # fmt: skip
    angles, cache = meta(32768, head_dim // 2, dtype=torch.float32), meta(64, kv_heads, 16, head_dim, dtype=x)
    norm_qkv_rope_store_kv(
        meta(tokens, in_dim, dtype=x), norm, 1e-5, weight(((heads + 2 * kv_heads) * head_dim, in_dim), dtype, bias),
        angles, angles, meta(tokens, dtype=torch.int32), meta(tokens, dtype=torch.int64), cache, cache, heads, kv_heads,
    )  # fmt: skip


def layer(tokens: int, dtype: torch.dtype) -> None:
    """The four launches of a decoder layer around attention's."""
    x, norm = meta(tokens, 4096), meta(4096, dtype=torch.float32)
    qkv_rope(tokens, 32, 8, 128, dtype, norm)
    layers.linear_add(x, weight(OUT, dtype), x)
    layers.norm_gate_up_silu(x, norm, 1e-5, weight(GATE_UP, dtype))
    layers.linear_add(meta(tokens, DOWN[1]), weight(DOWN, dtype), x)


def on_fp8_hardware(launch: Callable[[], None]) -> None:
    """Triton has no conversions of float8_e4m3fn for older GPUs, and nobody offers them the format."""
    if driver.active.get_current_target().arch >= 89:
        launch()


def drafts(tokens: int, dtype: torch.dtype) -> None:
    layers.gate_up_silu(meta(tokens, 4096), weight(GATE_UP, dtype))
    layers.linear_add(meta(tokens, DOWN[1]), weight(DOWN, dtype), meta(tokens, 4096))


def exact(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear_deterministic.linear(meta(tokens, shape[1]), weight(shape, dtype))


LAUNCHES: dict[str, Callable[[], None]] = {
    "decode head": partial(linear, 1, (49152, 4096), BF16),
    "decode qkv with bias, int4": partial(linear, 2, QKV, INT4, bias=True),
    "decode qkv of Qwen2 7B": partial(qkv_rope, 1, 28, 4, 128, BF16, meta(3584, dtype=torch.float32), 3584, bias=True),
    "decode qkv of a rank": partial(qkv_rope, 3, 8, 2, 128, INT8, None),
    "decode qkv, fp32, odd sizes": partial(qkv_rope, 2, 7, 1, 80, torch.float32, None, 77, torch.float32, bias=True),
    "decode fp32, odd sizes": partial(linear, 3, (200, 77), torch.float32, torch.float32),
    "decode fp16": partial(linear, 4, OUT, torch.float16, torch.float16),
    "decode a rank's int8": partial(linear, 1, DOWN_OF_EIGHT, INT8),
    "decode drafts, fp32": partial(linear, 16, OUT, torch.float32, torch.float32),
    "decode drafts, odd sizes": partial(linear, 5, (200, 77), BF16, bias=True),
}
for name, dtype in (("bf16", BF16), ("int8", INT8), ("int4", INT4)):
    LAUNCHES[f"decode layer, {name}"] = partial(layer, 1, dtype)
    LAUNCHES[f"decode layer of 4, {name}"] = partial(layer, 4, dtype)
    LAUNCHES[f"decode drafts, {name}"] = partial(drafts, 16, dtype)
    LAUNCHES[f"decode deterministic, {name}"] = partial(exact, 1, DOWN, dtype)
for name, dtype in (("int8", INT8), ("int4", INT4)):
    LAUNCHES[f"decode layer of 2, {name}"] = partial(layer, 2, dtype)
for tokens in (1, 4):
    LAUNCHES[f"decode layer of {tokens}, fp8"] = partial(on_fp8_hardware, partial(layer, tokens, FP8))
LAUNCHES["64 tokens, int8"] = partial(linear, 64, DOWN, INT8)
LAUNCHES["prefill, int8"] = partial(linear, 2048, DOWN, INT8)
LAUNCHES["prefill, int4"] = partial(linear, 2048, DOWN, INT4)
LAUNCHES["prefill, int8 beside fp32"] = partial(linear, 2048, OUT, INT8, torch.float32)
