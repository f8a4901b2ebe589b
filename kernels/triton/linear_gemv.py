"""Matrix times one to four vectors at the speed of memory: y_TN = x_TK W^T for decoding, and its fusions.

One device function for plain, fp8, int8 and int4 weights: products and sums in fp32 registers, nothing through shared
memory until the last reduction, no barrier in the loop, every load of weights 16 bytes per thread (of fp8 weights 8).
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from megatron_infer.kernels.triton import target
from megatron_infer.kernels.triton.linear_storage import (
    BITS_OF_256,
    k_of_word,
    offset_of_weight,
    offset_weight_of_word,
    weight_of_word,
)
from megatron_infer.ops import PackedLinear

MAX_TOKENS = 4
_MIN_PROGRAMS = 512
"""About four per streaming multiprocessor of the largest GPUs in mind (132 to 148)."""


@dataclass(frozen=True)
class Tile:
    """Rows and vectors per row and plane of a program's tile; its warps: a vector per thread; its registers."""

    block_n: int
    vectors: int
    num_warps: int
    max_registers: int | None


def tile_of(num_tokens: int, out_dim: int, num_vectors: int, parts: int, planes: int, fields: int) -> Tile:
    """16 KiB of weights (8 of fp8) in a tile where the layer is large enough; fewer rows or warps where it is small.

    A thread has registers for two tiles and, per token and row, for a sum; of quantised weights, for four products
    besides: half the rows there for more than one token.

    Args:
        num_vectors: of a row and plane. parts: rows read per output.
    """
    num_warps = 4
    while num_warps > 1 and num_warps // 2 * 32 >= num_vectors:
        num_warps //= 2
    block_n = 8 // (parts * planes)
    if fields > 1 and num_tokens > 1:
        block_n //= 2
    while block_n > 1 and triton.cdiv(out_dim, block_n) < _MIN_PROGRAMS:
        block_n //= 2
    # Told so, the compiler spends registers on loads in flight; four programs per multiprocessor still fit. Of int4
    # (one plane) it does so anyway, and for two tokens it needs more.
    has_room = num_tokens == 1 if fields == 1 else planes == 2 and num_tokens <= 2
    max_registers = 128 if has_room else None
    return Tile(block_n, num_warps * 32, num_warps, max_registers)


