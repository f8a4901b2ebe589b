"""SwiGLU's activation, silu(gate) * up: one program per row and 1024 columns.

Computed in fp32 and rounded once. Each element is its own: neither rows nor blocks meet. Moves 3 x F x element size
bytes per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gates = gate_up_ptr + row * 2 * WIDTH + columns
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + WIDTH, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * WIDTH + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up of the columns [gate | up], in their dtype."""
    assert gate_up_T2F.is_contiguous()
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = gate_up_T2F.new_empty(num_tokens, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, block))
    _silu_mul_kernel[grid](gate_up_T2F, y_TF, WIDTH=width, BLOCK=block, num_warps=4)
    return y_TF
