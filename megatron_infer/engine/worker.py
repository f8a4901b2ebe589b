"""The follower ranks: receive each Step from rank 0 and execute it.

Owns the messages between rank 0 and its followers: integers only, never pickle.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import suppress
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.step import Step
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup

Ints = npt.NDArray[np.int64]
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
    """the collective call ends with this error, as `describe` gives it"""
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


def describe(error: BaseException) -> dict[str, Any]:
    """What followers need to raise the error that ended a call on rank 0."""
    if isinstance(error, ValueError):
        return {"is_value_error": True, "text": str(error)}
    return {"is_value_error": False, "text": f"{type(error).__name__}: {error}"}


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
        send_json(group, Kind.END)
        raise
    except BaseException as error:
        # Where a rank failed nobody is left to tell; the error in hand says so.
        with suppress(RankFailure):
            send_json(group, Kind.REFUSED, describe(error))
        raise
    send_json(group, Kind.END)


def follow(runner: ModelRunner) -> Items:
    """A follower's side of one collective call: executes steps, yields the items rank 0 yields.

    Closing it early, as rank 0 does when it stops early, still follows to the end of the call.

    Raises:
        ValueError: rank 0 refused the call; the same text. RuntimeError: another error ended it there.
        EOFError: rank 0 closed the engine.
        EngineDeadError: a rank died or raised.
    """
    try:
        yield from _follow(runner)
    except RankFailure as error:
        raise EngineDeadError(f"the engine stopped: {error}") from error


def _follow(runner: ModelRunner) -> Items:
    abandoned = False
    while True:
        message = runner.tp.broadcast_ints(None)
        kind = Kind(int(message[0]))
        if kind is Kind.STEP:
            execute(runner, Step.decode(message[1:]))
        elif kind is Kind.RESULT and not abandoned:
            try:
                yield _read_json(message)
            except GeneratorExit:
                abandoned = True
        elif kind is Kind.REFUSED:
            error = _read_json(message)
            raise (ValueError(error["text"]) if error["is_value_error"] else RuntimeError(f"rank 0: {error['text']}"))
        elif kind is Kind.END:
            return
        elif kind is Kind.STOP:
            raise EOFError("rank 0 closed the engine")


def execute(runner: ModelRunner, step: Step, draws: Any = ()) -> Any:
    """Run a step; whatever goes wrong here is told to the other ranks before it is raised."""
    try:
        return runner.execute(step, draws)
    except RankFailure:
        raise
    except Exception as error:
        runner.tp.abort(f"{type(error).__name__}: {error}")
        raise


def serve_follower(runner: ModelRunner) -> None:
    """Follow until rank 0 closes the engine (followers started by this package)."""
    while True:
        try:
            for _ in follow(runner):
                continue
        except EOFError:
            return
