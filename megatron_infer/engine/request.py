"""One request: its token ids, how far they are computed, how its tokens are drawn, and when it is finished.

Owns which samples hold (drafts) and the rules of finishing (stop token, length, error, abort). Knows nothing of text,
scheduling policy or tensors; block_table.py writes the cache fields.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_infer.engine.logits import Edit, Guide, Processor
from megatron_infer.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "deadline", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row is sampled with: its parameters, the request's own seed, and how many tokens are generated before.

    edit: what is changed of its logits first. known_id: the token that follows in the prompt, of which only the log
    probability is wanted.
    """

    params: SamplingParams
    seed: int
    choice: int
    position: int
    edit: Edit | None = None
    known_id: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are wanted beside the token's log probability; None: not even that."""
        return self.params.logprobs if self.known_id is None else self.params.prompt_logprobs

    @property
    def needs_logits(self) -> bool:
        """Whether more than the arg-max of the row is wanted."""
        return self.edit is not None or self.known_id is not None or not self.params.greedy_only


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler made of one row: a token, or the reason why there is none."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    error: str | None = None


class Draft(NamedTuple):
    """Ids that may follow a request's, the next one first, and where they come from."""

    token_ids: Sequence[int] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A new token of a request, or its end without one (abort, error): then `sampled` is None."""

    request: Request
    sampled: Sampled | None
    finish_reason: FinishReason | None = None
    error: str | None = None


class Request:
    """A prompt on its way to a completion: `ids[:num_computed]` are in the KV cache, the rest is to be computed.

    `stop_token_ids` are the model's end tokens; `sampling.stop_token_ids` end it too, and `sampling.ignore_eos` leaves
    only those. `max_len` bounds prompt + completion. The token that ends a completion is part of `ids`. `seed` and
    `choice` are what its random draws depend on, beside the position. `bad_words` are those of `sampling` as ids, and
    `guide` says what the first tokens must be. `prefix`: where in the prompt the text lies that the completion
    continues; None: at its end.
    """

    def __init__(
        self, request_id: int, prompt_ids: Sequence[int], sampling: SamplingParams, max_len: int,
        stop_token_ids: frozenset[int], *, seed: int = 0, choice: int = 0,
        bad_words: Sequence[tuple[int, ...]] = (), guide: Guide | None = None,
        prefix: range | None = None,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.seed, self.choice = seed, choice
        self.sampling, self.max_len = sampling, max_len
        self.stop_token_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else stop_token_ids
        )
        is_edited = sampling.edits_logits or guide is not None
        self._processor = Processor(sampling, self.stop_token_ids, bad_words, guide) if is_edited else None
        self.ids = list(prompt_ids)
        self.num_prompt = len(self.ids)
        self.prefix = range(self.num_prompt, self.num_prompt) if prefix is None else prefix
        self.finish_reason: FinishReason | None = None
        self.prompt_scores: list[Sampled] = []
        """Log probabilities of the prompt's tokens from the second on, where they are wanted."""
        self.takes_drafts = True
        """False once numbers that are not finite came with one."""
        self.drafts: dict[str, tuple[int, int]] = {}
        """By source: how many tokens were proposed and computed, and how many of those saved the request a step."""

        self.num_computed = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache at the first admission; None before it."""
        self.block_table = array("i")
        self.num_sealed = 0
        """Leading blocks of `block_table` that are sealed in the prefix cache."""
        self.cacheable = True
        """False once a block could not be sealed: nothing can be sealed below it."""

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is not computed yet: 1 while decoding."""
        return len(self.ids) - self.num_computed

    @property
    def longest_len(self) -> int:
        """The most tokens, prompt included, that this request can come to."""
        return min(self.max_len, self.num_prompt + self.sampling.max_new_tokens)

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log probability is wanted and still to come."""
        return 0 if self.sampling.prompt_logprobs is None else self.num_prompt - 1 - len(self.prompt_scores)

    def score(self, position: int) -> Draw:
        """What is wanted of the row of the prompt's token at `position`: the log probability of the next one."""
        return Draw(self.sampling, self.seed, self.choice, 0, known_id=self.ids[position + 1])

    @property
    def needs_history(self) -> bool:
        """Whether its next tokens can only be drawn once all before them are known."""
        return self._processor is not None and self._processor.needs_history(self.ids[self.num_prompt :])

    def draw(self, length: int, draft: Sequence[int] = ()) -> Draw:
        """How the token behind the first `length`, the last of which are those of `draft`, is drawn."""
        num_new = length - self.num_prompt
        edit = None
        if self._processor is not None:
            edit = self._processor.edit([*self.ids, *draft], self.num_prompt, num_new)
        return Draw(self.sampling, self.seed, self.choice, num_new, edit)

    def accept(self, sampled: Sequence[Sampled], draft: Sequence[int] = (), source: str = "") -> list[Event]:
        """Take the samples of a step, and decide whether the request is finished.

        The first sample follows `ids` and the others follow the draft's tokens. So each holds as long as the draft
        before it is what was sampled; the rest continue a text that is not there, and count as never computed. What
        came of the draft is counted in `drafts`, under its `source`.

        An error is believed only without a draft: attention multiplies what a token must not see by zero, and zero
        times NaN is NaN. So the draft alone may be to blame, and the token is computed again without one.
        """
        assert self.finish_reason is None, f"request {self.request_id} is finished"
        num_accepted = 0
        events = []
        for result, drafted in zip(sampled, (*draft, None), strict=True):
            if result.error is not None:
                if draft:
                    self.takes_drafts = False
                else:
                    events.append(self.finish("error", result.error))
                break
            if len(self.ids) >= self.longest_len:  # the prompt alone was wanted
                events.append(self.finish("length"))
                break
            self.ids.append(result.token_id)
            if result.token_id in self.stop_token_ids:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.longest_len:
                self.finish_reason = "length"
            events.append(Event(self, result, self.finish_reason))
            if self.finish_reason is not None or result.token_id != drafted:
                break
            num_accepted += 1
        if draft:
            tokens, accepted = self.drafts.get(source, (0, 0))
            self.drafts[source] = tokens + len(draft), accepted + num_accepted
        return events

    def accept_scores(self, scores: Sequence[Sampled]) -> list[Event]:
        """Take log probabilities of the next tokens of the prompt; an event where a row was not finite."""
        for score in scores:
            if score.error is not None:
                return [self.finish("error", score.error)]
            self.prompt_scores.append(score)
        return []

    def finish(self, reason: FinishReason, error: str | None = None) -> Event:
        """End the request without a new token."""
        assert self.finish_reason is None, f"request {self.request_id} is finished"
        self.finish_reason = reason
        return Event(self, None, reason, error)
