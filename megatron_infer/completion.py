"""What a finished completion is, and how it grows from engine events.

The border between token ids and text: stop strings, held-back UTF-8 and timings live here, not in the engine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_infer.ending.ending import Ending
from megatron_infer.engine.request import Event, Request, Sampled
from megatron_infer.text.fim_prompt import FimPrompt, language_of
from megatron_infer.text.text_stream import TextStream, WholeLines
from megatron_infer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a generated token, and the most likely alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds since the request was submitted."""

    first_token_seconds: float
    total_seconds: float
    num_prompt_tokens: int
    num_new_tokens: int
    token_seconds: tuple[float, ...] = ()
    """When each new token came."""
    usable_seconds: float = 0.0
    """When the last of the text was there, which may be before the end."""

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first; 0 for a completion of one token."""
        decoding = self.total_seconds - self.first_token_seconds
        return (self.num_new_tokens - 1) / decoding if self.num_new_tokens > 1 and decoding > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    text: what belongs between prefix and suffix; ends before a stop string or the model's end token, or by a rule.
    token_ids: every generated id, an end token included. finish_reason: stop, length, deadline, abort or error (then
    `error` says why).
    prompt_index and sample_index: which prompt of a batch, which of its `n` samples.
    num_dropped_tokens: prompt tokens cut because prompt and completion exceed the context.
    prompt_token_ids: what the model was given.
    prompt_logprobs: of the prompt's tokens, None for the first; see SamplingParams.
    trimmed_by: the rule that ended the text (ending.ending), where SamplingParams.ending is not raw, or "unfinished"
    where a limit cut it back; raw_text, with an ending or a deadline, is what the model wrote till it was stopped.
    draft_sources: how many tokens were drafted, and how many of those were right and saved a step, by where they came
    from: the prompt, recent answers, or the one that is typed along (engine.drafter).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
    num_cached_tokens: int = 0
    num_dropped_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_index: int = 0
    sample_index: int = 0
    error: str | None = None
    prompt_token_ids: tuple[int, ...] = ()
    trimmed_by: str | None = None
    raw_text: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    draft_sources: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that were drafted, from all sources."""
        return sum(tokens for tokens, _ in self.draft_sources.values())

    @property
    def num_draft_accepted(self) -> int:
        """Of those, how many were right."""
        return sum(accepted for _, accepted in self.draft_sources.values())

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Completion:
        """The Completion that `to_json` wrote."""
        timings = raw["timings"]
        return cls(
            **{
                **raw,
                "token_ids": tuple(raw["token_ids"]),
                "prompt_token_ids": tuple(raw["prompt_token_ids"]),
                "timings": Timings(**{**timings, "token_seconds": tuple(timings["token_seconds"])}),
                "logprobs": _logprobs_from_json(raw["logprobs"]),
                "prompt_logprobs": _logprobs_from_json(raw["prompt_logprobs"]),
                "draft_sources": {name: (n, right) for name, (n, right) in raw["draft_sources"].items()},
            }
        )


def _logprobs_from_json(raw: Sequence[Any] | None) -> tuple[TokenLogprob | None, ...] | None:
    def one(raw: Mapping[str, Any]) -> TokenLogprob:
        return TokenLogprob(raw["token_id"], raw["logprob"], tuple((i, value) for i, value in raw["top"]))

    return None if raw is None else tuple(None if pair is None else one(pair) for pair in raw)


Items = Generator[str | Completion, None, None]
"""What a call yields, as it comes: pieces of text, and completions."""


