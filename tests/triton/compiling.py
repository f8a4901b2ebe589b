"""python -m tests.triton.compiling MODULE ... --arch 80 90 100: what the launches of MODULE compile to, without a GPU.

MODULE (tests.triton.launches_FAMILY) has LAUNCHES: name -> a function that calls launchers on tensors of device "meta"
(no memory, so any size). Each kernel started is compiled for just those arguments and not run. A JSON line each:
launch, kernel, arch, num_warps, num_stages, registers, stack_bytes (spills live there), shared_bytes. --sampled 80 100
compiles every fourth launch only for these, because a kernel takes half a second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:
    """Stands in for the CUDA driver; the number of the device is its compute capability."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread (registers, stack) of a kernel needs, from the binary itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"] + found["LOCAL"]}


def compile_launches(launches, archs: list[int]) -> list[dict]:
    """Compile every kernel that any of `launches` starts, for every compute capability."""
    compiled: list[dict] = []
    absent, run = Absent(), JITFunction.run
    driver.set_active(absent)

    def run_nothing(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        meta = kernel.metadata
        line = {"launch": name, "kernel": meta.name, "arch": absent.arch}
        line |= {"num_warps": meta.num_warps, "num_stages": meta.num_stages}
        compiled.append(line | resources(kernel.asm["cubin"]) | {"shared_bytes": meta.shared})
        return kernel

    JITFunction.run = run_nothing
    try:
        for absent.arch in archs:
            for name, launch in launches.items():  # noqa: B007  # run_nothing reads it
                launch()
    finally:
        JITFunction.run = run
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--sampled", nargs="+", type=int, default=[])
    args = parser.parse_args()
    for module in args.modules:
        launches = importlib.import_module(module).LAUNCHES
        lines = compile_launches(launches, args.arch)
        lines += compile_launches(dict(list(launches.items())[::4]), args.sampled)
        print(*map(json.dumps, lines), sep="\n")


if __name__ == "__main__":
    main()
