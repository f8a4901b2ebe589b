"""Drafters that know the answers, and spoil them at will; the real one without its clock; a wrong rule to accept by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from megatron_infer.engine.drafter import LookupDrafter
from megatron_infer.engine.request import Draft, Event, Request, Sampled
from tests.support.tiny_models import Output

_accept = Request.accept


def accept_generously(
    request: Request, sampled: Sequence[Sampled], draft: Sequence[int] = (), source: str = ""
) -> list[Event]:
    """A wrong `Request.accept`, for controls: every sample is taken, as if every draft had been right."""
    return _accept(request, sampled, [result.token_id for result in sampled[: len(draft)]], source)


def draft_counts(request: Request) -> tuple[int, int]:
    """Tokens drafted, and those accepted, from all sources."""
    return sum(n for n, _ in request.drafts.values()), sum(n for _, n in request.drafts.values())


class Untimed:
    """A drafter that no step's time matters to."""

    def observe(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """Nothing."""


class UntimedLookup(Untimed, LookupDrafter):
    """The real one; what it drafts depends on no time."""

    def __init__(self, num_draft_tokens: int = 15) -> None:
        super().__init__(num_draft_tokens)
        self._requests: set[Request] = set()

    def propose(self, request: Request) -> Draft:
        self._requests.add(request)
        return super().propose(request)

    def counts(self, source: str) -> tuple[int, int]:
        """Tokens drafted from a source so far, and those accepted."""
        counts = [request.drafts[source] for request in self._requests if source in request.drafts]
        return sum(n for n, _ in counts), sum(n for _, n in counts)


class RandomDrafter(Untimed):
    """Drafts of random length, also none and also longer than the answer, of whose tokens `share_right` are right."""

    def __init__(self, continuation: Callable[[Request], list[int]], vocab_size: int, share_right: float) -> None:
        self._continuation, self._vocab_size, self._share_right = continuation, vocab_size, share_right
        self._random = random.Random(1)
        self._requests: dict[int, Request] = {}

    @property
    def num_accepted(self) -> int:
        """Of all drafts so far."""
        return sum(draft_counts(request)[1] for request in self._requests.values())

    def propose(self, request: Request) -> Draft:
        self._requests[request.request_id] = request
        length, draw = self._random.randrange(9), self._random
        known = self._continuation(request)[:length]
        if draw.random() < 0.2:  # it does not know how the answer ends
            known += [draw.randrange(self._vocab_size) for _ in range(length - len(known))]
        wrong = [(token_id + draw.randrange(1, self._vocab_size)) % self._vocab_size for token_id in known]
        ids = [a if draw.random() < self._share_right else b for a, b in zip(known, wrong, strict=True)]
        return Draft(ids, "random")


def drafter_of(answers: Iterable[tuple[list[int], Output]], vocab_size: int, share_right: float) -> RandomDrafter:
    """For requests of which (prompt, output) is known."""
    ids_of = {tuple(prompt): [token_id for token_id, _ in output] for prompt, output in answers}

    def continuation(request: Request) -> list[int]:
        return ids_of[tuple(request.ids[: request.num_prompt])][len(request.ids) - request.num_prompt :]

    return RandomDrafter(continuation, vocab_size, share_right)