@triton.jit
def _load_tile(
    w_rows, scale_rows, part_words, plane_words, part_scales, start, num_vectors,
    PARTS: tl.constexpr, PLANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Words start .. start + BLOCK_W of every part and plane of the rows; of a quantised weight, a scale per vector.

    Weights are read once per launch: they are the first to leave the caches.
    """
    word = tl.arange(0, BLOCK_W)
    vector = start // VECTOR + tl.arange(0, BLOCK_W // VECTOR)
    in_row = start // VECTOR + word // VECTOR < num_vectors
    # Written so, the compiler sees VECTOR words in a row and no more, and lets a thread load no more of them at once.
    place = start + (word // VECTOR * VECTOR + word % VECTOR)
    words = ()
    scales = ()
    for part in tl.static_range(PARTS):
        for plane in tl.static_range(PLANES):
            ptrs = w_rows[:, None] + place[None, :] + (part * part_words + plane * plane_words)
            words += (tl.load(ptrs, mask=in_row[None, :], other=0.0, eviction_policy="evict_first"),)
        if scale_rows is not None:
            ptrs = scale_rows[:, None] + vector[None, :] + part * part_scales
            scales += (tl.load(ptrs, mask=(vector < num_vectors)[None, :], other=0.0).to(tl.float32),)
    return words, scales


@triton.jit
def _prefetch_tile(
    w_rows, scale_rows, part_words, plane_words, part_scales, num_vectors,
    PARTS: tl.constexpr, PLANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What the first tile of a quantised weight will load, into the L2 cache, 128 bytes at a time."""
    word = tl.minimum(tl.arange(0, BLOCK_W // 32) * 32, plane_words - 1)
    vector = tl.minimum(tl.arange(0, BLOCK_W // VECTOR // 32) * 32, num_vectors - 1)
    for part in tl.static_range(PARTS):
        for plane in tl.static_range(PLANES):
            _prefetch(w_rows[:, None] + word[None, :] + (part * part_words + plane * plane_words))
        _prefetch(scale_rows[:, None] + vector[None, :] + part * part_scales)


@triton.jit
def _prefetch(ptrs):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1)


@triton.jit
def _add_tile(
    sums, squares, words, scales, start, x_ptr, norm_ptr, in_dim, bits_of_256,
    NUM_TOKENS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, FIELDS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The sums [rows, vectors] of all tokens and parts, and the squares of x for its norm, with one tile's added."""
    BLOCK_N: tl.constexpr = words[0].shape[0]
    BLOCK_W: tl.constexpr = words[0].shape[1]
    # Of int4, x times the weights' offsets: the same for all rows, so that it costs less than an addition per weight.
    # For more tokens there are fewer rows per program, and it would cost more; fp32 activations want exacter sums.
    HAS_OFFSETS: tl.constexpr = FIELDS > 1 and PLANES == 1 and NUM_TOKENS <= 2 and x_ptr.dtype.element_ty != tl.float32
    products = ()
    offsets = (tl.zeros((BLOCK_W,), tl.float32),) * NUM_TOKENS
    for i in tl.static_range(FIELDS):
        k = k_of_word(start + tl.arange(0, BLOCK_W), i, FIELDS)
        new_products = ()
        new_squares = ()
        new_offsets = ()
        for t in tl.static_range(NUM_TOKENS):
            x = tl.load(x_ptr + t * in_dim + k, mask=k < in_dim, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                square = tl.sum(tl.reshape(x * x, (BLOCK_W // VECTOR, VECTOR)), axis=1)
                new_squares += (squares[t] + square,)
                x = x * tl.load(norm_ptr + k, mask=k < in_dim, other=0.0).to(tl.float32)
            if HAS_OFFSETS:
                new_offsets += (offsets[t] + x * offset_of_weight(i),)
            for part in tl.static_range(PARTS):
                word = words[part * PLANES + i * PLANES // FIELDS]
                if HAS_OFFSETS:
                    weight = offset_weight_of_word(word, i, bits_of_256)
                else:
                    weight = weight_of_word(word, i % (FIELDS // PLANES), FIELDS // PLANES)
                product = x[None, :] * weight
                if i > 0:
                    product = products[t * PARTS + part] + product
                new_products += (product,)
        products = new_products
        if HAS_OFFSETS:
            offsets = new_offsets
        if norm_ptr is not None:
            squares = new_squares
    new_sums = ()
    for t in tl.static_range(NUM_TOKENS):
        for part in tl.static_range(PARTS):
            product = tl.reshape(products[t * PARTS + part], (BLOCK_N, BLOCK_W // VECTOR, VECTOR))
            total = tl.sum(product, axis=2)
            if HAS_OFFSETS:
                total = total - tl.sum(tl.reshape(offsets[t], (BLOCK_W // VECTOR, VECTOR)), axis=1)[None, :]
            if FIELDS > 1:
                total = total * scales[part]
            new_sums += (sums[t * PARTS + part] + total,)
    return new_sums, squares


@triton.jit
def multiply_rows(
    row, part_rows, x_ptr, w_ptr, scales_ptr, row_scales_ptr, bias_ptr, norm_ptr, in_dim, num_vectors, scale_stride,
    eps, bits_of_256, NUM_TOKENS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, FIELDS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A tuple of x[t] . w[row + part_rows * p] + bias, fp32 [rows], at t * PARTS + p. `row` is int64 and in range.

    num_vectors: of VECTOR words in a plane of a row; of quantised weights, groups. norm_ptr: x is multiplied by it and
    the sums by 1 / rms(x), which is RMSNorm of x. OVERLAPS: the programs start while the kernel before theirs ends, and
    wait for it with weights under way, the one thing that it has not written; the kernel after theirs may do likewise.
    """
    BLOCK_N: tl.constexpr = row.shape[0]
    plane_words = num_vectors * VECTOR
    row_words = plane_words.to(tl.int64) * PLANES
    part_words, part_scales = part_rows * row_words, part_rows * scale_stride
    w_rows = w_ptr + row * row_words
    scale_rows = None
    if scales_ptr is not None:
        scale_rows = scales_ptr + row * scale_stride
    sums = (tl.zeros((BLOCK_N, BLOCK_W // VECTOR), tl.float32),) * (PARTS * NUM_TOKENS)
    squares = (tl.zeros((BLOCK_W // VECTOR,), tl.float32),) * NUM_TOKENS
    if FIELDS == 1:
        words, scales = _load_tile(
            w_rows, scale_rows, part_words, plane_words, part_scales, 0, num_vectors, PARTS, PLANES, VECTOR, BLOCK_W
        )
    elif OVERLAPS:
        _prefetch_tile(
            w_rows, scale_rows, part_words, plane_words, part_scales, num_vectors, PARTS, PLANES, VECTOR, BLOCK_W
        )
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    for start in range(0, plane_words, BLOCK_W):
        # All loads of the next tile are under way at once: left alone, the compiler mixes them with the products. Of
        # quantised weights, registers for a second tile would cost more programs per multiprocessor than it is worth.
        loaded, loaded_scales = _load_tile(
            w_rows, scale_rows, part_words, plane_words, part_scales, start + BLOCK_W if FIELDS == 1 else start,
            num_vectors, PARTS, PLANES, VECTOR, BLOCK_W,
        )  # fmt: skip
        if FIELDS > 1:
            words, scales = loaded, loaded_scales
        sums, squares = _add_tile(
            sums, squares, words, scales, start, x_ptr, norm_ptr, in_dim, bits_of_256,
            NUM_TOKENS, PARTS, PLANES, FIELDS, VECTOR,
        )  # fmt: skip
        if FIELDS == 1:
            words, scales = loaded, loaded_scales
    outputs = ()
    for t in tl.static_range(NUM_TOKENS):
        for part in tl.static_range(PARTS):
            y = tl.sum(sums[t * PARTS + part], axis=1)
            if norm_ptr is not None:
                y = y * tl.rsqrt(tl.sum(squares[t], axis=0) / in_dim + eps)
            if row_scales_ptr is not None:
                y = y * tl.load(row_scales_ptr + row + part * part_rows)
            if bias_ptr is not None:
                y = y + tl.load(bias_ptr + row + part * part_rows)
            outputs += (y,)
    return outputs


# A scale_stride known as a multiple of 16 would make a thread load 8 neighbours' scales, to exchange in shared memory.
@triton.jit(do_not_specialize_on_alignment=("scale_stride",))
def gemv_kernel(
    x_ptr, w_ptr, scales_ptr, row_scales_ptr, bias_ptr, norm_ptr, residual_ptr, y_ptr,
    out_dim, in_dim, num_vectors, scale_stride, eps, bits_of_256,
    NUM_TOKENS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, FIELDS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """y[t, n] = row n's product; PARTS = 2: silu(row n's) * row (n + out_dim)'s. residual_ptr: y is added to that."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last row again, and are not stored: cheaper than a mask per load.
    row = tl.minimum(n, out_dim - 1).to(tl.int64)
    outputs = multiply_rows(
        row, out_dim.to(tl.int64), x_ptr, w_ptr, scales_ptr, row_scales_ptr, bias_ptr, norm_ptr,
        in_dim, num_vectors, scale_stride, eps, bits_of_256,
        NUM_TOKENS, PARTS, PLANES, FIELDS, VECTOR, BLOCK_W, OVERLAPS,
    )  # fmt: skip
    for t in tl.static_range(NUM_TOKENS):
        y = outputs[t * PARTS]
        if PARTS == 2:
            y = y / (1.0 + tl.exp(-y)) * outputs[t * PARTS + 1]
        if residual_ptr is not None:
            y = y + tl.load(residual_ptr + t * out_dim + n, mask=n < out_dim, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * out_dim + n, y.to(y_ptr.dtype.element_ty), mask=n < out_dim)


def operands(
    x_TK: Tensor, packed: PackedLinear, num_outputs: int, parts: int, norm_K: Tensor | None, eps: float
) -> dict[str, Any]:
    """What every kernel around multiply_rows is launched with: its arguments and the launch's, by name.

    The weights must not be what the kernel launched just before writes: see OVERLAPS there.
    """
    storage, data = packed.layout, packed.data
    # A thread that had 16 fp8 weights would get half of its activations, of which a load brings 8, from its neighbour.
    num_tokens, vector = x_TK.shape[0], min(8, 16 // data.element_size())
    num_vectors = data.shape[2] // vector
    tile = tile_of(num_tokens, num_outputs, num_vectors, parts, storage.planes, storage.fields)
    overlaps = target.has_dependent_launch()
    return {
        "x_ptr": x_TK.contiguous(), "w_ptr": data, "scales_ptr": storage.scales_NG,
        "row_scales_ptr": storage.scales_N, "bias_ptr": packed.bias, "norm_ptr": norm_K,
        "in_dim": packed.in_dim, "num_vectors": num_vectors,
        "scale_stride": 0 if storage.scales_NG is None else storage.scales_NG.shape[1], "eps": eps,
        "bits_of_256": BITS_OF_256,
        "NUM_TOKENS": num_tokens, "PLANES": storage.planes, "FIELDS": storage.fields, "VECTOR": vector,
        "BLOCK_N": tile.block_n, "BLOCK_W": tile.vectors * vector, "OVERLAPS": overlaps,
        "num_warps": tile.num_warps, "maxnreg": tile.max_registers, "launch_pdl": overlaps,
    }  # fmt: skip


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
    """Write y_TN, any floating dtype, contiguous; see linear.py for the contracts. At most 4 tokens."""
    out_dim = y_TN.shape[1]
    shared = operands(x_TK, packed, out_dim, parts, norm_K, eps)
    gemv_kernel[(triton.cdiv(out_dim, shared["BLOCK_N"]),)](
        residual_ptr=residual_TN, y_ptr=y_TN, out_dim=out_dim, PARTS=parts, **shared
    )
