"""Drafters that know the answers, and spoil them at will."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from megatron_infer.engine.request import Event, Request, Sampled

_accept = Request.accept


def accept_generously(request: Request, sampled: Sequence[Sampled], draft: Sequence[int] = ()) -> list[Event]:
    """A wrong `Request.accept`, for controls: every sample is taken, as if every draft had been right."""
    return _accept(request, sampled, [result.token_id for result in sampled[: len(draft)]])


class RandomDrafter:
    """Drafts of random length, also none and also longer than the answer, of whose tokens `share_right` are right."""

    def __init__(self, continuation: Callable[[Request], list[int]], vocab_size: int, share_right: float) -> None:
        self._continuation, self._vocab_size, self._share_right = continuation, vocab_size, share_right
        self._random = random.Random(1)

    def propose(self, request: Request) -> list[int]:
        length, draw = self._random.randrange(9), self._random
        known = self._continuation(request)[:length]
        if draw.random() < 0.2:  # it does not know how the answer ends
            known += [draw.randrange(self._vocab_size) for _ in range(length - len(known))]
        wrong = [(token_id + draw.randrange(1, self._vocab_size)) % self._vocab_size for token_id in known]
        return [a if draw.random() < self._share_right else b for a, b in zip(known, wrong, strict=True)]
