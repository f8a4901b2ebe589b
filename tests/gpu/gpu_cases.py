"""What the tests on a GPU share: the device, what it can do, and the weights' formats it takes."""

from __future__ import annotations

import pytest
import torch

from megatron_infer.ops import INT4
from megatron_infer.ops.fp8 import CAPABILITY, FP8

HAS_GPU = torch.cuda.is_available()
CUDA = torch.device("cuda", 0)
HAS_FP8 = HAS_GPU and torch.cuda.get_device_capability(CUDA) >= CAPABILITY
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")
WEIGHTS = ["plain", torch.int8, INT4, pytest.param(FP8, marks=needs_fp8)]
