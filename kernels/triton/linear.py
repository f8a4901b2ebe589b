"""Linear layers on the GPU: the ops allocate_linear, pack_rows, pack_quantized and linear, and their fusions.

Few tokens stream the weights (linear_gemv.py up to 4, linear_tiles.py up to 16); many go to torch's own product where
weights are plain, and to linear_tiles.py, which expands them tile by tile in registers, where they are quantised.
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

MAX_FUSED_TOKENS = 16
"""Of gate_up_silu and linear_add: with more, the product is worth more than the launches saved."""
MAX_NORM_TOKENS = linear_gemv.MAX_TOKENS
"""Of the launches that begin with RMSNorm."""


def linear(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """y_TN = x W^T + b in the dtype of x, summed in fp32, the bias (fp32) last.

    Products: up to 4 tokens, exact. More: plain ones as the tensor cores give them (exact for 16-bit weights), of a
    quantised weight those of value * scale rounded to the dtype of x. Activations are not rounded to integers.
    A row's bits do not depend on the other rows, nor on their number within each of 1, 2, 3, 4, 5 .. 16 tokens (plain)
    or 1, 2, 3, 4, 5 .. 16, 17 .. 64, 65 and more (quantised; fp32 activations: 17 and more).
    """
    num_tokens = x_TK.shape[0]
    if num_tokens > MAX_FUSED_TOKENS and packed.dtype not in QUANTIZED:
        weight_NK = packed.data[:, 0, : packed.in_dim]
        y_TN = F.linear(x_TK.to(packed.dtype), weight_NK).to(x_TK.dtype)
        return y_TN if packed.bias is None else y_TN.add_(packed.bias)
    y_TN = torch.empty(num_tokens, packed.out_dim, dtype=x_TK.dtype, device=x_TK.device)
    _write(x_TK, packed, y_TN)
    return y_TN


def gate_up_silu(x_TK: Tensor, packed: PackedLinear) -> Tensor:
    """silu_mul(linear(x, gate_up)), the gate and up rows of an output in one program; up to 16 tokens.

    Gate and up are not rounded in between: closer to exact than the two ops, not equal to them.
    """
    assert x_TK.shape[0] <= MAX_FUSED_TOKENS
    y_TF = torch.empty(x_TK.shape[0], packed.out_dim // 2, dtype=x_TK.dtype, device=x_TK.device)
    _write(x_TK, packed, y_TF, parts=2)
    return y_TF


def linear_add(x_TK: Tensor, packed: PackedLinear, residual_TN: Tensor) -> None:
    """residual += linear(x), the sum rounded once; up to 16 tokens. For one rank: others' sums must come before."""
    assert x_TK.shape[0] <= MAX_FUSED_TOKENS
    _write(x_TK, packed, residual_TN, residual_TN=residual_TN)


def norm_linear(x_TK: Tensor, norm_K: Tensor, eps: float, packed: PackedLinear) -> Tensor:
    """linear(rms_norm(x)), without rounding the norm; up to 4 tokens. Every program sums the squares along the way."""
    assert x_TK.shape[0] <= MAX_NORM_TOKENS
    y_TN = torch.empty(x_TK.shape[0], packed.out_dim, dtype=x_TK.dtype, device=x_TK.device)
    linear_gemv.gemv(x_TK.contiguous(), packed, y_TN, norm_K=norm_K, eps=eps)
    return y_TN


def norm_gate_up_silu(x_TK: Tensor, norm_K: Tensor, eps: float, packed: PackedLinear) -> Tensor:
    """gate_up_silu(rms_norm(x)), without rounding the norm; up to 4 tokens."""
    assert x_TK.shape[0] <= MAX_NORM_TOKENS
    y_TF = torch.empty(x_TK.shape[0], packed.out_dim // 2, dtype=x_TK.dtype, device=x_TK.device)
    linear_gemv.gemv(x_TK.contiguous(), packed, y_TF, parts=2, norm_K=norm_K, eps=eps)
    return y_TF


def _write(
    x_TK: Tensor, packed: PackedLinear, y_TN: Tensor, *, parts: int = 1, residual_TN: Tensor | None = None
) -> None:
    num_tokens = x_TK.shape[0]
    if num_tokens == 0:
        return
    if num_tokens <= linear_gemv.MAX_TOKENS:
        linear_gemv.gemv(x_TK.contiguous(), packed, y_TN, parts=parts, residual_TN=residual_TN)
        return
    operand_TK = x_TK if packed.dtype in QUANTIZED else x_TK.to(packed.dtype)
    linear_tiles.tiles(operand_TK.contiguous(), packed, y_TN, parts=parts, residual_TN=residual_TN)
