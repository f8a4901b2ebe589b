"""Rotation of q and k, and the paged cache's new keys and values, in one launch: a program per token and 8 heads.

Heads are those of the fused projection, [q | k | v]. The two halves of a head are loaded apart, because they are
rotated against each other. Every element is its own: neither tokens nor heads meet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8


@triton.jit
def rotate_and_store(
    low, high, token, head, h, inside,
    cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_ptr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Elements h and h + HALF of heads of one token, fp32, to where they belong; those not `inside` nowhere.

    low, high and inside have the shape that head and h broadcast to. v is stored as it is.
    """
    angle = tl.load(positions_ptr + token).to(tl.int64) * HALF + h
    cos = tl.load(cos_ptr + angle, mask=h < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=h < HALF, other=0.0)
    turned_low, turned_high = low * cos - high * sin, high * cos + low * sin

    is_q = inside & (head < NUM_HEADS)
    q = q_ptr + (token * NUM_HEADS + head) * (2 * HALF) + h
    tl.store(q, turned_low.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q + HALF, turned_high.to(q_ptr.dtype.element_ty), mask=is_q)

    slot = tl.load(slots_ptr + token)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    place = (((slot // BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * (2 * HALF) + h
    is_k = inside & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    tl.store(k_cache_ptr + place, turned_low.to(k_cache_ptr.dtype.element_ty), mask=is_k)
    tl.store(k_cache_ptr + place + HALF, turned_high.to(k_cache_ptr.dtype.element_ty), mask=is_k)
    is_v = inside & (head >= NUM_HEADS + NUM_KV_HEADS)
    tl.store(v_cache_ptr + place, low.to(v_cache_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_cache_ptr + place + HALF, high.to(v_cache_ptr.dtype.element_ty), mask=is_v)


# The batch's index tensors are cut from one buffer, so their alignment changes from step to step; compiling for each
# would stop the engine now and then.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_store_kv_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_ptr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    h = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (h < HALF)
    source = qkv_ptr + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * (2 * HALF) + h
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    rotate_and_store(
        low, high, token, head, h, inside, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_ptr,
        NUM_HEADS, NUM_KV_HEADS, HALF, BLOCK_SIZE,
    )  # fmt: skip


def rope_store_kv(
    qkv_TC: Tensor,
    cos_PH: Tensor,
    sin_PH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Rotates q and k (half-split, fp32), writes k and v into their slots; q_TNH in the dtype of qkv.

    Args:
        qkv_TC: columns [q heads | k heads | v heads].
        cos_PH, sin_PH: fp32 [positions, head_dim / 2].
        positions_T: int32. slots_T: int64, block * block_size + offset.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], of any floating dtype.
    """
    assert all(tensor.is_contiguous() for tensor in (qkv_TC, cos_PH, sin_PH, k_cache, v_cache))
    num_tokens = qkv_TC.shape[0]
    block_size, head_dim = k_cache.shape[2:]
    q_TNH = qkv_TC.new_empty(num_tokens, num_heads, head_dim)
    half = head_dim // 2
    block_half = triton.next_power_of_2(half)
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))
    _rope_store_kv_kernel[grid](
        qkv_TC, cos_PH, sin_PH, positions_T, slots_T, k_cache, v_cache, q_TNH,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=half, BLOCK_SIZE=block_size,
        HEADS=_HEADS, BLOCK_HALF=block_half, num_warps=max(_HEADS * block_half // 256, 1),
    )  # fmt: skip
    return q_TNH
