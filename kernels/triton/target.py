"""What the GPU that kernels are launched on can do."""

import triton
from triton.runtime import driver


def _compute_capability() -> int:
    """10 x major + minor; 0 in the interpreter."""
    return 0 if triton.knobs.runtime.interpret else driver.active.get_current_target().arch


def has_dependent_launch() -> bool:
    """Programmatic dependent launch: a kernel may start while the one before it ends, and wait for it when it must."""
    return _compute_capability() >= 90


def has_tensor_memory() -> bool:
    """Tensor cores of compute capability 10."""
    return _compute_capability() >= 100
