"""The ops of CUDA GPUs made of Triton kernels; rows of the embedding table are torch's to gather.

Owns which launcher is which op, and which launches make half a decoder layer: five for a whole layer of up to 4 tokens.
Importing it imports triton, so dispatch.select does so where there is a GPU only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_infer.kernels.triton import activation, attention, linear, linear_deterministic, linear_storage
from megatron_infer.kernels.triton import argmax as argmax_launch
from megatron_infer.kernels.triton import norm as norm_launch
from megatron_infer.kernels.triton import rope as rope_launch
from megatron_infer.kernels.triton.linear_rope import norm_qkv_rope_store_kv
from megatron_infer.ops import BatchView, Heads, LayerKV, NormWeight, Ops, PackedLinear, Rope, Stream


class DeterministicTritonOps(Ops):
    """A row's bits depend on nothing but its own sequence. Activations between norms are fp32.

    Args:
        num_sms: streaming multiprocessors of the GPU.
        device: the GPU; paged_attention keeps its counters there, for one stream.
    """

    is_recordable = True
    is_deterministic = True

    def __init__(self, num_sms: int, device: torch.device) -> None:
        self._num_sms, self._counters = num_sms, attention.make_counters(device)

    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        return linear_storage.allocate_linear(out_dim, in_dim, chunk_bounds, dtype, device)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        linear_storage.pack_rows(packed, row_start, weight_NK)

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        linear_storage.pack_quantized(packed, row_start, values_NK, scales_NG)

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        return linear_deterministic.linear(x_TK, packed)

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        return norm_launch.rms_norm(x_TD, *norm)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        return norm_launch.add_rms_norm(x_TD, residual_TD, *norm)

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        return rope_launch.rope_store_kv(
            qkv_TC, *rope, batch.positions_T, batch.slots_T, *kv, num_heads=heads.num, num_kv_heads=heads.num_kv
        )

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        return attention.paged_attention(
            q_TNH, *kv, batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S, batch.max_query_len, scale,
            num_sms=self._num_sms, counters=self._counters, deterministic=self.is_deterministic,
        )  # fmt: skip

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return activation.silu_mul(gate_up_T2F)

    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        return argmax_launch.argmax(logits_SV)

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of the table, in its dtype; ids of int32 or int64 without a conversion."""
        return table_VD.index_select(0, ids_T)


class TritonOps(DeterministicTritonOps):
    """As fast as they go: activations have the weights' dtype, and half a layer is a few launches."""

    is_deterministic = False

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        return linear.linear(x_TK, packed)

    def attention_layer(
        self, stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView,
        kv: LayerKV, heads: Heads, completes_sum: bool,
    ) -> None:  # fmt: skip
        """3 launches up to 4 tokens, plus 1 where something is pending; 5 with more, or 6.

        Up to 4 tokens q, k and v are not rounded before their rotation, nor is a norm where nothing is pending; up to
        max_fused_tokens no whole product before it is added: closer to exact than the single ops, not equal to them.
        """
        if stream.residual_TD.shape[0] > linear.MAX_NORM_TOKENS:
            q_TNH = self.rope_store_kv(self.linear(self.normed(stream, norm), qkv), rope, batch, kv, heads)
        else:
            weight_D = norm.weight_D if stream.pending_TD is None else None
            x_TD = stream.residual_TD if weight_D is not None else self.normed(stream, norm)
            q_TNH = norm_qkv_rope_store_kv(
                x_TD, weight_D, norm.eps, qkv, *rope, batch.positions_T, batch.slots_T, *kv, heads.num, heads.num_kv
            )
        o_TNH = self.paged_attention(q_TNH, batch, kv, heads.scale)
        self._project(o_TNH.flatten(1), out, stream, completes_sum)

    def feed_forward_layer(
        self, stream: Stream, norm: NormWeight, gate_up: PackedLinear, down: PackedLinear, completes_sum: bool
    ) -> None:
        """2 launches up to 4 tokens where nothing is pending, 3 up to max_fused_tokens, else 4.

        Up to max_fused_tokens gate and up are not rounded before they are multiplied; else as attention_layer.
        """
        num_tokens = stream.residual_TD.shape[0]
        if stream.pending_TD is None and num_tokens <= linear.MAX_NORM_TOKENS:
            hidden_TF = linear.norm_gate_up_silu(stream.residual_TD, norm.weight_D, norm.eps, gate_up)
        elif num_tokens <= linear.max_fused_tokens(gate_up):
            hidden_TF = linear.gate_up_silu(self.normed(stream, norm), gate_up)
        else:
            hidden_TF = self.silu_mul(self.linear(self.normed(stream, norm), gate_up))
        self._project(hidden_TF, down, stream, completes_sum)

    def _project(self, x_TK: Tensor, packed: PackedLinear, stream: Stream, completes_sum: bool) -> None:
        """Add the product to the stream where it is whole and one launch can do both, else leave it pending."""
        if completes_sum and x_TK.shape[0] <= linear.max_fused_tokens(packed):
            linear.linear_add(x_TK, packed, stream.residual_TD)
        else:
            stream.pending_TD = self.linear(x_TK, packed)
