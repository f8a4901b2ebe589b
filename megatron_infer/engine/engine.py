"""The loop: plan a step, have every rank execute it, hand out events. Lives on rank 0.

Where steps run on a device of their own, the next one is planned and started while this one runs.

Speaks token ids only. A failure in one request is an event; a failure of a rank ends the engine for good.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NoReturn

from megatron_infer.engine import worker
from megatron_infer.engine.plan import Plan
from megatron_infer.engine.request import Event, Request
from megatron_infer.engine.runner import ModelRunner, Pending
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.engine.worker import EngineDeadError
from megatron_infer.profile import Profile
from megatron_infer.tensor_parallel.group import RankFailure


class Engine:
    """Continuous batching over one model: add, abort, step."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, profile: Profile | None = None) -> None:
        self.runner, self.scheduler, self.group = runner, scheduler, runner.tp
        self._profile = profile
        self._in_flight: tuple[Plan, Pending] | None = None
        self._failure: str | None = None
        self._closed = False

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ValueError: it can never fit into the KV cache.
            EngineDeadError: a rank has failed earlier.
        """
        self.ensure_alive()
        self.scheduler.add(request)
        return request.request_id

    def abort(self, request_id: int) -> None:
        """Drop a request in any state; unknown and finished ids are fine."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.has_work)

    def step(self) -> list[Event]:
        """Advance every scheduled request by one step; returns what happened.

        An asynchronous runner then has the next step in flight already, wherever that could be planned.

        Raises:
            EngineDeadError: a rank died or raised, or the drafter did, with rank and cause.
        """
        self.ensure_alive()
        began = time.perf_counter()
        try:
            current = self._in_flight or self._start(self.scheduler.schedule())
            if current is None:
                return []
            self._in_flight = self._start(self.scheduler.schedule_ahead()) if self.runner.is_asynchronous else None
            plan, pending = current
            with self.group.waiting():
                sampled = pending.wait()
            # With a drafter no step was in flight before, so this is how long the whole step took.
            seconds = time.perf_counter() - began
            # A GPU that no longer waits for a rank that died goes on with whatever it has.
            self.group.check()
            return self.scheduler.commit(plan, sampled, seconds)
        except BaseException as error:
            # KeyboardInterrupt included: a step that is torn apart leaves the ranks, or the queues, out of step.
            self._fail(error)

    def _start(self, plan: Plan | None) -> tuple[Plan, Pending] | None:
        if plan is None:
            return None
        step = plan.step
        if self._profile is not None and self._profile.is_active:
            self._profile.begin(is_prefill=not plan.is_decoding)
            step = replace(step, op_by_op=True)
        if self.group.size > 1:
            worker.send_step(self.group, step)
        return plan, self.runner.start(step, plan.draws)

    def _fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, RankFailure):
            cause = str(error)
        else:
            cause = f"rank 0: {type(error).__name__}: {error}"
            self.group.abort(f"{type(error).__name__}: {error}")
        self._failure = f"the engine stopped: {cause}. Create a new session to go on."
        raise EngineDeadError(self._failure) from error

    def ensure_alive(self) -> None:
        """Raise EngineDeadError after a failure or close."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if self._closed:
            raise EngineDeadError("the session is closed; create a new one")

    @property
    def alive(self) -> bool:
        """False after a failure or close."""
        return self._failure is None and not self._closed

    def close(self) -> None:
        """Release the followers. Idempotent."""
        if self.alive and self.group.size > 1:
            try:
                worker.send_json(self.group, worker.Kind.STOP)
            except RankFailure as error:
                self._failure = f"the engine stopped: {error}"
        was_alive, self._closed = self.alive, True
        if was_alive:
            self.runner.close()
        else:
            self.group.close()
