"""What rank 0 says to its followers, and their side of it: execute a step, or take in how a call goes on.

Messages are integers only, never pickle. What a call's results are is collective.py's business.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

import numpy as np

from megatron_infer.engine.interrupts import interrupt_left_to_rank_0
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.step import Step
from megatron_infer.tensor_parallel.backend import Ints
from megatron_infer.tensor_parallel.group import TPGroup


class EngineDeadError(RuntimeError):
    """The engine lost a rank and cannot go on; the message says which and why."""


class Kind(IntEnum):
    """What a message from rank 0 asks of the others."""

    STEP = 1
    """execute this Step"""
    RESULT = 2
    """an item of the collective call in progress, as JSON"""
    REFUSED = 3
    """the collective call ends with this error, as JSON"""
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


def receive(runner: ModelRunner) -> tuple[Kind, Any]:
    """A follower: execute rank 0's steps until it says something else; that, with its JSON value.

    Raises:
        RankFailure: a rank died or raised.
    """
    while True:
        with interrupt_left_to_rank_0():
            message = runner.tp.broadcast_ints(None)
            kind = Kind(int(message[0]))
            if kind is not Kind.STEP:
                return kind, _read_json(message)
            with runner.tp.reporting_failure():
                runner.start(Step.decode(message[1:]))


def serve(runner: ModelRunner) -> None:
    """A follower: execute steps until rank 0 closes the engine, whatever calls it makes; then leave the group."""
    while receive(runner)[0] is not Kind.STOP:
        continue
    runner.close()


def _read_json(message: Ints) -> Any:
    return json.loads(message[2:].tobytes()[: int(message[1])])
