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
from functools import partial
from pathlib import Path

import triton

from benchmarks.gpu.absent import compiling

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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

    def keep(kernel, launch: str, arch: int) -> None:
        meta = kernel.metadata
        line = {"launch": launch, "kernel": meta.name, "arch": arch}
        line |= {"num_warps": meta.num_warps, "num_stages": meta.num_stages}
        compiled.append(line | resources(kernel.asm["cubin"]) | {"shared_bytes": meta.shared})

    for arch in archs:
        for name, launch in launches.items():
            with compiling(arch, partial(keep, launch=name, arch=arch)):
                launch()
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
