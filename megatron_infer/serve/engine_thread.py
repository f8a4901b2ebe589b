"""The one thread that steps the session, and whether its steps advance. Knows nothing of requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from megatron_infer.llm import LLM, EngineDeadError


class EngineThread:
    """Steps while there is work. `failure`: why it stopped for good; `on_failure` is then called in this thread."""

    def __init__(self, llm: LLM, on_failure: Callable[[], None]) -> None:
        self._session, self._on_failure = llm.session, on_failure
        self._work = threading.Event()
        self._is_stopping = False
        self._step_began = 0.0
        self.num_steps = 0
        self.failure: str | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def wake(self) -> None:
        """Say that something was submitted."""
        self._work.set()

    def stop(self, timeout_seconds: float) -> bool:
        """Have it end after the step in progress; whether it did within the time."""
        self._is_stopping = True
        self._work.set()
        self.thread.join(timeout_seconds)
        return not self.thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """How long the step in progress has taken so far; 0 while there is nothing to do."""
        began = self._step_began
        return time.monotonic() - began if began else 0.0

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._work.wait()
                self._work.clear()
                while self._session.has_work and not self._is_stopping:
                    self._step_began = time.monotonic()
                    self._session.step()
                    self.num_steps += 1
                self._step_began = 0.0
        except BaseException as error:
            self._step_began = 0.0
            self.failure = str(error) if isinstance(error, EngineDeadError) else type(error).__name__
            self._on_failure()
            if not isinstance(error, EngineDeadError):
                raise
