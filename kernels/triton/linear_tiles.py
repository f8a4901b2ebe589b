"""Matrix times a tile of vectors on tensor cores: five tokens and more, of quantised weights any number.

Weights are the left operand, so that their long side fills the instruction and 16 tokens are enough for the other. They
become the activations' dtype in registers; no expanded weight exists anywhere.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_infer.kernels.triton.linear_storage import k_of_word, weight_operand
from megatron_infer.kernels.triton.target import has_tensor_memory
from megatron_infer.ops import PackedLinear


@dataclass(frozen=True)
class Tile:
    """Tokens, rows and words per plane of a tile; warps, and tiles under way."""

    block_t: int
    block_n: int
    block_w: int
    num_warps: int
    num_stages: int

    @property
    def tokens_left(self) -> bool:
        """Few tokens are the left operand: each of 4 warps then has 8 rows of weights for itself."""
        return self.block_t == 16


_WIDE = 64 * 264
"""Outputs from which 64 rows per tile still give two programs per streaming multiprocessor (132)."""


def tile_of(
    num_tokens: int, out_dim: int, dtype: torch.dtype, parts: int, fields: int, has_tensor_memory: bool
) -> Tile:
    """For up to 16 tokens, tiles of weights to stream; for more, square ones of which both sides are used again.

    has_tensor_memory: of compute capability 10. There triton 3.6 compiles larger tiles of this kernel to nothing at
    all, without an error; 32 rows keep it on the instructions of the older GPUs.
    """
    if num_tokens <= 16 and fields > 1:
        return Tile(16, 32, 64 // parts, 4, 4)
    if num_tokens <= 16:
        rows = 64 if out_dim * parts >= _WIDE else 32
        return Tile(16, rows // parts, 16384 // (dtype.itemsize * rows), 4, 4)
    if dtype == torch.float32:
        return Tile(32, 32, 16, 4, 2)
    if has_tensor_memory:
        return Tile(64, 32, 32, 4, 3)
    return Tile(64, 64, 32, 4, 3) if num_tokens <= 64 else Tile(128, 128, 16, 8, 3)


# A prompt's last chunk has any number of tokens: compiling for those that 16 divides would stop the engine once more.
@triton.jit(do_not_specialize=["num_tokens"])
def tile_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    num_tokens,
    out_dim,
    in_dim,
    num_vectors,
    scale_stride,
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    FIELDS: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """As gemv_kernel, a tile of tokens per program. Programs of the same rows follow each other: x stays in L2."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    group = tl.arange(0, BLOCK_W // 4)
    # Rows past the end read the last row again, and are not stored.
    row = tl.minimum(n, out_dim - 1).to(tl.int64)
    plane_words = num_vectors * VECTOR
    row_words = plane_words.to(tl.int64) * PLANES
    part_words, part_scales = out_dim * row_words, out_dim.to(tl.int64) * scale_stride
    w_ptrs = w_ptr + (row * row_words)[:, None] + word[None, :]
    x_ptrs = x_ptr + (t.to(tl.int64) * in_dim)[None, :]
    is_token = (t < num_tokens)[None, :]
    if TOKENS_LEFT:
        sums = (tl.zeros((BLOCK_T, BLOCK_N), tl.float32),) * PARTS
    else:
        sums = (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),) * PARTS
    for start in range(0, plane_words, BLOCK_W):
        in_row = ((start + word) // VECTOR < num_vectors)[None, :]
        tiles = ()
        scales = ()
        for part in tl.static_range(PARTS):
            for plane in tl.static_range(PLANES):
                tile_ptrs = w_ptrs + (part * part_words + plane * plane_words + start)
                tiles += (tl.load(tile_ptrs, mask=in_row, other=0),)
            if FIELDS > 1:
                first = start // 4 + group
                scale_ptrs = scales_ptr + part * part_scales + (row * scale_stride)[:, None] + first[None, :]
                scales += (tl.load(scale_ptrs, mask=(first < scale_stride)[None, :], other=0.0).to(tl.float32),)
        for i in tl.static_range(FIELDS):
            k = k_of_word(start + word, i, FIELDS)[:, None]
            x = tl.load(x_ptrs + k, mask=is_token & (k < in_dim), other=0.0)
            new_sums = ()
            for part in tl.static_range(PARTS):
                w = tiles[part * PLANES + i * PLANES // FIELDS]
                if FIELDS > 1:
                    w = weight_operand(w, scales[part], i % (FIELDS // PLANES), FIELDS // PLANES, x.dtype)
                if TOKENS_LEFT:
                    total = tl.dot(tl.trans(x), tl.trans(w), sums[part], input_precision="ieee")
                else:
                    total = tl.dot(w, x, sums[part], input_precision="ieee")
                new_sums += (total,)
            sums = new_sums
    outputs = ()
    for part in tl.static_range(PARTS):
        y = tl.trans(sums[part]) if TOKENS_LEFT else sums[part]
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + part * out_dim + n, mask=n < out_dim, other=0.0)[:, None]
        outputs += (y,)
    y = outputs[0]
    if PARTS == 2:
        y = y / (1.0 + tl.exp(-y)) * outputs[1]
    is_output = is_token & (n < out_dim)[:, None]
    at = (t.to(tl.int64) * out_dim)[None, :] + n[:, None]
    if residual_ptr is not None:
        y = y + tl.load(residual_ptr + at, mask=is_output, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=is_output)


def tiles(
    x_TK: Tensor, packed: PackedLinear, y_TN: Tensor, *, parts: int = 1, residual_TN: Tensor | None = None
) -> None:
    """Write y_TN; see linear.py for the contracts. x_TK is contiguous, of the dtype of plain weights."""
    storage, data = packed.layout, packed.data
    num_tokens, out_dim = y_TN.shape
    tile = tile_of(num_tokens, out_dim, x_TK.dtype, parts, storage.fields, has_tensor_memory())
    vector = 16 // data.element_size()
    tile_kernel[(triton.cdiv(num_tokens, tile.block_t), triton.cdiv(out_dim, tile.block_n))](
        x_TK, data, storage.scales_NG, packed.bias, residual_TN, y_TN,
        num_tokens, out_dim, packed.in_dim, data.shape[2] // vector,
        0 if storage.scales_NG is None else storage.scales_NG.shape[1],
        PARTS=parts, PLANES=storage.planes, FIELDS=storage.fields, VECTOR=vector, TOKENS_LEFT=tile.tokens_left,
        BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_W=tile.block_w,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
