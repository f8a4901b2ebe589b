"""Drafts without a draft model: how text went on that was the same before, in the prompt or in a recent answer.

Owns the look-up, and how much of what it finds is worth computing, by measured acceptance and measured cost. Knows ids
alone. Time decides how much is drafted, never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_infer.engine.request import Draft, Request

MIN_MATCH, MAX_MATCH = 2, 16
"""How many of the last ids must be the same, and how many are compared."""
MAX_CANDIDATES = 32
"""Places that are compared, the latest first: line breaks and blanks occur too often to look at all."""
_RECENT_TOKENS = 1 << 15
"""Of answers that are remembered, with MAX_MATCH tokens before each."""
_BREAK = -1
"""Behind each remembered answer."""
_ROW_COST = 0.25
"""What a further row costs, in shares of the time that a sequence has in a step, until that is measured."""
_LEAST_GAIN = 1.05
"""Of tokens per time; less is not worth the risk."""


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

    def following(self, at: int, most: int) -> list[int]:
        """What stands from `at` on, to the next break; behind the end from `at` again, as in a text that goes round."""
        found = [self.ids[at + i % (len(self.ids) - at)] for i in range(most)]
        return found[: found.index(_BREAK)] if _BREAK in found else found


class _Progress:
    """What is known of one request, and the last guess of how it goes on.

    text: its ids in reading order: the answer follows what it continues, wherever in the prompt that lies. kind: source
    of the guess and order of magnitude of the match. hits: by kind, the share of guessed tokens that were right.
    """

    def __init__(self, request: Request) -> None:
        ids, start, end = request.ids, request.prefix.start, request.prefix.stop
        self.text = Ngrams(ids[:start] + ids[end : request.num_prompt] + ids[start:end])
        self.guess: list[int] = []
        self.kind = "", 0
        self.hits: dict[tuple[str, int], float] = {}


class LookupDrafter:
    """Drafts what followed the longest match of the last few ids. One for all requests of an engine.

    Sources are "prompt" (the request's own ids), "recent" (answers of this engine) and, of these, "typed" (the text is
    the same for long: the user types what was shown). What is found is a guess, right or wrong, whether it is drafted
    or not. So what is right is measured where nothing is drafted as well, and costs nothing.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        self._most = num_draft_tokens
        self._recent = Ngrams()
        self._progress: dict[Request, _Progress] = {}
        self._hits: dict[tuple[str, int], float] = {("typed", MAX_MATCH.bit_length()): 0.98}
        """As _Progress.hits, of all requests"""
        self._num_seqs = 1
        self._plain_seconds: dict[int, float] = {}
        """Of a step without drafts, by sequences"""
        self._row_costs: dict[int, float] = {}
        """Of a drafted row, by sequences, in shares of the time that a sequence has in a step"""

    def observe(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step of `num_seqs` decoding sequences, `num_tokens` with their drafts, took so long."""
        self._num_seqs, num_drafted = num_seqs, num_tokens - num_seqs
        plain, cost = self._plain_seconds.get(num_seqs, 0.0), self._row_costs.get(num_seqs, _ROW_COST)
        if num_drafted and plain:
            measured = (seconds / plain - 1) * num_seqs / num_drafted
            self._row_costs[num_seqs] = cost + 0.1 * (min(max(measured, 0.0), 1.0) - cost)
        elif not num_drafted:
            self._plain_seconds[num_seqs] = 0.9 * plain + 0.1 * seconds if plain else seconds
            self._row_costs[num_seqs] = cost + 0.01 * (_ROW_COST - cost)  # so that it is tried again

    def propose(self, request: Request) -> Draft:
        """What may follow, as much of it as should save time."""
        if request not in self._progress:
            self._remember()
            self._progress[request] = _Progress(request)
        progress = self._progress[request]
        self._learn(request, progress)
        self._look_up(request, progress)
        return Draft(progress.guess[: self._worth_drafting(progress)], progress.kind[0])

    def _remember(self) -> None:
        """The answers of those requests that have ended."""
        for request in [request for request in self._progress if request.finish_reason is not None]:
            progress = self._progress.pop(request)
            self._learn(request, progress)
            if num_new := len(request.ids) - request.num_prompt:
                self._recent.extend([*progress.text.ids[-num_new - MAX_MATCH :], _BREAK])
        if len(self._recent.ids) > _RECENT_TOKENS:
            self._recent = Ngrams(self._recent.ids[-_RECENT_TOKENS // 2 :])

    def _look_up(self, request: Request, progress: _Progress) -> None:
        """Guess how the text goes on, up to the end of the answer."""
        tail = progress.text.ids[-MAX_MATCH:]
        at, length = progress.text.find(tail)
        recent_at, recent_length = self._recent.find(tail)
        guess, source = progress.text.following(at, self._most if length else 0), "prompt"
        if recent_length > length or recent_length == MAX_MATCH:
            length, source = recent_length, "typed" if recent_length == MAX_MATCH else "recent"
            guess = self._recent.following(recent_at, self._most)
        ends = (i for i, token_id in enumerate(guess, 1) if token_id in request.stop_token_ids)
        progress.guess, progress.kind = guess[: next(ends, self._most)], (source, length.bit_length())
        # Until it is known: two tokens in five behind a match of two or three, most behind a long one.
        general = self._hits.setdefault(progress.kind, 1 - 2.4 / 2 ** length.bit_length())
        progress.hits.setdefault(progress.kind, general)

    def _learn(self, request: Request, progress: _Progress) -> None:
        """What the request has got since the last guess, and so what that was worth."""
        kind, new = progress.kind, request.ids[len(progress.text.ids) :]
        progress.text.extend(new)
        for guessed, token_id in zip(progress.guess, new, strict=False):
            for hits, weight in ((self._hits, 0.05), (progress.hits, 0.2)):
                hits[kind] += weight * ((guessed == token_id) - hits[kind])
            if guessed != token_id:
                break

    def _worth_drafting(self, progress: _Progress) -> int:
        """How much of the guess gives the most tokens in the time it takes, if that is a gain at all."""
        hit, cost = progress.hits[progress.kind], self._row_costs.get(self._num_seqs, _ROW_COST)
        best, best_gain, tokens = 0, _LEAST_GAIN, 1.0
        for length in range(1, len(progress.guess) + 1):
            tokens += hit**length
            if tokens / (1 + cost * length) > best_gain:
                best, best_gain = length, tokens / (1 + cost * length)
        return best
