"""Single ops through packages that may be installed beside torch: FlashAttention 3 and apex.

Knows what their functions take; imports neither: dispatch.select hands over the function. Both may only make ops.vendor
faster, never differ from it by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_infer.ops import BatchView, LayerKV, NormWeight, Ops, SingleOps

Function = Callable[..., Any]


class FlashAttentionOps(SingleOps):
    """FlashAttention 3's `flash_attn_interface` (hopper/flash_attn_interface.py), which takes pages of any size."""

    def __init__(self, ops: Ops, flash_attn_with_kvcache: Function) -> None:
        super().__init__(ops)
        self._attend, self.is_recordable = flash_attn_with_kvcache, True

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """bf16 or fp16, the cache in the dtype of q.

        Its pages are [block, position, head, dim], of any strides but for the last dim: ours are a view. It reads no
        key and no table entry behind a context.
        """
        o_TNH: Tensor = self._attend(
            q_TNH,
            kv.k.transpose(1, 2),
            kv.v.transpose(1, 2),
            cache_seqlens=batch.context_lens_S,
            page_table=batch.block_tables_SB,
            cu_seqlens_q=batch.query_start_S1,
            max_seqlen_q=batch.max_query_len,
            softmax_scale=scale,
            causal=True,
        )
        return o_TNH


class ApexOps(SingleOps):
    """Apex' extension `fused_layer_norm_cuda` (csrc/layer_norm_cuda.cpp): `rms_forward_affine_mixed_dtypes`."""

    def __init__(self, ops: Ops, rms_forward: Function) -> None:
        super().__init__(ops)
        self._rms_forward = rms_forward

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """Its result has the weight's dtype, fp32, as in ops.vendor before the rounding to the dtype of x."""
        y_TD, _ = self._rms_forward(x_TD, [x_TD.shape[1]], norm.weight_D, norm.eps)
        rounded_TD: Tensor = y_TD.to(x_TD.dtype)
        return rounded_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        """Adds x to the residual in place and returns the norm of the sum."""
        residual_TD += x_TD
        return self.rms_norm(residual_TD, norm)
