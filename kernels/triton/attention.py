"""Paged attention for CUDA: decode and draft verification with split KV, prefill in chunks, any mixture of both.

Chooses the launches from tensor shapes alone; lengths stay on the device, so a CUDA graph can hold them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_infer.kernels.triton.attention_decode import MAX_QUERIES, decode_attention
from megatron_infer.kernels.triton.attention_prefill import prefill_attention


def paged_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    *,
    num_sms: int,
) -> Tensor:
    """The op of that name (megatron_infer.ops), o_TNH in the dtype of q. Softmax and sums are fp32.

    Every sequence has at least one query, so none has more than T - S + 1. Sequences of up to 16 queries take the
    decode kernels (two launches), longer ones the prefill kernel (one); both where the shapes do not say which. Which
    kernel a row takes depends only on its sequence's query length, and so do its bits.

    Args:
        num_sms: streaming multiprocessors of the device: how finely work is cut, not what comes out.
    """
    tensors = (q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S)
    assert all(tensor.is_contiguous() for tensor in tensors)
    num_sequences = block_tables_SB.shape[0]
    max_query_len = q_TNH.shape[0] - num_sequences + 1
    o_TNH = torch.empty_like(q_TNH)
    if max_query_len <= MAX_QUERIES or num_sequences > 1:
        decode_attention(o_TNH, *tensors, scale, max_query_len=max_query_len, num_sms=num_sms)
    if max_query_len > MAX_QUERIES:
        prefill_attention(o_TNH, *tensors, scale, min_query_len=MAX_QUERIES + 1)
    return o_TNH
