"""The whole way from the residual stream to q and the paged cache for one to four tokens: one launch.

RMSNorm, the fused q, k and v projection (linear_gemv.py), rotation and the cache's new keys and values (rope.py). A
program has both halves of what it rotates: rows h and h + head_dim / 2 of a head are its two parts.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_infer.kernels.triton.linear_gemv import MAX_TOKENS, multiply_rows, operands
from megatron_infer.kernels.triton.rope import rotate_and_store
from megatron_infer.ops import PackedLinear


# scale_stride: as in gemv_kernel. positions and slots: as in rope.py.
@triton.jit(do_not_specialize_on_alignment=("scale_stride", "positions_ptr", "slots_ptr"))
def gemv_rope_kernel(
    x_ptr, w_ptr, scales_ptr, row_scales_ptr, bias_ptr, norm_ptr,
    cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_ptr,
    in_dim, num_vectors, scale_stride, eps, bits_of_256,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_TOKENS: tl.constexpr, PLANES: tl.constexpr, FIELDS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Pairs of rows, counted through the halves of all heads, [q | k | v]."""
    NUM_PAIRS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HALF
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, h = pair // HALF, pair % HALF
    last_pair = tl.minimum(pair, NUM_PAIRS - 1)
    row = (last_pair // HALF * (2 * HALF) + last_pair % HALF).to(tl.int64)
    outputs = multiply_rows(
        row, HALF, x_ptr, w_ptr, scales_ptr, row_scales_ptr, bias_ptr, norm_ptr,
        in_dim, num_vectors, scale_stride, eps, bits_of_256, NUM_TOKENS, 2, PLANES, FIELDS, VECTOR, BLOCK_W, OVERLAPS,
    )  # fmt: skip
    for t in tl.static_range(NUM_TOKENS):
        rotate_and_store(
            outputs[2 * t], outputs[2 * t + 1], t, head, h, pair < NUM_PAIRS,
            cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_ptr,
            NUM_HEADS, NUM_KV_HEADS, HALF, BLOCK_SIZE,
        )  # fmt: skip


def norm_qkv_rope_store_kv(
    x_TK: Tensor,
    norm_K: Tensor | None,
    eps: float,
    packed: PackedLinear,
    cos_PH: Tensor,
    sin_PH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """rope_store_kv(linear(rms_norm(x))), q_TNH in the dtype of x, nothing rounded on the way; up to 4 tokens.

    Args:
        norm_K: fp32; None: x has been normed. packed: the rows of [q heads | k heads | v heads].
        others: see rope.rope_store_kv.
    """
    num_tokens, (block_size, head_dim) = x_TK.shape[0], k_cache.shape[2:]
    assert num_tokens <= MAX_TOKENS and packed.out_dim == (num_heads + 2 * num_kv_heads) * head_dim
    assert all(tensor.is_contiguous() for tensor in (cos_PH, sin_PH, k_cache, v_cache))
    q_TNH = x_TK.new_empty(num_tokens, num_heads, head_dim)
    num_pairs = packed.out_dim // 2
    shared = operands(x_TK, packed, num_pairs, 2, norm_K, eps)
    gemv_rope_kernel[(triton.cdiv(num_pairs, shared["BLOCK_N"]),)](
        cos_ptr=cos_PH, sin_ptr=sin_PH, positions_ptr=positions_T, slots_ptr=slots_T,
        k_cache_ptr=k_cache, v_cache_ptr=v_cache, q_ptr=q_TNH,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, BLOCK_SIZE=block_size, **shared,
    )  # fmt: skip
    return q_TNH
