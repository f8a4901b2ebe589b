"""Makes @triton.jit functions run on CPU tensors: import this before anything that imports triton.

Skips the importing test module where triton is missing, and where there is a GPU, on which tests/gpu runs the kernels
themselves in this same process. compiling.py needs a process without the interpreter.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    pytest.skip("the GPU runs them; TRITON_INTERPRET=1 interprets", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")
assert isinstance(triton.language.sum, interpreter.InterpretedFunction), (
    "triton was imported before, without its interpreter"
)


tl = triton.language
_create_dot, _patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor


def _fp_trunc(builder, src, dst_type):
    """Triton's own interpreter cuts fp32 off at bf16's last bit; a GPU rounds to the nearest."""
    if dst_type.scalar != tl.bfloat16:
        return builder.cast_impl(src, dst_type)
    narrow = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
    return interpreter.TensorHandle(narrow.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)


def _dot(builder, a, b, *rest):
    """bf16 is held as its bits, which would be multiplied as integers; products of bf16 are exact in fp32."""
    a, b = (builder.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(builder, a, b, *rest)


def _patched_tensor(tensor, scope) -> None:
    """A scalar is an array of one element, of which numpy >= 2.4 makes no int: bounds of loops need one."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter.InterpreterBuilder.create_fp_trunc = _fp_trunc
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang_tensor = _patched_tensor