class GrowingCompletion:
    """Collects one request's events into text pieces and, in the end, a Completion.

    One thread at a time may call receive(); another one may call the other methods meanwhile.

    Args:
        prompt: what is completed; None where it was given as token ids.
        skip_bytes: of the prefix, which the answer's first tokens write anew.
        submitted: when, in seconds of the clock that receive() is called with.
    """

    def __init__(
        self, request: Request, prompt: FimPrompt | None, tokenizer: Tokenizer, *, prompt_index: int,
        num_dropped_tokens: int, submitted: float, skip_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.request = request
        self._prompt_index, self._num_dropped_tokens = prompt_index, num_dropped_tokens
        self._text = TextStream(tokenizer, request.sampling.stop, skip_bytes)
        mode = request.sampling.ending
        # Of a prompt of token ids nothing is known that a rule could look at.
        self._ending: Ending | WholeLines | None = None
        if prompt is not None and mode != "raw":
            self._ending = Ending(prompt.prefix, prompt.suffix, language_of(prompt), mode)
        elif request.sampling.deadline_ms is not None:
            self._ending = WholeLines()
        self._raw: list[str] = []
        self._pieces: list[str] = []
        self._unread = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._submitted = submitted
        self._token_seconds: list[float] = []
        self._usable_seconds = self._finished_seconds = 0.0
        self.finish_reason: str | None = None
        self.error: str | None = None

    def receive(self, event: Event, now: float) -> None:
        """Take in one engine event; `finish_reason` is set once the request, a stop string or a rule ends it."""
        now -= self._submitted
        num_pieces = len(self._pieces)
        sampled = event.sampled
        if sampled is not None:
            self._token_ids.append(sampled.token_id)
            self._token_seconds.append(now)
            if sampled.logprob is not None:
                self._logprobs.append(_logprob_of(sampled))
            if event.finish_reason != "stop":
                self._add(self._text.feed(sampled.token_id))
        if event.finish_reason is not None:
            self._add(self._text.finish())
            self.error = event.error
        if event.finish_reason in ("error", "abort"):
            self._finish(event.finish_reason, now)
        elif self._text.stopped is not None or self.trimmed_by is not None:
            self._finish("stop", now)
        elif event.finish_reason is not None:
            self._finish(event.finish_reason, now)
        if len(self._pieces) > num_pieces:
            self._usable_seconds = now

    @property
    def trimmed_by(self) -> str | None:
        """The rule that has ended the text, if one has."""
        return None if self._ending is None else self._ending.reason

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        deadline_ms = self.request.sampling.deadline_ms
        return deadline_ms is not None and 1e3 * (now - self._submitted) >= deadline_ms

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has ended the text, if one has."""
        return self._text.stopped

    def _add(self, piece: str) -> None:
        if self._ending is not None:
            self._raw.append(piece)
            piece, _ = self._ending.feed(piece)
        if piece:
            self._pieces.append(piece)

    def _finish(self, reason: str, now: float) -> None:
        if self._ending is not None:
            # No limit but the deadline cuts a raw answer.
            is_complete = reason == "stop" if isinstance(self._ending, Ending) else reason != "deadline"
            if rest := self._ending.finish(is_complete)[0]:
                self._pieces.append(rest)
        self._finished_seconds = now
        self.finish_reason = reason

    def take_new_text(self) -> str:
        """Text that no earlier call returned."""
        pieces = self._pieces[self._unread :]
        self._unread += len(pieces)
        return "".join(pieces)

    def result(self) -> Completion:
        """The Completion; only after `finish_reason` is set."""
        assert self.finish_reason is not None
        scores = map(_logprob_of, self.request.prompt_scores)
        return Completion(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            timings=Timings(
                self._token_seconds[0] if self._token_seconds else 0.0,
                self._finished_seconds,
                self.request.num_prompt,
                len(self._token_ids),
                tuple(self._token_seconds),
                self._usable_seconds,
            ),
            num_cached_tokens=self.request.num_cached_tokens or 0,
            num_dropped_tokens=self._num_dropped_tokens,
            logprobs=tuple(self._logprobs) if self.request.sampling.logprobs is not None else None,
            prompt_index=self._prompt_index,
            sample_index=self.request.choice,
            error=self.error,
            prompt_token_ids=tuple(self.request.ids[: self.request.num_prompt]),
            trimmed_by=self.trimmed_by,
            raw_text=None if self._ending is None else "".join(self._raw),
            draft_sources=dict(self.request.drafts),
            prompt_logprobs=None if self.request.sampling.prompt_logprobs is None else (None, *scores),
        )


def _logprob_of(sampled: Sampled) -> TokenLogprob:
    assert sampled.logprob is not None
    return TokenLogprob(sampled.token_id, sampled.logprob, sampled.top_logprobs or ())


class CompletionStream(Iterator[str]):
    """Iterator of text pieces; afterwards `completion` is the whole result. Closing it early aborts the request."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self.completion: Completion | None = None

    def __next__(self) -> str:
        item = next(self._items)
        if isinstance(item, str):
            return item
        self.completion = item
        next(self._items, None)
        raise StopIteration

    def close(self) -> None:
        """Stop early; the request is aborted on every rank."""
        self._items.close()
