"""No kernel touches memory that is not its own or relies on undefined behaviour, whatever the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_infer.kernels.cpu import abi
from tests.cpu.native_programs import build_exercise, load_build, report_of, require_compiler, require_working

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-DEXACT_ON_HEAP"]
# Line numbers without variables, and checks by function call rather than in place: compiles in a quarter of the time.
QUICKLY = ["-O1", "-g1"]
GCC_QUICKLY = ["--param", "asan-instrumentation-with-call-threshold=0"]


@pytest.mark.slow
def test_kernels_run_clean_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = require_compiler()
    require_working(compiler, SANITIZERS, tmp_path)
    flags = [*SANITIZERS, *QUICKLY, *([] if load_build().is_clang(compiler) else GCC_QUICKLY)]
    sanitized = report_of([str(build_exercise("sanitizers", compiler, flags))])
    assert "generic" in sanitized[0]


@pytest.mark.skipif(not abi.LIBRARY.exists(), reason="the native library is not built")
def test_the_built_library_stays_within_its_arguments() -> None:
    """The same, optimised as users get it; instead of sanitizers an inaccessible page behind every argument."""
    report_of([str(build_exercise("exercise", require_compiler(), ["-O1"], library=abi.LIBRARY))])
