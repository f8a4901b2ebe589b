"""Paged attention for CUDA: decode and draft verification with split KV, prefill in chunks, any mixture of both.

Chooses the launches from tensor shapes and the longest query alone; lengths stay on the device, so a CUDA graph can
hold them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_infer.kernels.triton.attention_decode import MAX_QUERIES, decode_attention
from megatron_infer.kernels.triton.attention_decode import make_counters as make_counters
from megatron_infer.kernels.triton.attention_prefill import prefill_attention


def paged_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    max_query_len: int,
    scale: float,
    *,
    num_sms: int,
    counters: Tensor,
    deterministic: bool = False,
) -> Tensor:
    """The op of that name (megatron_infer.ops), o_TNH in the dtype of q. Softmax and sums are fp32.

    One launch, but two for several sequences of which one has more than 16 queries: those that have take the prefill
    kernel. Which kernel a row takes depends only on its sequence's query length, and so do its bits.

    Args:
        num_sms: streaming multiprocessors of the device: how finely work is cut, not what comes out.
        counters: make_counters(device), for one stream.
        deterministic: a row's bits depend on the keys it sees alone, however many queries come with it. One launch.
    """
    tensors = (q_TNH, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S)
    assert all(tensor.is_contiguous() for tensor in tensors)
    o_TNH = torch.empty_like(q_TNH)
    is_prefill = max_query_len > MAX_QUERIES and not deterministic
    if is_prefill:
        prefill_attention(o_TNH, *tensors, scale, min_query_len=MAX_QUERIES + 1)
    if not is_prefill or block_tables_SB.shape[0] > 1:
        longest = MAX_QUERIES if is_prefill else max_query_len
        decode_attention(o_TNH, *tensors, scale, max_query_len=longest, num_sms=num_sms, counters=counters)
    return o_TNH
