"""RMSNorm, alone and with the addition to the residual stream: one program per row, the row held in registers.

Sums are fp32, in an order that depends on the row's length alone. Reads x, the residual and the weight once and writes
the residual and y once: 4 x D x element size per row, and 4 D bytes of weight that later rows find in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, eps, ADD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * DIM
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    # The weight does not depend on the rows: asked for first, it arrives with them.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    total = tl.load(residual_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        # The next layer adds to what is stored, so the norm is of that too.
        stored = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + columns, stored, mask=inside)
        total = stored.to(tl.float32)
    mean = tl.sum(total * total, axis=0) / DIM
    y = total * (1.0 / tl.sqrt_rn(mean + eps)) * weight
    tl.store(y_ptr + row + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x_TD: Tensor | None, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    assert residual_TD.is_contiguous() and (x_TD is None or x_TD.is_contiguous())
    num_tokens, dim = residual_TD.shape
    y_TD = torch.empty_like(residual_TD)
    block = triton.next_power_of_2(dim)
    _rms_norm_kernel[(num_tokens,)](
        residual_TD if x_TD is None else x_TD,
        residual_TD,
        weight_D,
        y_TD,
        eps,
        ADD=x_TD is not None,
        DIM=dim,
        BLOCK=block,
        # 8 elements per thread: one 16-byte load of bf16.
        num_warps=min(max(block // 256, 1), 16),
    )
    return y_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in the dtype of x; weight_D is fp32."""
    return _launch(None, x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Adds x to the residual in place and returns the norm of the rounded sum, in the dtype of the residual."""
    return _launch(x_TD, residual_TD, weight_D, eps)
