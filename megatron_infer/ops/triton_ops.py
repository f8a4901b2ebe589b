"""The op table of CUDA GPUs made of Triton kernels; rows of the embedding table are torch's to gather.

Owns which launcher is which op, and which launches make half a decoder layer: five for a whole layer of up to 4 tokens.
Importing it imports triton, so ops.dispatch does so where there is a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_infer.kernels.triton import linear_deterministic
from megatron_infer.kernels.triton.activation import silu_mul
from megatron_infer.kernels.triton.argmax import argmax
from megatron_infer.kernels.triton.attention import make_counters, paged_attention
from megatron_infer.kernels.triton.linear import (
    MAX_NORM_TOKENS,
    allocate_linear,
    gate_up_silu,
    linear,
    linear_add,
    max_fused_tokens,
    norm_gate_up_silu,
    pack_quantized,
    pack_rows,
)
from megatron_infer.kernels.triton.linear_rope import norm_qkv_rope_store_kv
from megatron_infer.kernels.triton.norm import add_rms_norm, rms_norm
from megatron_infer.kernels.triton.rope import rope_store_kv
from megatron_infer.ops import PackedLinear, PagedAttention


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Rows of the table, in its dtype; ids of int32 or int64 without a conversion."""
    return table_VD.index_select(0, ids_T)


def attention_layer(
    x_TD: Tensor | None,
    residual_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    qkv: PackedLinear,
    out: PackedLinear,
    cos_PH: Tensor,
    sin_PH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    max_query_len: int,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    is_whole: bool,
    *,
    attend: PagedAttention,
) -> Tensor | None:
    """The op of that name: 3 launches up to 4 tokens, plus 1 for an x to add; 5 with more, or 6.

    Up to 4 tokens q, k and v are not rounded before their rotation, nor is a norm without an x to add; up to
    max_fused_tokens no whole product before it is added: closer to exact than the single ops, not equal to them.
    """
    places = (cos_PH, sin_PH, positions_T, slots_T, k_cache, v_cache, num_heads, num_kv_heads)
    if residual_TD.shape[0] > MAX_NORM_TOKENS:
        normed_TD = _add_rms_norm(x_TD, residual_TD, norm_D, eps)
        q_TNH = rope_store_kv(linear(normed_TD, qkv), *places)
    elif x_TD is not None:
        normed_TD = add_rms_norm(x_TD, residual_TD, norm_D, eps)
        q_TNH = norm_qkv_rope_store_kv(normed_TD, None, eps, qkv, *places)
    else:
        q_TNH = norm_qkv_rope_store_kv(residual_TD, norm_D, eps, qkv, *places)
    tables = (block_tables_SB, query_start_S1, context_lens_S)
    o_TNH = attend(q_TNH, k_cache, v_cache, *tables, max_query_len, scale)
    return _project(o_TNH.flatten(1), out, residual_TD, is_whole)


def feed_forward_layer(
    x_TD: Tensor | None,
    residual_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    gate_up: PackedLinear,
    down: PackedLinear,
    is_whole: bool,
) -> Tensor | None:
    """The op of that name: 2 launches up to 4 tokens without an x to add, 3 up to max_fused_tokens, else 4.

    Up to max_fused_tokens gate and up are not rounded before they are multiplied; else as attention_layer.
    """
    num_tokens = residual_TD.shape[0]
    if x_TD is None and num_tokens <= MAX_NORM_TOKENS:
        hidden_TF = norm_gate_up_silu(residual_TD, norm_D, eps, gate_up)
    else:
        normed_TD = _add_rms_norm(x_TD, residual_TD, norm_D, eps)
        is_fused = num_tokens <= max_fused_tokens(gate_up)
        hidden_TF = gate_up_silu(normed_TD, gate_up) if is_fused else silu_mul(linear(normed_TD, gate_up))
    return _project(hidden_TF, down, residual_TD, is_whole)


def _add_rms_norm(x_TD: Tensor | None, residual_TD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    """The norm of the residual, x added where there is one."""
    if x_TD is None:
        normed_TD: Tensor = rms_norm(residual_TD, norm_D, eps)
    else:
        normed_TD = add_rms_norm(x_TD, residual_TD, norm_D, eps)
    return normed_TD


def _project(x_TK: Tensor, packed: PackedLinear, residual_TD: Tensor, is_whole: bool) -> Tensor | None:
    """What is still to be added to the residual: nothing where it is whole and one launch can do both."""
    if is_whole and x_TK.shape[0] <= max_fused_tokens(packed):
        linear_add(x_TK, packed, residual_TD)
        return None
    y_TD: Tensor = linear(x_TK, packed)
    return y_TD


def table(num_sms: int, device: torch.device, *, deterministic: bool) -> dict[str, Callable[..., Any]]:
    """The ops by their names.

    Args:
        num_sms: streaming multiprocessors of the GPU.
        device: the GPU; paged_attention keeps its counters there, for one stream.
        deterministic: a row's bits depend on nothing but its own sequence. Then activations between norms are fp32;
            else they have the weights' dtype and the halves of a layer are among the ops.
    """
    attend = partial(paged_attention, num_sms=num_sms, counters=make_counters(device), deterministic=deterministic)
    ops: dict[str, Callable[..., Any]] = {
        "allocate_linear": allocate_linear,
        "pack_rows": pack_rows,
        "pack_quantized": pack_quantized,
        "linear": linear_deterministic.linear if deterministic else linear,
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope_store_kv": rope_store_kv,
        "paged_attention": attend,
        "silu_mul": silu_mul,
        "argmax": argmax,
        "gather_rows": gather_rows,
    }
    if deterministic:
        return ops
    ops |= {"attention_layer": partial(attention_layer, attend=attend), "feed_forward_layer": feed_forward_layer}
    return ops
