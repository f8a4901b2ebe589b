"""The launches of the linear layers, in the shapes of aiXcoder-7B and of odd ones; see triton_compile.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_infer.kernels.triton import linear as layers
from megatron_infer.kernels.triton import linear_deterministic
from megatron_infer.ops import GROUP, INT4, QUANTIZED, PackedLinear, chunk_bounds

BF16, INT8 = torch.bfloat16, torch.int8
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


def layer(tokens: int, dtype: torch.dtype) -> None:
    """The four fused launches of a decoder layer."""
    x, norm = meta(tokens, 4096), meta(4096, dtype=torch.float32)
    layers.norm_linear(x, norm, 1e-5, weight(QKV, dtype))
    layers.linear_add(x, weight(OUT, dtype), x)
    layers.norm_gate_up_silu(x, norm, 1e-5, weight(GATE_UP, dtype))
    layers.linear_add(meta(tokens, DOWN[1]), weight(DOWN, dtype), x)


def drafts(tokens: int, dtype: torch.dtype) -> None:
    layers.gate_up_silu(meta(tokens, 4096), weight(GATE_UP, dtype))
    layers.linear_add(meta(tokens, DOWN[1]), weight(DOWN, dtype), meta(tokens, 4096))


def exact(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear_deterministic.linear(meta(tokens, shape[1]), weight(shape, dtype))


LAUNCHES: dict[str, Callable[[], None]] = {
    "decode head": partial(linear, 1, (49152, 4096), BF16),
    "decode qkv with bias, int4": partial(linear, 2, QKV, INT4, bias=True),
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
LAUNCHES["64 tokens, int8"] = partial(linear, 64, DOWN, INT8)
LAUNCHES["prefill, int8"] = partial(linear, 2048, DOWN, INT8)
LAUNCHES["prefill, int4"] = partial(linear, 2048, DOWN, INT4)
LAUNCHES["prefill, int8 beside fp32"] = partial(linear, 2048, OUT, INT8, torch.float32)
