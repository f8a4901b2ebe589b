"""Packaging, and the build of the CPU kernels into one shared library with the C++ compiler at hand.

A machine without a compiler still gets a working package: the build says so and the ops fall back to plain torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = Path("kernels") / "cpu"
LIBRARY = "libmegatron_infer_cpu.so"
EXTENSION = "megatron_infer.kernels.cpu.libmegatron_infer_cpu"

# The result of an op may not depend on the compiler: no contraction into FMA and no reassociation behind our back.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-maybe-uninitialized",
]
GCC_FLAGS = ["-fno-tree-reassoc"]
# Only these files may contain instructions beyond the baseline; the CPU is asked before one of them is entered.
X86_FLAGS = {
    "variant_avx2.cpp": ["-mavx2", "-mfma"],
    "variant_avx512.cpp": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}


# The page that the server shows: what it is built from stays behind.
PLAYGROUND = [f"playground/*.{suffix}" for suffix in ("html", "css", "js", "svg", "txt")]


def find_compiler() -> list[str] | None:
    """The command of CXX, or the first C++ compiler on the path."""
    named = os.environ.get("CXX")
    if named:
        command = named.split()
        return command if shutil.which(command[0]) else None
    return next(([path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def is_current(target: Path, inputs: list[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime >= path.stat().st_mtime for path in inputs)


def replace_by(command: list[str], target: Path) -> None:
    """Let `command -o FILE` write beside `target`, then move it there: nobody ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        run([*command, "-o", str(partial)])
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_clang(compiler: list[str]) -> bool:
    command = [*compiler, "--version"]
    return "clang" in subprocess.run(command, capture_output=True, text=True, check=True).stdout.lower()


def kernel_sources() -> list[Path]:
    return sorted((ROOT / SOURCES).glob("*.cpp"))


def compile_sources(
    compiler: list[str],
    sources: list[Path],
    objects_dir: Path,
    extra_flags: Sequence[str] = (),
    machine: str = platform.machine(),
) -> list[Path]:
    """Compile those of `sources` that changed, several at a time, for `machine`; the object files."""
    header_crc32 = zlib.crc32((ROOT / SOURCES / "kernels.h").read_bytes())
    flags = [*FLAGS, *([] if is_clang(compiler) else GCC_FLAGS), f"-DMI_HEADER_CRC32={header_crc32}u", *extra_flags]
    is_x86 = machine.lower() in ("x86_64", "amd64")
    folders = {ROOT / SOURCES, *(source.parent for source in sources)}
    headers = [header for folder in folders for header in folder.glob("*.h")]

    def compile_one(source: Path) -> Path:
        target = objects_dir / f"{source.stem}.o"
        extra = X86_FLAGS.get(source.name, []) if is_x86 else []
        if not is_current(target, [source, *headers, Path(__file__)]):
            replace_by([*compiler, *flags, *extra, "-c", str(source)], target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build_library(compiler: list[str], objects_dir: Path, library: Path) -> None:
    """Compile every kernels/cpu/*.cpp that changed and link them into `library`."""
    objects = compile_sources(compiler, kernel_sources(), objects_dir)
    if not is_current(library, objects):
        replace_by([*compiler, "-shared", "-pthread", *map(str, objects)], library)


class BuildNative(build_ext):
    """build_ext whose one extension is the kernels' shared library, loaded with ctypes rather than imported."""

    def is_in_place(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def library_path(self) -> Path:
        return (ROOT if self.is_in_place() else Path(self.build_lib) / "megatron_infer") / SOURCES / LIBRARY

    def run(self) -> None:
        remedy = "; install g++ (or set CXX) and run `pip install -e .` again. The ops will use plain torch meanwhile."
        compiler = find_compiler()
        if compiler is None:
            print(f"CPU kernels not built: no C++ compiler found{remedy}", file=sys.stderr)
            return
        try:
            build_library(compiler, Path(self.build_temp).absolute() / "cpu", self.library_path())
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"CPU kernels not built: {error}{remedy}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        path = self.library_path()
        return [str(path)] if path.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [
            str(path.relative_to(ROOT))
            for path in sorted((ROOT / SOURCES).glob("*.*"))
            if path.suffix in (".cpp", ".h")
        ]


def kernel_packages() -> list[str]:
    """kernels/ has no __init__.py (a PyPI package has its name), so its packages are listed by hand."""
    folders = [path.parent for path in ROOT.glob("kernels/*/*.py")]
    names = sorted({folder.relative_to(ROOT / "kernels").as_posix().replace("/", ".") for folder in folders} | {"cpu"})
    return ["megatron_infer.kernels", *(f"megatron_infer.kernels.{name}" for name in names)]


def requirements(name: str) -> list[str]:
    """The lines of a requirements file: the one place where they are kept."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    setup(
        name="megatron_infer",
        version="0.1.0",
        description="Megatron-style tensor-parallel inference for fill-in-the-middle code models",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=[
            *find_packages(include=["megatron_infer*", "checkpoints_convert*"]),
            *kernel_packages(),
            "megatron_infer.demo",
        ],
        package_dir={"megatron_infer.kernels": "kernels", "megatron_infer.demo": "demo"},
        package_data={
            "megatron_infer": ["*.json", "py.typed"],
            "megatron_infer.text": ["*.json"],
            "megatron_infer.ending": ["*.json"],
            "megatron_infer.serve": ["*.txt", *PLAYGROUND],
            "megatron_infer.serve.dialects": ["*.json"],
            "megatron_infer.eval": ["*.json"],
            "megatron_infer.eval.build": ["*.json"],
            "megatron_infer.eval.report": ["*.html", "*.json"],
            "megatron_infer.eval.score": ["*.json"],
            "megatron_infer.eval.tasks": ["*.json"],
            "megatron_infer.kernels.cpu": ["*.cpp", "*.h"],
            "megatron_infer.demo": ["*.json", "*.md", "*.model", "*.safetensors"],
        },
        py_modules=["sess_huggingface", "sess_megatron"],
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": BuildNative},
        entry_points={"console_scripts": ["megatron-infer=megatron_infer.__main__:main"]},
        install_requires=requirements("requirements.txt"),
        extras_require={
            "dev": [line for part in ("dev", "eval", "serve") for line in requirements(f"requirements-{part}.txt")],
            "eval": requirements("requirements-eval.txt"),
            "gguf": ["gguf"],
            "hub": ["huggingface_hub"],
            "parquet": ["pyarrow"],
            "serve": requirements("requirements-serve.txt"),
        },
    )
