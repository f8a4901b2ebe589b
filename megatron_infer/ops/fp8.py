"""fp8 products, W8A8: rows of float8_e4m3fn with an fp32 scale each, multiplied by torch's scaled matrix product.

Owns the rounding of a row and the call; knows no storage and no table.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
UNIT = 16
"""What both dimensions of a weight must be a multiple of on CUDA; the number of tokens is free."""
CAPABILITY = (8, 9)
"""The first compute capability that multiplies fp8."""
_LARGEST = 448.0
_FEW_TOKENS = 256
_SMALLEST_SCALE = 2.0**-100
"""Of a row of zeros, or nearly: so that no quotient overflows."""


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to fp8, its largest magnitude to the largest number, 448.

    Args:
        x_TK: [T, K] of any floating dtype. K is not 0.
    Returns:
        values_TK: float8_e4m3fn. scales_T: fp32; x is about values * scales. A row with NaN or infinity has a NaN among
        its values, so that every product with it is NaN.
    """
    x_TK = x_TK.float()
    scales_T = (x_TK.abs().amax(dim=1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (x_TK / scales_T.unsqueeze(1)).to(FP8), scales_T


def scaled_matmul(x_TK: Tensor, values_NK: Tensor, scales_N: Tensor) -> Tensor:
    """y_TN = x W^T in the dtype of x, its rows rounded to fp8; summed in fp32, of many tokens rounded to bf16 first.

    Args:
        x_TK: [T, K]. values_NK: float8_e4m3fn, contiguous. scales_N: fp32. N and K are multiples of UNIT on CUDA
            (`_scaled_mm_out_cuda` in PyTorch's ScaledBlas.cpp).
    """
    x_values_TK, x_scales_T = quantize_rows(x_TK)
    scales_T1, scales_1N = x_scales_T.unsqueeze(1), scales_N.unsqueeze(0)
    # bf16 is the one result that the row-wise product has had in every release of torch.
    if x_TK.shape[0] > _FEW_TOKENS:
        y_TN: Tensor = torch._scaled_mm(
            x_values_TK, values_NK.T, scale_a=scales_T1, scale_b=scales_1N, out_dtype=torch.bfloat16
        )
        return y_TN.to(x_TK.dtype)
    # On Hopper cuBLASLt refuses the row-wise product of up to 256 rows where K is long
    # (github.com/pytorch/ao/issues/4582). Scaling afterwards costs one more pass, over few rows.
    one = torch.ones((), device=x_TK.device)
    y_TN = torch._scaled_mm(x_values_TK, values_NK.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return (y_TN * scales_T1 * scales_1N).to(x_TK.dtype)
