"""Matrix times one to four vectors at the speed of memory: y_TN = x_TK W^T for decoding, and its fusions.

One kernel for plain, int8 and int4 weights: products and sums in fp32 registers, nothing through shared memory until
the last reduction, no barrier in the loop, every load of weights 16 bytes per thread.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from megatron_infer.kernels.triton.linear_storage import k_of_word, weight_of_word
from megatron_infer.ops import PackedLinear

MAX_TOKENS = 4
_MIN_PROGRAMS = 512
"""About four per streaming multiprocessor of the largest GPUs in mind (132 to 148)."""


@dataclass(frozen=True)
class Tile:
    """Rows and 16-byte vectors per row and plane of a program's tile; its warps: a vector per thread; its registers."""

    block_n: int
    vectors: int
    num_warps: int
    max_registers: int | None


def tile_of(num_tokens: int, out_dim: int, num_vectors: int, parts: int, planes: int, fields: int) -> Tile:
    """16 KiB of weights in a tile where the layer is large enough; fewer rows or warps where it is small.

    A thread has registers for two tiles and, per token and row, for a sum; of quantised weights, for four products
    besides: half the rows there for more than two tokens.

    Args:
        num_vectors: of a row and plane. parts: rows read per output.
    """
    num_warps = 4
    while num_warps > 1 and num_warps // 2 * 32 >= num_vectors:
        num_warps //= 2
    block_n = 8 // (parts * planes)
    if fields > 1 and num_tokens > 2:
        block_n //= 2
    while block_n > 1 and triton.cdiv(out_dim, block_n) < _MIN_PROGRAMS:
        block_n //= 2
    # Told so, the compiler spends registers on loads in flight; four programs per multiprocessor still fit.
    max_registers = 128 if num_tokens == 1 and fields == 1 else None
    return Tile(block_n, num_warps * 32, num_warps, max_registers)


@triton.jit
def _load_tile(w_ptrs, part_words, plane_words, in_row, PARTS: tl.constexpr, PLANES: tl.constexpr):
    """The words of every part and plane. Weights are read once per launch: they are the first to leave the caches."""
    tiles = ()
    for part in tl.static_range(PARTS):
        for plane in tl.static_range(PLANES):
            offset = part * part_words + plane * plane_words
            tiles += (tl.load(w_ptrs + offset, mask=in_row[None, :], other=0, eviction_policy="evict_first"),)
    return tiles


