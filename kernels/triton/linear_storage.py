"""How the Triton linear layers store a weight, and the pieces of device code that read it.

Rows lie one after the other, padded along K to whole vectors: plain and fp8 weights as they are, int8 and int4 as int32
words of 4 and 8, from which two or three instructions make a float. Knows no launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_infer.ops import GROUP, INT4, QUANTIZED, PackedLinear
from megatron_infer.ops.fp8 import FP8, quantize_rows

BITS_OF_256 = 135 << 23
"""Of the float, with the last bit of the integer part at bit 15."""
_PADDING = 16
"""Rows of plain weights start at multiples of this many elements, whatever K: every load can be 16 bytes wide."""


@dataclass(frozen=True)
class Storage:
    """How to read `PackedLinear.data`, [out_dim, planes, words].

    Attributes:
        planes: 2 for int8: the first halves of all groups of a row, then the second halves. Else 1.
        fields: weights of one k order in the words of all planes: 8 for quantised weights, 1 for plain ones.
        scales_NG: of quantised weights, bf16, rows padded with zeros to 16 groups so that loads can be wide.
        scales_N: of fp8 weights, fp32; they are plain but for it.
    """

    planes: int
    fields: int
    scales_NG: Tensor | None = None
    scales_N: Tensor | None = None


def allocate_linear(
    out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> PackedLinear:
    """[out_dim, padded in_dim]; the padding is zero, so that kernels may multiply it."""
    if dtype not in QUANTIZED:
        width = -(-in_dim // _PADDING) * _PADDING
        data = torch.empty(out_dim, 1, width, dtype=dtype, device=device)
        data[:, :, in_dim:] = 0
        scales_N = torch.empty(out_dim, dtype=torch.float32, device=device) if dtype == FP8 else None
        return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=Storage(1, 1, scales_N=scales_N))
    planes = 1 if dtype == INT4 else 2
    num_groups = -(-in_dim // GROUP)
    data = torch.empty(out_dim, planes, num_groups * 4, dtype=torch.int32, device=device)
    scales_NG = torch.zeros(out_dim, triton.cdiv(num_groups, 16) * 16, dtype=torch.bfloat16, device=device)
    return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=Storage(planes, 8, scales_NG))


def pack_rows(packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
    """Store rows row_start .. row_start + N; as fp8, each rounded with its own scale."""
    rows = slice(row_start, row_start + weight_NK.shape[0])
    if packed.dtype == FP8:
        weight_NK, packed.layout.scales_N[rows] = quantize_rows(weight_NK.to(packed.data.device))
    packed.data[rows, 0, : packed.in_dim] = weight_NK


def pack_quantized(packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
    """Store rows row_start .. row_start + N of a quantised weight.

    A group of 32 is 4 words, 16 bytes, in every plane: value 4 i + j is a field of word j, plus 8 or 128. A thread that
    loads 16 bytes per plane has a whole group, hence one scale, and meets 4 consecutive activations for each i.
    """
    num_rows, planes = values_NK.shape[0], packed.layout.planes
    per_word, width = 8 // planes, 4 * planes
    padded_NK = torch.nn.functional.pad(values_NK.to(packed.data.device), (0, -packed.in_dim % GROUP))
    unsigned = padded_NK.to(torch.int32) + (1 << (width - 1))
    fields = unsigned.view(num_rows, -1, planes, per_word, 4).transpose(1, 2)
    words = fields[..., 0, :]
    for i in range(1, per_word):
        words = words | (fields[..., i, :] << (width * i))
    rows = slice(row_start, row_start + num_rows)
    packed.data[rows] = words.flatten(2)
    packed.layout.scales_NG[rows, : scales_NG.shape[1]] = scales_NG


@triton.jit
def k_of_word(word, i: tl.constexpr, FIELDS: tl.constexpr):
    """The k of the i-th weight of each word of a row."""
    if FIELDS == 1:
        return word
    else:
        return word // 4 * 32 + 4 * i + word % 4


@triton.jit
def weight_of_word(word, i: tl.constexpr, PER_WORD: tl.constexpr):
    """The i-th of the weights in each word, in fp32, exact.

    An unsigned field at bit p of a float's mantissa whose exponent is 23 - p reads as 2^(23 - p) + field: one AND and
    one subtraction, no conversion instruction, and a shift only for the fields that reach the exponent.
    """
    if PER_WORD == 1:
        return word.to(tl.float32)
    else:
        WIDTH: tl.constexpr = 32 // PER_WORD
        SHIFT: tl.constexpr = 0 if (i + 1) * WIDTH <= 23 else (16 if WIDTH == 8 else 12)
        BIT: tl.constexpr = i * WIDTH - SHIFT
        # Fields share a word with all exponent bits set and pick theirs with their own bits: an AND and an OR for each
        # would be two instructions, because an instruction holds one constant.
        with_exponents = (word >> SHIFT) | (0xFF << 23)
        bits = with_exponents & ((((1 << WIDTH) - 1) << BIT) | ((150 - BIT) << 23))
        return bits.to(tl.float32, bitcast=True) - ((1 << (23 - BIT)) + (1 << (WIDTH - 1)))


@triton.jit
def offset_weight_of_word(word, i: tl.constexpr, bits_of_256):
    """The i-th of the 8 int4 weights in each word plus `offset_of_weight(i)`, in fp32, exact.

    As weight_of_word, but what is subtracted there is left in, for a sum over many weights to lose at once. Fields
    stand at bits 15 and 19 of the mantissa, where the offset is too small to cost the sum its precision, and two of
    them share a shift. bits_of_256: BITS_OF_256 as an argument of the kernel. An instruction holds one constant; with
    the other in a register, the AND and the OR are one instruction.
    """
    SHIFT: tl.constexpr = 15 - i // 2 * 8
    BIT: tl.constexpr = 15 + i % 2 * 4
    shifted = (word << SHIFT) if SHIFT > 0 else (word >> -SHIFT)
    bits = (shifted & (15 << BIT)) | (bits_of_256 - ((BIT - 15) << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def offset_of_weight(i: tl.constexpr):
    """What offset_weight_of_word adds: the float's leading one, and what makes fields unsigned."""
    return (1 << (8 - i % 2 * 4)) + 8.0


@triton.jit
def weight_operand(word, scale, i: tl.constexpr, PER_WORD: tl.constexpr, dtype: tl.constexpr):
    """The i-th of the weights in each word as an operand of tl.dot; `scale` is one per row and 4 words."""
    weight = weight_of_word(word, i, PER_WORD)
    scaled = tl.reshape(weight, (scale.shape[0], scale.shape[1], 4)) * scale[:, :, None]
    return tl.reshape(scaled, word.shape).to(dtype)
