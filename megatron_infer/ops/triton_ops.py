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

from megatron_infer.kernels.triton import attention, linear_deterministic
from megatron_infer.kernels.triton import norm as norm_launch
from megatron_infer.kernels.triton import rope as rope_launch
from megatron_infer.kernels.triton.activation import silu_mul
from megatron_infer.kernels.triton.argmax import argmax
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
from megatron_infer.ops import BatchView, Heads, LayerKV, NormWeight, PackedLinear, PagedAttention, Rope, Stream


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Rows of the table, in its dtype; ids of int32 or int64 without a conversion."""
    return table_VD.index_select(0, ids_T)


def rms_norm(x_TD: Tensor, norm: NormWeight) -> Tensor:
    """The op of that name."""
    y_TD: Tensor = norm_launch.rms_norm(x_TD, *norm)
    return y_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
    """The op of that name."""
    y_TD: Tensor = norm_launch.add_rms_norm(x_TD, residual_TD, *norm)
    return y_TD


def _places(rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> tuple[Any, ...]:
    """How q and k are rotated and where k and v go, as the launchers take it."""
    return (*rope, batch.positions_T, batch.slots_T, *kv, heads.num, heads.num_kv)


def rope_store_kv(qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
    """The op of that name."""
    q_TNH: Tensor = rope_launch.rope_store_kv(qkv_TC, *_places(rope, batch, kv, heads))
    return q_TNH


def paged_attention(q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float, **launch: Any) -> Tensor:
    """The op of that name; `launch` says how, see the launcher."""
    o_TNH: Tensor = attention.paged_attention(
        q_TNH, *kv, batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S, batch.max_query_len, scale,
        **launch,
    )  # fmt: skip
    return o_TNH


def attention_layer(
    stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView, kv: LayerKV,
    heads: Heads, completes_sum: bool, *, attend: PagedAttention,
) -> None:  # fmt: skip
    """The op of that name: 3 launches up to 4 tokens, plus 1 where something is pending; 5 with more, or 6.

    Up to 4 tokens q, k and v are not rounded before their rotation, nor is a norm where nothing is pending; up to
    max_fused_tokens no whole product before it is added: closer to exact than the single ops, not equal to them.
    """
    places = _places(rope, batch, kv, heads)
    if stream.residual_TD.shape[0] > MAX_NORM_TOKENS:
        q_TNH = rope_launch.rope_store_kv(linear(_norm(stream, norm), qkv), *places)
    elif stream.pending_TD is not None:
        q_TNH = norm_qkv_rope_store_kv(_norm(stream, norm), None, norm.eps, qkv, *places)
    else:
        q_TNH = norm_qkv_rope_store_kv(stream.residual_TD, norm.weight_D, norm.eps, qkv, *places)
    _project(attend(q_TNH, batch, kv, heads.scale).flatten(1), out, stream, completes_sum)


def feed_forward_layer(
    stream: Stream, norm: NormWeight, gate_up: PackedLinear, down: PackedLinear, completes_sum: bool
) -> None:
    """The op of that name: 2 launches up to 4 tokens where nothing is pending, 3 up to max_fused_tokens, else 4.

    Up to max_fused_tokens gate and up are not rounded before they are multiplied; else as attention_layer.
    """
    num_tokens = stream.residual_TD.shape[0]
    if stream.pending_TD is None and num_tokens <= MAX_NORM_TOKENS:
        hidden_TF = norm_gate_up_silu(stream.residual_TD, norm.weight_D, norm.eps, gate_up)
    else:
        normed_TD = _norm(stream, norm)
        is_fused = num_tokens <= max_fused_tokens(gate_up)
        hidden_TF = gate_up_silu(normed_TD, gate_up) if is_fused else silu_mul(linear(normed_TD, gate_up))
    _project(hidden_TF, down, stream, completes_sum)


def _norm(stream: Stream, norm: NormWeight) -> Tensor:
    """The norm of the stream, to which what is pending is added first."""
    pending_TD = stream.take_pending()
    if pending_TD is None:
        return rms_norm(stream.residual_TD, norm)
    return add_rms_norm(pending_TD, stream.residual_TD, norm)


def _project(x_TK: Tensor, packed: PackedLinear, stream: Stream, completes_sum: bool) -> None:
    """Add the product to the stream where it is whole and one launch can do both, else leave it pending."""
    if completes_sum and x_TK.shape[0] <= max_fused_tokens(packed):
        linear_add(x_TK, packed, stream.residual_TD)
    else:
        stream.pending_TD = linear(x_TK, packed)


def table(num_sms: int, device: torch.device, *, deterministic: bool) -> dict[str, Callable[..., Any]]:
    """The ops by their names.

    Args:
        num_sms: streaming multiprocessors of the GPU.
        device: the GPU; paged_attention keeps its counters there, for one stream.
        deterministic: a row's bits depend on nothing but its own sequence. Then activations between norms are fp32;
            else they have the weights' dtype and the halves of a layer are among the ops.
    """
    attend = partial(
        paged_attention, num_sms=num_sms, counters=attention.make_counters(device), deterministic=deterministic
    )
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
