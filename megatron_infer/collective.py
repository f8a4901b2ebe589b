"""One call on every rank: rank 0 makes it, and the others yield what it yields, where all run the user's program.

Owns how results travel; JSON stands here alone. What a call does is session.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from megatron_infer.completion import Completion, Items
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.worker import EngineDeadError, Kind, receive, send_json, serve
from megatron_infer.session import Session
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup

_ERRORS: dict[str, type[BaseException]] = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}
"""What followers raise as rank 0 did; everything else is a RuntimeError there."""


class Leader:
    """Rank 0. `shares_results`: the other ranks run the same program and wait for what a call yields."""

    def __init__(self, session: Session, group: TPGroup, *, shares_results: bool) -> None:
        self.session, self._group, self._shares_results = session, group, shares_results

    def run(self, call: Callable[[Session], Items]) -> Items:
        """The items of `call`."""
        items = call(self.session)
        return self._shared(items) if self._shares_results else items

    def _shared(self, items: Items) -> Items:
        try:
            for item in items:
                self._send(Kind.RESULT, item if isinstance(item, str) else item.to_json())
                yield item
        except BaseException as error:
            items.close()
            is_left = isinstance(error, GeneratorExit)
            # Not waited for: a garbage collection may have closed this generator, in the middle of a step.
            self.session.soon(partial(self._tell, None if is_left else _describe(error)))
            raise
        self._send(Kind.END)

    def _send(self, kind: Kind, payload: Any = None) -> None:
        with _failures_end_the_engine(), self.session.undisturbed():
            send_json(self._group, kind, payload)

    def _tell(self, refusal: Any = None) -> None:
        """How the call ended, unless a rank failed or the group is closed: then nobody is left to tell."""
        with suppress(RankFailure, ValueError):
            send_json(self._group, Kind.END if refusal is None else Kind.REFUSED, refusal)

    def close(self) -> None:
        """End the session, and with it the followers' part in it. Idempotent."""
        self.session.close()


class Follower:
    """A rank > 0 of a launcher: makes the same calls as rank 0, or serves whatever calls rank 0 makes."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner, self._is_closed = runner, False

    def run(self, call: Callable[[Session], Items]) -> Items:
        """Executes steps and yields the items of rank 0's call. Closed early, it still follows to the call's end.

        Raises:
            ValueError, KeyboardInterrupt: what ended the call on rank 0. RuntimeError: another error ended it there.
            EngineDeadError: a rank died or raised, or rank 0 closed the session.
        """
        is_abandoned = False
        while True:
            kind, payload = self._receive()
            if kind is Kind.RESULT and not is_abandoned:
                try:
                    yield payload if isinstance(payload, str) else Completion.from_json(payload)
                except GeneratorExit:
                    is_abandoned = True
            elif kind is Kind.REFUSED:
                raise _ERRORS.get(payload["type"], RuntimeError)(payload["text"])
            elif kind is Kind.END:
                return
            elif kind is Kind.STOP:
                raise EngineDeadError("the engine stopped: rank 0 closed the session")

    def serve(self) -> None:
        """Execute steps until rank 0 closes the session. Raises EngineDeadError: a rank failed."""
        self._ensure_open()
        with _failures_end_the_engine():
            serve(self._runner)
        self._is_closed = True

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self._is_closed = True
        self._runner.close()

    def _receive(self) -> tuple[Kind, Any]:
        self._ensure_open()
        with _failures_end_the_engine():
            return receive(self._runner)

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("the session is closed; create a new one")


@contextmanager
def _failures_end_the_engine() -> Iterator[None]:
    """A RankFailure within becomes the error that users know."""
    try:
        yield
    except RankFailure as error:
        raise EngineDeadError(f"the engine stopped: {error}") from error


def _describe(error: BaseException) -> dict[str, str]:
    """What followers need to raise the error that ended a call on rank 0."""
    for name, kind in _ERRORS.items():
        if isinstance(error, kind):
            return {"type": name, "text": str(error)}
    return {"type": "RuntimeError", "text": f"rank 0: {type(error).__name__}: {error}"}
