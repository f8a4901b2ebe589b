"""Compiling Triton kernels for a GPU that is not there: what a launcher starts is compiled for its arguments, not run.

Tensors of device "meta" do for arguments: they have no memory, so they may be of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Absent:
    """Stands in for the CUDA driver; the number of the device is its compute capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _running_by(arch: int, run: Callable[..., Any]) -> Iterator[None]:
    """Within it `run` takes the place of JITFunction.run, for a GPU of compute capability `arch`."""
    original, before = JITFunction.run, driver._active
    driver.set_active(Absent(arch))
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
        driver._active = before  # to ask for it would look for a GPU


@contextmanager
def compiling(arch: int, use: Callable[[Any], object] = lambda kernel: None) -> Iterator[None]:
    """Within it kernels are compiled for compute capability `arch` (90: 9.0) instead of run, and handed to `use`."""
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        use(kernel)
        return kernel

    with _running_by(arch, compile_alone):
        yield


@contextmanager
def counting(arch: int, launches: Counter[str]) -> Iterator[None]:
    """Within it kernels are neither compiled nor run; `launches` counts them by name."""

    def count(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches[self.__name__] += 1

    with _running_by(arch, count):
        yield
