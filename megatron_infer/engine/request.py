"""One request: its token ids, how far they are computed, and when it is finished.

Owns the rules of finishing (stop token, length, error, abort). Knows nothing of text, scheduling policy or tensors;
the scheduler writes the cache fields.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_infer.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler made of one row: a token, or the reason why there is none."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What a step did to one request. `token_id` is None when it ended without a new token (abort, error)."""

    request_id: int
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0


class Request:
    """A prompt on its way to a completion: `ids[:num_computed]` are in the KV cache, the rest is to be computed.

    `stop_token_ids` are the model's end tokens; `sampling.stop_token_ids` end it too, and `sampling.ignore_eos` leaves
    only those. `max_len` bounds prompt + completion. The token that ends a completion is part of `ids`.
    """

    def __init__(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        max_len: int,
        stop_token_ids: frozenset[int],
        *,
        seed: int = 0,
        choice: int = 0,
    ) -> None:
        self.request_id = request_id
        self.seed, self.choice = seed, choice
        self.sampling = sampling
        self.max_len = max_len
        self.stop_token_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else stop_token_ids
        )
        self.ids = list(prompt_ids)
        self.num_prompt = len(self.ids)
        self.output_logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None

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
    def output_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def longest_len(self) -> int:
        """The most tokens, prompt included, that this request can come to."""
        return min(self.max_len, self.num_prompt + self.sampling.max_new_tokens)

    def accept(self, sampled: Sampled) -> Event:
        """Take the sampled token, or its error, and decide whether the request is finished."""
        assert self.finish_reason is None, f"request {self.request_id} is finished"
        if sampled.error is not None:
            return self.finish("error", sampled.error)
        self.ids.append(sampled.token_id)
        if sampled.logprob is not None:
            self.output_logprobs.append(sampled.logprob)
        if sampled.token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.longest_len:
            self.finish_reason = "length"
        return Event(
            self.request_id,
            sampled.token_id,
            sampled.logprob,
            sampled.top_logprobs,
            self.finish_reason,
            None,
            self.num_cached_tokens or 0,
        )

    def finish(self, reason: FinishReason, error: str | None = None) -> Event:
        """End the request without a new token."""
        assert self.finish_reason is None, f"request {self.request_id} is finished"
        self.finish_reason = reason
        return Event(
            self.request_id, None, finish_reason=reason, error=error, num_cached_tokens=self.num_cached_tokens or 0
        )