@triton.jit(do_not_specialize_on_alignment=("scale_stride",))
def gemv_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    out_dim,
    in_dim,
    num_vectors,
    scale_stride,
    eps,
    NUM_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    FIELDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """y[t, n] = epilogue(sum_k x[t, k] w[n, k]); PARTS = 2: silu(row n) * row (n + out_dim).

    num_vectors: of 16 bytes (VECTOR words) in a plane of a row; of quantised weights, groups. norm_ptr: x is multiplied
    by it and y by 1 / rms(x), which is RMSNorm of x. residual_ptr: y is added to that. scale_stride is kept from being
    known as a multiple of 16: so a thread loads its own group's scale, not 8 neighbours' to exchange in shared memory.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    vector = tl.arange(0, BLOCK_W // VECTOR)
    # Rows past the end read the last row again, and are not stored: cheaper than a mask per load.
    row = tl.minimum(n, out_dim - 1).to(tl.int64)
    plane_words = num_vectors * VECTOR
    row_words = plane_words.to(tl.int64) * PLANES
    part_words, part_scales = out_dim * row_words, out_dim.to(tl.int64) * scale_stride
    w_ptrs = w_ptr + (row * row_words)[:, None] + word[None, :]
    sums = (tl.zeros((BLOCK_N, BLOCK_W // VECTOR), tl.float32),) * (PARTS * NUM_TOKENS)
    squares = (tl.zeros((BLOCK_W // VECTOR,), tl.float32),) * NUM_TOKENS
    if FIELDS == 1:
        tiles = _load_tile(w_ptrs, part_words, plane_words, word // VECTOR < num_vectors, PARTS, PLANES)
    for start in range(0, plane_words, BLOCK_W):
        first = start // VECTOR
        scales = ()
        if FIELDS == 1:
            # All loads of the next tile are under way at once: left alone, the compiler mixes them with the products.
            ahead = (first + BLOCK_W // VECTOR) + word // VECTOR
            next_ptrs = w_ptrs + (start + BLOCK_W)
            next_tiles = _load_tile(next_ptrs, part_words, plane_words, ahead < num_vectors, PARTS, PLANES)
        else:
            # Registers for a second tile would cost more programs per multiprocessor than they are worth.
            in_row = first + word // VECTOR < num_vectors
            tiles = _load_tile(w_ptrs + start, part_words, plane_words, in_row, PARTS, PLANES)
            scale_ptrs = scales_ptr + (row * scale_stride)[:, None] + (first + vector)[None, :]
            for part in tl.static_range(PARTS):
                scale = tl.load(
                    scale_ptrs + part * part_scales, mask=(first + vector < num_vectors)[None, :], other=0.0
                )
                scales += (scale.to(tl.float32),)
        products = ()
        for i in tl.static_range(FIELDS):
            k = k_of_word(start + word, i, FIELDS)
            new_products = ()
            new_squares = ()
            for t in tl.static_range(NUM_TOKENS):
                x = tl.load(x_ptr + t * in_dim + k, mask=k < in_dim, other=0.0).to(tl.float32)
                if norm_ptr is not None:
                    square = tl.sum(tl.reshape(x * x, (BLOCK_W // VECTOR, VECTOR)), axis=1)
                    new_squares += (squares[t] + square,)
                    x = x * tl.load(norm_ptr + k, mask=k < in_dim, other=0.0).to(tl.float32)
                for part in tl.static_range(PARTS):
                    word_tile = tiles[part * PLANES + i * PLANES // FIELDS]
                    product = x[None, :] * weight_of_word(word_tile, i % (FIELDS // PLANES), FIELDS // PLANES)
                    if i > 0:
                        product = products[t * PARTS + part] + product
                    new_products += (product,)
            products = new_products
            if norm_ptr is not None:
                squares = new_squares
        new_sums = ()
        for t in tl.static_range(NUM_TOKENS):
            for part in tl.static_range(PARTS):
                product = tl.reshape(products[t * PARTS + part], (BLOCK_N, BLOCK_W // VECTOR, VECTOR))
                total = tl.sum(product, axis=2)
                if FIELDS > 1:
                    total = total * scales[part]
                new_sums += (sums[t * PARTS + part] + total,)
        sums = new_sums
        if FIELDS == 1:
            tiles = next_tiles
    is_output = n < out_dim
    for t in tl.static_range(NUM_TOKENS):
        outputs = ()
        for part in tl.static_range(PARTS):
            y = tl.sum(sums[t * PARTS + part], axis=1)
            if norm_ptr is not None:
                y = y * tl.rsqrt(tl.sum(squares[t], axis=0) / in_dim + eps)
            if bias_ptr is not None:
                y = y + tl.load(bias_ptr + part * out_dim + n, mask=is_output, other=0.0)
            outputs += (y,)
        y = outputs[0]
        if PARTS == 2:
            y = y / (1.0 + tl.exp(-y)) * outputs[1]
        if residual_ptr is not None:
            y = y + tl.load(residual_ptr + t * out_dim + n, mask=is_output, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * out_dim + n, y.to(y_ptr.dtype.element_ty), mask=is_output)


def gemv(
    x_TK: Tensor,
    packed: PackedLinear,
    y_TN: Tensor,
    *,
    parts: int = 1,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    residual_TN: Tensor | None = None,
) -> None:
    """Write y_TN, any floating dtype; see linear.py for the contracts. At most 4 tokens, contiguous."""
    storage, data = packed.layout, packed.data
    num_tokens, out_dim = y_TN.shape
    vector = 16 // data.element_size()
    num_vectors = data.shape[2] // vector
    tile = tile_of(num_tokens, out_dim, num_vectors, parts, storage.planes, storage.fields)
    gemv_kernel[(triton.cdiv(out_dim, tile.block_n),)](
        x_TK, data, storage.scales_NG, packed.bias, norm_K, residual_TN, y_TN,
        out_dim, packed.in_dim, num_vectors, 0 if storage.scales_NG is None else storage.scales_NG.shape[1], eps,
        NUM_TOKENS=num_tokens, PARTS=parts, PLANES=storage.planes, FIELDS=storage.fields, VECTOR=vector,
        BLOCK_N=tile.block_n, BLOCK_W=tile.vectors * vector, num_warps=tile.num_warps, maxnreg=tile.max_registers,
    )  # fmt: skip
