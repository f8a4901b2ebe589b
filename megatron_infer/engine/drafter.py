"""Drafts without a draft model: how text went on that was the same before, in the prompt or in a recent answer.

Owns the look-up, and how much of what it finds is worth computing, by measured acceptance and measured cost. Knows ids
alone. Time decides how much is drafted, never an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from megatron_infer.engine.request import Draft, Request

MIN_MATCH, MAX_MATCH = 2, 16
"""How many of the last ids must be the same, and how many are compared."""
MAX_CANDIDATES = 32
"""Places that are compared, the latest first: line breaks and blanks occur too often to look at all."""
_RECENT_TOKENS = 1 << 15
"""Of answers that are remembered, with MAX_MATCH tokens before each."""
_BREAK = -1
"""Behind each remembered answer."""
_SEAM = 4
"""Tokens that may differ where a user typed along: the end of what was typed is cut into tokens in another way."""
_ROW_COST = 0.25
"""What a further row costs, in shares of the time that a sequence has in a step, until that is measured."""
_LEAST_GAIN = 1.05
_TIME_SHARE = 0.02
"""Of the steps' time, the most that looking up may take."""


class Ngrams:
    """Ids in order, to find where their like occurred: a hash chain over pairs of neighbours, as LZ77 coders use."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []
        """For each position, where the pair that ends there ended before; -1: nowhere"""
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append."""
        last = self.ids[-1] if self.ids else _BREAK
        for position, token_id in enumerate(ids, len(self.ids)):
            pair = last, token_id
            self._earlier.append(self._latest.get(pair, -1))
            self._latest[pair] = position
            self.ids.append(token_id)
            last = token_id

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """Where something follows the longest end of `tail` that is here: at which position, and that end's length.

        Of equally long ones the latest, among the MAX_CANDIDATES latest places, and up to MAX_MATCH ids. (0, 0): none.
        """
        ids, best, found = self.ids, 0, 0
        most = min(len(tail), MAX_MATCH)
        at = self._latest.get((tail[-2], tail[-1]), -1) if most >= MIN_MATCH else -1
        for _ in range(MAX_CANDIDATES):
            if at < 0 or best == most:
                break
            if at + 1 < len(ids) and ids[at + 1] != _BREAK:
                length = MIN_MATCH
                while length < most and length <= at and ids[at - length] == tail[-1 - length]:
                    length += 1
                if length > best:
                    best, found = length, at + 1
            at = self._earlier[at]
        return found, best

    def rest(self, at: int) -> list[int]:
        """What follows from `at` to the next break."""
        return self.ids[at : self.ids.index(_BREAK, at)]


class _Progress:
    """What is known of one request, and the last guess of how it goes on.

    text: its ids in reading order: the answer follows what it continues, wherever in the prompt that lies. expected:
    where the user typed along, what is left of the answer that was shown. kind: source of the guess and order of
    magnitude of the match. hits: by kind, the share of guessed tokens that were right, a moving average.
    """

    def __init__(self, request: Request, recent: Ngrams) -> None:
        ids, start, end = request.ids, request.prefix.start, request.prefix.stop
        self.request, self.num_seen = request, request.num_prompt
        self.text = Ngrams(ids[:start] + ids[end : request.num_prompt] + ids[start:end])
        self.guess: list[int] = []
        self.kind = "", 0
        self.hits: dict[tuple[str, int], float] = {}
        self.expected: list[int] = []
        self._num_lost = 0
        """Since how many tokens the text has left what was expected"""
        for seam in range(_SEAM + 1):
            known = len(self.text.ids) - seam
            at, length = recent.find(self.text.ids[max(0, known - MAX_MATCH) : known])
            if length == MAX_MATCH:
                self.expected = recent.rest(at)
                self._follow(self.text.ids[known:])
                break

    def take_in(self) -> list[int]:
        """What the request has got since the last call."""
        new = self.request.ids[self.num_seen :]
        self.num_seen += len(new)
        self.text.extend(new)
        self._follow(new)
        return new

    def _follow(self, new: Iterable[int]) -> None:
        for token_id in new:
            is_there = token_id in self.expected[: _SEAM + 1]
            self._num_lost = 0 if is_there else self._num_lost + 1
            if is_there:
                del self.expected[: self.expected.index(token_id) + 1]
        if self._num_lost > _SEAM:
            self.expected = []

    def look_up(self, recent: Ngrams, most: int) -> None:
        """Guess how the text goes on, up to the end of the answer."""
        ids = self.text.ids
        (at, length), (recent_at, recent_length) = self.text.find(ids[-MAX_MATCH:]), recent.find(ids[-MAX_MATCH:])
        if self.expected and not self._num_lost:
            guess, source, length = self.expected[:most], "typed", MAX_MATCH
        elif length >= recent_length:
            # A match that overlaps what it is compared with goes round.
            guess, source = [ids[at + i % (len(ids) - at)] for i in range(most if length else 0)], "prompt"
        else:
            guess, source, length = recent.rest(recent_at)[:most], "recent", recent_length
        ends = (i for i, token_id in enumerate(guess, 1) if token_id in self.request.stop_token_ids)
        self.guess, self.kind = guess[: next(ends, most)], (source, length.bit_length())


