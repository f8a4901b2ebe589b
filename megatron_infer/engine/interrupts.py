"""Ctrl-C and collectives: an interrupt must not tear a step apart, or the ranks fall out of step.

Both guards act in the main thread only, where Python delivers signals, and obey a second Ctrl-C at once: a rank may
hang.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block is complete, then deliver it."""
    with interrupt_left_to_rank_0() as pressed:
        yield
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupt_left_to_rank_0() -> Iterator[list[bool]]:
    """Hold Ctrl-C back for good: a terminal sends it to every rank, and rank 0 tells the others how the call ends.

    Yields a list that is non-empty once Ctrl-C was pressed.
    """
    pressed: list[bool] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield pressed
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
