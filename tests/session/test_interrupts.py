"""Ctrl-C at any moment of a call leaves nothing behind; sessions that are dropped leave nothing open."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from megatron_infer import LLM, FimPrompt, SamplingParams, calls, session
from megatron_infer.engine import interrupts
from tests.support.invariants import check_scheduler
from tests.support.processes import wait_until

PROMPT = FimPrompt("def area(width, height):\n    return ", "\n", "shapes/area.py")
SAMPLING = SamplingParams(max_new_tokens=2, ignore_eos=True)
WATCHED = {module.__file__ for module in (calls, session, interrupts)}

CALLS: dict[str, Callable[[LLM], Any]] = {
    "complete": lambda llm: llm.complete_n(PROMPT, SamplingParams(max_new_tokens=2, ignore_eos=True, n=2)),
    "stream": lambda llm: list(llm.stream(PROMPT, SAMPLING)),
    "batch": lambda llm: list(llm.complete_batch([PROMPT, (PROMPT, SAMPLING)], SAMPLING)),
}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20) as running:
        yield running


def interrupted(call: Callable[[], Any], moment: int) -> tuple[bool, BaseException | None]:
    """Press Ctrl-C at the `moment`-th place in the watched files, and what they call, where Python looks at signals: as
    a function begins, and as one of C returns. Whether it came to that, and what came up."""
    left = moment

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        is_generator = frame.f_code.co_name == "<genexpr>"  # one that is dropped half-way swallows what it raises
        if event in ("call", "c_return") and {frame.f_code.co_filename, caller} & WATCHED and not is_generator:
            left -= 1
            if left == 0:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt as error:
        return True, error
    finally:
        sys.setprofile(None)
    return left <= 0, None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C in Handle.__del__
@pytest.mark.parametrize("name", list(CALLS))
def test_ctrl_c_at_any_moment_leaves_no_ghost(llm: LLM, name: str) -> None:
    expected = [c.text for c in CALLS["batch"](llm)]
    scheduler = llm.session._engine.scheduler
    num_free = scheduler.pool.num_free
    moment, num_raised, is_within = 0, 0, True
    while is_within:
        moment += 1
        # A notebook keeps the last error, and with it all local variables of the call.
        is_within, kept = interrupted(lambda: CALLS[name](llm), moment)
        num_raised += kept is not None
        if name == "stream":
            kept = None  # between two pieces a stream is its user's, to go on or to drop
        assert not llm.session._active, f"{name}, moment {moment}: {kept!r}"
        assert not llm.session.has_work
        check_scheduler(scheduler)
        assert scheduler.pool.num_free == num_free
    assert num_raised > 100
    assert [c.text for c in CALLS["batch"](llm)] == expected


@pytest.mark.parametrize("size", [1, 2])
def test_dropped_sessions_leave_nothing_open(tiny_checkpoint: Path, size: int) -> None:
    def drop_one() -> None:
        llm = LLM(tiny_checkpoint, tensor_parallel_size=size, device="cpu", kv_cache_memory_bytes=4 << 20)
        llm.complete(PROMPT, SAMPLING)
        del llm
        gc.collect()

    def held() -> tuple[int, int, int, int]:
        me = psutil.Process()
        shared = sum("memfd" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return me.num_fds(), shared, me.num_threads(), len(me.children())

    drop_one()
    first = held()
    for _ in range(3):
        drop_one()
        # The thread that a follower was started from ends a moment after it.
        wait_until(lambda: all(now <= before for now, before in zip(held(), first, strict=True)))
