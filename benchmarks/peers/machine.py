"""The machine: its ceilings, measured by ceilings.cpp, and what a reader needs to know about it and about the code."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

BENCHMARKS = Path(__file__).resolve().parents[1]

BUSY_LOAD = 0.5
"""Load average above which figures are not worth keeping: a second program takes a core from one engine or another."""

_ISA_FLAGS = {
    "avx512": ("-DVECTOR_BYTES=64", "-mavx512f", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-DVECTOR_BYTES=32", "-mavx2", "-mfma"),
    "neon": ("-DVECTOR_BYTES=16",),
    "generic": ("-DVECTOR_BYTES=16",),
}

_TOLD_FLAGS = ("avx", "avx2", "f16c", "fma", "avx_vnni", "avx512", "amx")
"""Beginnings of the CPU flags worth telling."""

_MEGABYTES_PER_THREAD, _SAMPLES = 256, 12


class Ceilings:
    """ceilings.cpp, compiled for one instruction set; each `measure` is a run of its own."""

    def __init__(self, directory: Path, isa: str, threads: int) -> None:
        self._program, self._threads = directory / "ceilings", threads
        command = ["g++", "-O3", "-std=c++17", "-pthread", *_ISA_FLAGS[isa], str(BENCHMARKS / "ceilings.cpp")]
        subprocess.run([*command, "-o", str(self._program)], check=True)

    def measure(self) -> dict[str, float]:
        """Median and best read bandwidth in GB/s and fp32 multiply-adds in GFLOP/s."""
        command = [str(self._program), str(self._threads), str(_MEGABYTES_PER_THREAD), str(_SAMPLES)]
        out: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return out


def _cpu_fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def best_isa() -> str:
    """The widest instruction set of this machine that ceilings.cpp knows."""
    flags = set(_cpu_fields().get("flags", "").split())
    if platform.machine() == "aarch64":
        return "neon"
    if {"avx512f", "fma"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "generic"


def isa_environment(isa: str) -> dict[str, str]:
    """Environment that holds torch's own libraries to `isa` as well, so that transformers is compared at the same."""
    if isa in ("auto", "avx512", "neon"):
        return {}
    capability, onednn, mkl = ("avx2", "AVX2", "AVX2") if isa == "avx2" else ("default", "SSE41", "SSE4_2")
    return {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(BENCHMARKS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def busy_seconds() -> float:
    """Processor time that all programs have used so far, and that the host took from this virtual machine."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def load_average() -> str:
    """Of the last 1, 5 and 15 minutes. The benchmark itself adds the threads it measures with."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def provenance(command: str, isa: str, threads: int) -> dict[str, Any]:
    """Everything about machine and code that the figures depend on."""
    cpu = _cpu_fields()
    flags = [flag for flag in cpu.get("flags", "").split() if flag.startswith(_TOLD_FLAGS)]
    dirty = " (with uncommitted changes)" if _git("status", "--porcelain") else ""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short", "HEAD") + dirty,
        "cpu": f"{cpu.get('model name', platform.machine())}, family {cpu.get('cpu family')}, model {cpu.get('model')}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "cpu flags": " ".join(flags),
        "instruction set": isa,
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load average before": load_average(),
        **{name: _version(name) for name in ("torch", "transformers", "llama-cpp-python", "gguf")},
    }
