"""How many completions are in hand, and who is sent away because waiting would take too long."""

from __future__ import annotations

from megatron_infer.serve.errors import Refusal

_WEIGHT = 0.1
"""Of the latest completion in the running mean of what one takes."""


class Admission:
    """Counts completions from admission to their end. For one thread.

    max_running: what the engine computes together. max_queued: what may wait beside that. max_wait_seconds: the
    patience of a client that does not say.
    """

    def __init__(self, max_running: int, max_queued: int, max_wait_seconds: float) -> None:
        self._max_running, self._max_queued, self._max_wait_seconds = max_running, max_queued, max_wait_seconds
        self.num_in_hand = 0
        self.mean_seconds = 0.0
        self.is_draining = False

    def expected_wait_seconds(self, num_more: int) -> float:
        """Until the last of `num_more` completions would start, if all take as long as they did lately."""
        num_ahead = max(0, self.num_in_hand + num_more - self._max_running)
        return -(-num_ahead // self._max_running) * self.mean_seconds

    def enter(self, num_completions: int, patience_seconds: float | None) -> None:
        """Take all of them in, or none. Raises ValueError: they never fit. Refusal: not now (503)."""
        capacity = self._max_running + self._max_queued
        if num_completions > capacity:
            raise ValueError(f"{num_completions} completions in one request; this server takes {capacity} at most")
        if self.is_draining:
            raise Refusal(503, "the server is shutting down", retry_after_seconds=5)
        wait = self.expected_wait_seconds(num_completions)
        if self.num_in_hand + num_completions > capacity:
            raise Refusal(503, "the queue is full", retry_after_seconds=wait)
        patience = self._max_wait_seconds if patience_seconds is None else patience_seconds
        if wait > patience:
            raise Refusal(503, f"the expected wait is {wait:.1f} s, more than {patience:g} s", retry_after_seconds=wait)
        self.num_in_hand += num_completions

    def leave(self, num_completions: int, seconds: float | None) -> None:
        """Give them back. `seconds`: what they took; None where they did not come to their end."""
        self.num_in_hand -= num_completions
        if seconds is not None:
            self.mean_seconds += (seconds - self.mean_seconds) * (_WEIGHT if self.mean_seconds else 1.0)
