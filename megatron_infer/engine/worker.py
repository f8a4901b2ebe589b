"""The follower ranks: receive each Step from rank 0 and execute it.

Owns the messages between rank 0 and its followers: integers only, never pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_infer.engine.interrupts import interrupt_left_to_rank_0
from megatron_infer.engine.request import Draw, Sampled
from megatron_infer.engine.runner import ModelRunner, Pending
from megatron_infer.engine.step import Step
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup

Ints = npt.NDArray[np.int64]
Result = TypeVar("Result")
Items = Generator[Any, None, None]
"""The results of one collective call, as JSON values."""


class EngineDeadError(RuntimeError):
    """The engine lost a rank and cannot go on; the message says which and why."""


class Kind(IntEnum):
    """What a message from rank 0 asks of the others."""

    STEP = 1
    """execute this Step"""
    RESULT = 2
    """an item of the collective call in progress, as JSON"""
    REFUSED = 3
    """the collective call ends with this error, as `_describe` gives it"""
    END = 4
    """the collective call is over"""
    STOP = 5
    """the engine is closing"""


def send_step(group: TPGroup, step: Step) -> None:
    """Rank 0: have every follower execute `step`."""
    group.broadcast_ints(np.concatenate([[Kind.STEP], step.encode()]).astype(np.int64))


def send_json(group: TPGroup, kind: Kind, payload: Any = None) -> None:
    """Rank 0: send a JSON value as bytes in integers: [kind, number of bytes, bytes padded to 8]."""
    data = json.dumps(payload).encode()
    padded = np.frombuffer(data + b"\0" * (-len(data) % 8), dtype=np.int64)
    group.broadcast_ints(np.concatenate([[kind, len(data)], padded]).astype(np.int64))


def _describe(error: BaseException) -> dict[str, str]:
    """What followers need to raise the error that ended a call on rank 0."""
    for kind in (ValueError, KeyboardInterrupt):
        if isinstance(error, kind):
            return {"type": kind.__name__, "text": str(error)}
    return {"type": "RuntimeError", "text": f"rank 0: {type(error).__name__}: {error}"}


def _described(error: dict[str, str]) -> BaseException:
    kinds = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}
    return kinds.get(error["type"], RuntimeError)(error["text"])


def _read_json(message: Ints) -> Any:
    return json.loads(message[2:].tobytes()[: int(message[1])])


def lead(group: TPGroup, items: Items) -> Items:
    """Rank 0's side of one collective call: yields `items` and has every follower yield the same."""
    try:
        for item in items:
            send_json(group, Kind.RESULT, item)
            yield item
    except GeneratorExit:
        items.close()
        _tell(group, Kind.END)
        raise
    except BaseException as error:
        _tell(group, Kind.REFUSED, _describe(error))
        raise
    send_json(group, Kind.END)


def _tell(group: TPGroup, kind: Kind, payload: Any = None) -> None:
    """Send, unless a rank failed or the group is closed: then nobody is left to tell, and the error in hand says so."""
    with suppress(RankFailure, ValueError):
        send_json(group, kind, payload)


def follow(runner: ModelRunner) -> Items:
    """A follower's side of one collective call: executes steps, yields the items rank 0 yields.

    Closing it early, as rank 0 does when it stops early, still follows to the end of the call.

    Raises:
        ValueError, KeyboardInterrupt: what ended the call on rank 0. RuntimeError: another error ended it there.
        EngineDeadError: a rank died or raised, or rank 0 closed the session.
    """
    try:
        yield from _follow(runner)
    except (RankFailure, _Closed) as error:
        raise EngineDeadError(f"the engine stopped: {error}") from error


class _Closed(Exception):
    """Rank 0 closed the engine."""


def _follow(runner: ModelRunner) -> Items:
    abandoned = False
    while True:
        with interrupt_left_to_rank_0():
            message = runner.tp.broadcast_ints(None)
            kind = Kind(int(message[0]))
            if kind is Kind.STEP:
                start(runner, Step.decode(message[1:]))
        if kind is Kind.RESULT and not abandoned:
            try:
                yield _read_json(message)
            except GeneratorExit:
                abandoned = True
        elif kind is Kind.REFUSED:
            raise _described(_read_json(message))
        elif kind is Kind.END:
            return
        elif kind is Kind.STOP:
            raise _Closed("rank 0 closed the session")


def start(runner: ModelRunner, step: Step, draws: Sequence[Draw] = ()) -> Pending:
    """Start a step; what goes wrong, here or while waiting for it, is told to the other ranks before it is raised."""
    return _Started(runner, _told(runner, lambda: runner.start(step, draws)))


class _Started:
    """A step whose failure is told to the other ranks."""

    def __init__(self, runner: ModelRunner, pending: Pending) -> None:
        self._runner, self._pending = runner, pending

    def wait(self) -> list[list[Sampled]]:
        return _told(self._runner, self._checked)

    def _checked(self) -> list[list[Sampled]]:
        sampled = self._pending.wait()
        # A GPU that no longer waits for a rank that died goes on with whatever it has.
        self._runner.tp.check()
        return sampled


def _told(runner: ModelRunner, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except RankFailure:
        raise
    except Exception as error:
        runner.tp.abort(f"{type(error).__name__}: {error}")
        raise


def serve_follower(runner: ModelRunner) -> None:
    """Follow until rank 0 closes the engine (followers started by this package)."""
    while True:
        try:
            for _ in _follow(runner):
                continue
        except _Closed:
            return
