"""The linear layer whose bits depend on nothing but the row: docs/numerics.md's order of sums, on tensor cores.

K is summed in fp32 chunk by chunk, tile by tile from the chunk's first k, and the chunks in a binary tree. One tile
serves every number of tokens, and a rank's chunks are a subtree, so neither batch nor tensor-parallel size shows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_infer.kernels.triton.linear_storage import k_of_word, weight_operand
from megatron_infer.ops import GROUP, PackedLinear

_BLOCK_T, _BLOCK_N = 64, 32
"""With 64 tokens a prompt reads the weights once per 64; 32 rows keep 128 programs for aiXcoder-7B's smallest layer."""
_TILE_WORDS = {1: 128, 8: 32}
"""Words per plane of a tile: of plain weights (fp32: half), of quantised ones."""


@triton.jit(do_not_specialize=["num_tokens"])  # as in linear_tiles.py
def chunk_tree_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    out_dim,
    in_dim,
    num_vectors,
    scale_stride,
    tiles_per_chunk,
    BOUNDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLANES: tl.constexpr,
    FIELDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """y[t, n] in fp32. BOUNDS: of the chunks, in words per plane, all but the last multiples of ALIGNMENT.

    One loop over the tiles of all chunks, short chunks padded with tiles of zeros (which change no bit), so that loads
    run ahead across chunks. Sums wait for their sibling in the tree like the carries of a binary counter: `ones` for
    the second of two chunks, `twos` for the second pair, `fours` for the second half.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    group = tl.arange(0, BLOCK_W // 4)
    row = tl.minimum(n, out_dim - 1).to(tl.int64)
    plane_words = num_vectors * VECTOR
    w_ptrs = w_ptr + (row * plane_words * PLANES)[:, None] + column[None, :]
    x_ptrs = x_ptr + (t.to(tl.int64) * in_dim)[None, :]
    is_token = (t < num_tokens)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    ones, twos, fours = total, total, total
    for step in range(CHUNKS * tiles_per_chunk):
        chunk = step // tiles_per_chunk
        tile = step % tiles_per_chunk
        begin = 0
        end = BOUNDS[1]
        for c in tl.static_range(1, CHUNKS):
            begin = tl.where(chunk == c, BOUNDS[c], begin)
            end = tl.where(chunk == c, BOUNDS[c + 1], end)
        start = tl.multiple_of(begin + tile * BLOCK_W, ALIGNMENT)
        word = start + column
        in_chunk = (word < end)[None, :]
        tiles = ()
        for plane in tl.static_range(PLANES):
            tiles += (tl.load(w_ptrs + (plane * plane_words + start), mask=in_chunk, other=0),)
        if FIELDS > 1:
            first = start // 4 + group
            scale_ptrs = scales_ptr + (row * scale_stride)[:, None] + first[None, :]
            scale = tl.load(scale_ptrs, mask=(first * 4 < end)[None, :], other=0.0).to(tl.float32)
        total = tl.where(tile == 0, 0.0, total)
        for i in tl.static_range(FIELDS):
            k = k_of_word(word, i, FIELDS)[:, None]
            x = tl.load(x_ptrs + k, mask=is_token & (word < end)[:, None] & (k < in_dim), other=0.0)
            w = tiles[i * PLANES // FIELDS]
            if FIELDS > 1:
                w = weight_operand(w, scale, i % (FIELDS // PLANES), FIELDS // PLANES, x.dtype)
            total = tl.dot(w, x, total, input_precision="ieee")
        if CHUNKS > 1:
            is_last = tile == tiles_per_chunk - 1
            pair = ones + total
            half = twos + pair
            ones = tl.where(is_last & (chunk % 2 == 0), total, ones)
            twos = tl.where(is_last & (chunk % 4 == 1), pair, twos)
            fours = tl.where(is_last & (chunk % 8 == 3), half, fours)
    if CHUNKS >= 2:
        total = ones + total
    if CHUNKS >= 4:
        total = twos + total
    if CHUNKS >= 8:
        total = fours + total
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + n, mask=n < out_dim, other=0.0)[:, None]
    at = (t.to(tl.int64) * out_dim)[None, :] + n[:, None]
    tl.store(y_ptr + at, total, mask=is_token & (n < out_dim)[:, None])


def linear(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """y_TN = x W^T + b in fp32, so that ranks add unrounded subtrees; the bias last.

    x is rounded to the weights' dtype (beside quantised weights: to bf16 unless it is fp16), and a quantised weight's
    value * scale to that dtype; products are exact for 16-bit dtypes. fp32 weights: fp32 products.
    """
    storage, data = packed.layout, packed.data
    dtype = packed.dtype if storage.fields == 1 else torch.float16 if x_TK.dtype == torch.float16 else torch.bfloat16
    x_TK = x_TK.to(dtype).contiguous()
    num_tokens, out_dim = x_TK.shape[0], packed.out_dim
    y_TN = torch.empty(num_tokens, out_dim, dtype=torch.float32, device=x_TK.device)
    if num_tokens == 0:
        return y_TN
    bounds = packed.chunk_bounds
    if storage.fields > 1:  # a group is 4 words of each plane
        bounds = tuple(4 * triton.cdiv(k, GROUP) for k in bounds)
    block_w = _TILE_WORDS[storage.fields] // (2 if dtype == torch.float32 else 1)
    longest = max(end - begin for begin, end in zip(bounds, bounds[1:], strict=False))
    vector = 16 // data.element_size()
    scale_stride = 0 if storage.scales_NG is None else storage.scales_NG.shape[1]
    tiles_per_chunk = max(1, triton.cdiv(longest, block_w))
    chunk_tree_kernel[(triton.cdiv(num_tokens, _BLOCK_T), triton.cdiv(out_dim, _BLOCK_N))](
        x_TK, data, storage.scales_NG, packed.bias, y_TN,
        num_tokens, out_dim, packed.in_dim, data.shape[2] // vector, scale_stride, tiles_per_chunk,
        BOUNDS=bounds, ALIGNMENT=_alignment(bounds[:-1]), CHUNKS=len(bounds) - 1,
        PLANES=storage.planes, FIELDS=storage.fields, VECTOR=vector,
        BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, BLOCK_W=block_w, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y_TN


def _alignment(starts: tuple[int, ...]) -> int:
    """The largest power of two, up to 16, that divides them all."""
    return next(power for power in (16, 8, 4, 2, 1) if all(start % power == 0 for start in starts))
