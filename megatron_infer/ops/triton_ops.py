"""The op table of CUDA GPUs made of Triton kernels; rows of the embedding table are torch's to gather.

Owns which launcher is which op. Importing it imports triton, so ops.dispatch does so where there is a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from megatron_infer.kernels.triton import linear_deterministic
from megatron_infer.kernels.triton.activation import silu_mul
from megatron_infer.kernels.triton.argmax import argmax
from megatron_infer.kernels.triton.attention import paged_attention
from megatron_infer.kernels.triton.linear import (
    MAX_FUSED_TOKENS,
    allocate_linear,
    gate_up_silu,
    linear,
    pack_quantized,
    pack_rows,
)
from megatron_infer.kernels.triton.norm import add_rms_norm, rms_norm
from megatron_infer.kernels.triton.rope import rope_store_kv
from megatron_infer.ops import PackedLinear


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Rows of the table, in its dtype; ids of int32 or int64 without a conversion."""
    return table_VD.index_select(0, ids_T)


def feed_forward_layer(
    x_TD: Tensor, residual_TD: Tensor, norm_D: Tensor, eps: float, gate_up: PackedLinear, down: PackedLinear
) -> Tensor:
    """The second half of a decoder layer: 3 launches up to 16 tokens, 4 with more.

    Up to 16 tokens gate and up are not rounded before they are multiplied: not to the bit what the single ops give.
    """
    x_TD = add_rms_norm(x_TD, residual_TD, norm_D, eps)
    is_fused = x_TD.shape[0] <= MAX_FUSED_TOKENS
    hidden_TF: Tensor = gate_up_silu(x_TD, gate_up) if is_fused else silu_mul(linear(x_TD, gate_up))
    y_TD: Tensor = linear(hidden_TF, down)
    return y_TD


def table(num_sms: int, *, deterministic: bool) -> dict[str, Callable[..., Any]]:
    """The ops by their names.

    Args:
        num_sms: streaming multiprocessors of the GPU.
        deterministic: a row's bits depend on its own sequence and on how many of its tokens are computed at once. Then
            activations between norms are fp32; else they have the weights' dtype and feed_forward_layer is one of the
            ops.
    """
    ops: dict[str, Callable[..., Any]] = {
        "allocate_linear": allocate_linear,
        "pack_rows": pack_rows,
        "pack_quantized": pack_quantized,
        "linear": linear_deterministic.linear if deterministic else linear,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope_store_kv": rope_store_kv,
        "paged_attention": partial(paged_attention, num_sms=num_sms),
        "silu_mul": silu_mul,
        "argmax": argmax,
        "gather_rows": gather_rows,
    }
    return ops if deterministic else {**ops, "feed_forward_layer": feed_forward_layer}
