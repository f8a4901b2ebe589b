"""Linear layers on the GPU: the ops allocate_linear, pack_rows, pack_quantized and linear, and their fusions.

Few tokens stream the weights (linear_gemv.py up to 4, linear_tiles.py up to 16); many go to torch's own product where
weights are plain (fp8: from 5 tokens on), and to linear_tiles.py, which expands them tile by tile in registers, where
they are quantised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_infer.kernels.triton import linear_gemv, linear_tiles
from megatron_infer.kernels.triton.linear_storage import allocate_linear as allocate_linear
from megatron_infer.kernels.triton.linear_storage import pack_quantized as pack_quantized
from megatron_infer.kernels.triton.linear_storage import pack_rows as pack_rows
from megatron_infer.ops import QUANTIZED, PackedLinear
from megatron_infer.ops.fp8 import FP8, scaled_matmul

MAX_NORM_TOKENS = linear_gemv.MAX_TOKENS
"""Of the launches that begin with RMSNorm."""


def max_fused_tokens(packed: PackedLinear) -> int:
    """Of gate_up_silu and linear_add: with more, the product is worth more than the launches saved."""
    return linear_gemv.MAX_TOKENS if packed.dtype == FP8 else 16


def linear(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """y_TN = x W^T + b in the dtype of x, summed in fp32, the bias (fp32) last.

    Products: up to 4 tokens, exact. More: plain ones as the tensor cores give them (exact for 16-bit weights), of a
    quantised weight those of value * scale rounded to the dtype of x, of an fp8 weight those with x rounded to fp8 row
    by row. Beside int8 and int4, activations are not rounded. Sums of int4 beside 16-bit activations, for 1 and 2
    tokens, are of larger numbers: to within 2^-12 of scale * sum |x| in each group, less than x's own rounding.
    A row's bits do not depend on the other rows, nor on their number within each of 1, 2, 3, 4, 5 .. 16 tokens (plain)
    or 1, 2, 3, 4, 5 .. 16, 17 .. 64, 65 and more (quantised; fp32 activations: 17 and more).
    """
    num_tokens = x_TK.shape[0]
    if num_tokens > max_fused_tokens(packed) and packed.dtype not in QUANTIZED:
        y_TN = _matmul(x_TK, packed)
        return y_TN if packed.bias is None else y_TN.add_(packed.bias)
    y_TN = torch.empty(num_tokens, packed.out_dim, dtype=x_TK.dtype, device=x_TK.device)
    _write(x_TK, packed, y_TN)
    return y_TN


def gate_up_silu(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """silu_mul(linear(x, gate_up)), the gate and up rows of an output in one program; up to max_fused_tokens.

    Gate and up are not rounded in between: closer to exact than the two ops, not equal to them.
    """
    assert x_TK.shape[0] <= max_fused_tokens(packed)
    y_TF = torch.empty(x_TK.shape[0], packed.out_dim // 2, dtype=x_TK.dtype, device=x_TK.device)
    _write(x_TK, packed, y_TF, parts=2)
    return y_TF


def linear_add(x_TK: Tensor, packed: PackedLinear, residual_TN: Tensor) -> None:
    """residual += linear(x), the sum rounded once; up to max_fused_tokens. For one rank: others' sums come before."""
    assert x_TK.shape[0] <= max_fused_tokens(packed)
    _write(x_TK, packed, residual_TN, residual_TN=residual_TN)


def norm_gate_up_silu(x_TK: Tensor, norm_K: Tensor, eps: float, packed: PackedLinear) -> Tensor:
    """gate_up_silu(rms_norm(x)), without rounding the norm; up to 4 tokens. Every program sums the squares anew."""
    assert x_TK.shape[0] <= MAX_NORM_TOKENS
    y_TF = torch.empty(x_TK.shape[0], packed.out_dim // 2, dtype=x_TK.dtype, device=x_TK.device)
    linear_gemv.gemv(x_TK, packed, y_TF, parts=2, norm_K=norm_K, eps=eps)
    return y_TF


def _matmul(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """torch's own product, of plain and fp8 weights."""
    if packed.dtype == FP8:
        weight_NK = packed.data[:, 0]
        padded_TK = F.pad(x_TK, (0, weight_NK.shape[1] - packed.in_dim))
        return scaled_matmul(padded_TK, weight_NK, packed.layout.scales_N)
    return F.linear(x_TK.to(packed.dtype), packed.data[:, 0, : packed.in_dim]).to(x_TK.dtype)


def _write(
    x_TK: Tensor, packed: PackedLinear, y_TN: Tensor, *, parts: int = 1, residual_TN: Tensor | None = None
) -> None:
    num_tokens = x_TK.shape[0]
    if num_tokens == 0:
        return
    if num_tokens <= linear_gemv.MAX_TOKENS:
        linear_gemv.gemv(x_TK, packed, y_TN, parts=parts, residual_TN=residual_TN)
        return
    operand_TK = x_TK if packed.dtype in QUANTIZED else x_TK.to(packed.dtype)
    linear_tiles.tiles(operand_TK.contiguous(), packed, y_TN, parts=parts, residual_TN=residual_TN)