class LookupDrafter:
    """Drafts what followed the longest match of the last few ids. One for all requests of an engine.

    Sources are "typed" (the user types what was shown: the rest of that answer), "prompt" (the request's own ids) and
    "recent" (answers of this engine). What is found is a guess, right or wrong, whether it is drafted or not. So what
    is right is measured where nothing is drafted as well, and costs nothing.

    Args:
        num_draft_tokens: the most in a draft. clock: in seconds.
    """

    def __init__(self, num_draft_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most, self._clock = num_draft_tokens, clock
        self._recent = Ngrams()
        self._progress: dict[Request, _Progress] = {}
        self._hits: dict[tuple[str, int], float] = {("typed", MAX_MATCH.bit_length()): 0.98}
        """As _Progress.hits, of all requests"""
        self._num_seqs = 1
        self._plain_seconds: dict[int, float] = {}
        """Of a step without drafts, by sequences"""
        self._row_costs: dict[int, float] = {}
        """Of a drafted row, by sequences, in shares of the time that a sequence has in a step"""
        self._credit_seconds = 0.02

    def observe(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step of `num_seqs` decoding sequences, `num_tokens` with their drafts, took so long."""
        self._credit_seconds = min(self._credit_seconds + _TIME_SHARE * seconds, 0.1)
        self._num_seqs, num_drafted = num_seqs, num_tokens - num_seqs
        plain, cost = self._plain_seconds.get(num_seqs), self._row_costs.get(num_seqs, _ROW_COST)
        if num_drafted and plain:
            measured = (seconds / plain - 1) * num_seqs / num_drafted
            self._row_costs[num_seqs] = cost + 0.1 * (min(max(measured, 0.0), 1.0) - cost)
        elif not num_drafted:
            plain = plain or seconds
            self._plain_seconds[num_seqs] = plain + 0.1 * (seconds - plain)
            self._row_costs[num_seqs] = cost + 0.01 * (_ROW_COST - cost)  # so that it is tried again

    def propose(self, request: Request) -> Draft:
        """What may follow, as much of it as should save time."""
        if self._credit_seconds < 0:
            return Draft()
        began = self._clock()
        if request not in self._progress:
            self._remember()
            self._progress[request] = _Progress(request, self._recent)
        progress = self._progress[request]
        self._learn(progress)
        progress.look_up(self._recent, self._most)
        length = self._worth_drafting(progress)
        self._credit_seconds -= self._clock() - began
        return Draft(progress.guess[:length], progress.kind[0])

    def _remember(self) -> None:
        """The answers of those requests that have ended."""
        for request in [request for request in self._progress if request.finish_reason is not None]:
            progress = self._progress.pop(request)
            self._learn(progress)
            if num_new := len(request.ids) - request.num_prompt:
                self._recent.extend([*progress.text.ids[-num_new - MAX_MATCH :], _BREAK])
        if len(self._recent.ids) > _RECENT_TOKENS:
            self._recent = Ngrams(self._recent.ids[-_RECENT_TOKENS // 2 :])

    def _learn(self, progress: _Progress) -> None:
        """What came of the last guess."""
        kind, new = progress.kind, progress.take_in()
        for guessed, token_id in zip(progress.guess, new, strict=False):
            hits = self._hits.get(kind, 0.3)
            own = progress.hits.get(kind, hits)
            self._hits[kind] = hits + 0.05 * ((guessed == token_id) - hits)
            progress.hits[kind] = own + 0.2 * ((guessed == token_id) - own)
            if guessed != token_id:
                break
        progress.guess = []

    def _worth_drafting(self, progress: _Progress) -> int:
        """How much of the guess gives the most tokens in the time it takes, if that is a gain at all."""
        general = self._hits.get(progress.kind, 0.3)
        hit = (general + progress.hits.get(progress.kind, general)) / 2
        cost = self._row_costs.get(self._num_seqs, _ROW_COST)
        best, best_gain, tokens = 0, _LEAST_GAIN, 1.0
        for length in range(1, len(progress.guess) + 1):
            tokens += hit**length
            if tokens / (1 + cost * length) > best_gain:
                best, best_gain = length, tokens / (1 + cost * length)
        return best
