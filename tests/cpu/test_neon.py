"""The NEON kernels give the bits that this machine's kernels give, on an emulated AArch64 CPU."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from megatron_infer.kernels.cpu import abi
from tests.cpu.native_programs import build_exercise, report_of, require_compiler, require_working

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
FLAGS = ["-static", "-Wno-psabi"]


@pytest.mark.skipif(
    platform.machine() == "aarch64", reason="NEON is this machine's own variant; see test_sanitizers.py"
)
@pytest.mark.skipif(not abi.LIBRARY.exists(), reason="the native library is not built")
def test_neon_gives_the_same_bits(tmp_path: Path) -> None:
    """Every op on every shape of tests/cpu/native, also within NEON across threads and batches."""
    emulator = next((path for name in EMULATORS if (path := shutil.which(name))), None)
    if emulator is None or not shutil.which(COMPILER):
        pytest.skip(f"needs {COMPILER} and {EMULATORS[0]}: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    require_working([COMPILER], FLAGS, tmp_path, [emulator])
    emulated = report_of([emulator, str(build_exercise("aarch64", [COMPILER], FLAGS, machine="aarch64"))])
    own = report_of([str(build_exercise("exercise", require_compiler(), ["-O1"], library=abi.LIBRARY))])
    assert emulated[0] == "variants neon generic"
    assert emulated[1:] == own[1:]
