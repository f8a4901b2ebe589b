"""How one completion is drawn and when it ends: SamplingParams, frozen and validated at construction."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields

from megatron_infer.checks import ENDINGS, finite, int_in, one_of, option, unescaped


def _token_bias(text: str) -> tuple[int, float]:
    """ID=BIAS, as the command lines take it."""
    token_id, _, value = text.partition("=")
    return int(token_id), float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn. `temperature` 0 is greedy. Equal seeds give equal ids whatever shares the batch.

    Penalties, biases and bad words change logits before the token is drawn, greedy or not; `logprobs` are the model's
    own. With x a token's logit and c how often the completion has it (docs/sampling.md has the sources):

    repetition_penalty: of tokens in prompt or completion, positive x / penalty, others x * penalty.
    presence_penalty, frequency_penalty: x - presence * [c > 0] - frequency * c.
    logit_bias: pairs (token id, bias), or a mapping; x + bias, before the penalties; -inf forbids the token.
    bad_words: text that is not written, as the tokenizer divides it, with and without a space before it.
    min_new_tokens: no token that would end the completion is drawn before; stop strings and `ending` still end it.
    deadline_ms: from submission on, queue and prompt included. The step in progress is not interrupted; it computes at
    most max_num_batched_tokens. What is handed out of an answer stays, so a stream comes line by line from the second
    line on, and an answer is cut back to a line's end if it has one; with ending "block", to where the suffix fits.
    """

    max_new_tokens: int = option(256, "longest completion in tokens; 0 computes the prompt alone, into the cache")
    temperature: float = option(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_k: int = option(0, "keep the k most likely tokens (0: all)")
    top_p: float = option(1.0, "keep the smallest set of tokens whose probability reaches p")
    min_p: float = option(0.0, "drop tokens less likely than min_p times the most likely")
    seed: int | None = option(None, "makes sampling repeatable (default: drawn from the system)")
    n: int = option(1, "completions per prompt")
    repetition_penalty: float = option(1.0, "above 1: tokens of prompt and completion become less likely")
    presence_penalty: float = option(0.0, "what tokens of the completion lose in logits, -2 to 2")
    frequency_penalty: float = option(0.0, "the same for each time that they occur in it, -2 to 2")
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "ID=BIAS, added to a token's logit; -inf forbids it", _token_bias
    )
    bad_words: tuple[str, ...] = option((), "text that is not to be written; understands \\n", unescaped)
    min_new_tokens: int = option(0, "tokens before an end token or stop id; stop strings and ending may end it earlier")
    stop: tuple[str, ...] = option(
        (), "stop strings; the completion ends before the first that appears; understands \\n", unescaped
    )
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the completion, beside the model's own")
    logprobs: int | None = option(None, "return log probabilities, with this many alternatives per token (0: none)")
    prompt_logprobs: int | None = option(
        None, "return log probabilities of the prompt's tokens too, with this many alternatives each (0: none)"
    )
    ending: str = option(
        "raw",
        "where the answer ends: raw (where the model ends it), line, block (of code), or auto (line or block, by the "
        "code around the hole)",
    )
    deadline_ms: int | None = option(
        None, "milliseconds after which the answer ends with what is there, if possible at a line's end (default: none)"
    )
    ignore_eos: bool = option(False, "go on past the model's end tokens (benchmarks)")

    MAX_N = 256
    MAX_LOGPROBS = 64
    MAX_STOP_STRINGS = 64

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
                # NumPy's numbers: as Python's own they compare, hash and serialise alike everywhere.
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, spec.name, plain)
        for name in ("stop", "bad_words"):
            texts: tuple[str, ...] | str = getattr(self, name)
            object.__setattr__(self, name, (texts,) if isinstance(texts, str) else tuple(texts))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        one_of("ending", self.ending, ENDINGS)
        int_in("max_new_tokens", self.max_new_tokens, 0, 2**63 - 1)
        if self.deadline_ms is not None:
            int_in("deadline_ms", self.deadline_ms, 1, 2**63 - 1)
        finite("temperature", self.temperature, low=0.0)
        finite("top_p", self.top_p, low=0.0, high=1.0)
        finite("min_p", self.min_p, low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be in (0, 1]; for the most likely token alone use temperature=0")
        int_in("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            int_in("seed", self.seed, 0, 2**63 - 1)
        int_in("n", self.n, 1, self.MAX_N)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                int_in(name, getattr(self, name), 0, self.MAX_LOGPROBS)
        if len(self.stop) > self.MAX_STOP_STRINGS:
            raise ValueError(f"at most {self.MAX_STOP_STRINGS} stop strings, got {len(self.stop)}")
        for kind, texts in (("stop strings", self.stop), ("bad_words", self.bad_words)):
            for text in texts:
                if not isinstance(text, str) or not text:
                    raise ValueError(f"{kind} must be non-empty text, got {text!r}")
        for token_id in self.stop_token_ids:
            int_in("stop_token_ids", token_id, 0, 2**31 - 1)
        self._check_edits()

    def _check_edits(self) -> None:
        finite("repetition_penalty", self.repetition_penalty, low=0.01, high=100.0)
        for name in ("presence_penalty", "frequency_penalty"):
            finite(name, getattr(self, name), low=-2.0, high=2.0)
        int_in("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        given = self.logit_bias
        try:
            pairs = tuple(
                (operator.index(i), float(bias)) for i, bias in (given.items() if isinstance(given, Mapping) else given)
            )
        except (TypeError, ValueError):
            raise ValueError(f"logit_bias must be pairs of a token id and a number, got {given!r}") from None
        object.__setattr__(self, "logit_bias", pairs)
        if len(dict(pairs)) < len(pairs):
            raise ValueError("logit_bias names a token id twice")
        for token_id, bias in pairs:
            int_in("logit_bias: a token id", token_id, 0, 2**31 - 1)
            if bias != -math.inf:
                finite(f"logit_bias of token {token_id}", bias, low=-1e4, high=1e4)

    @property
    def greedy_only(self) -> bool:
        """True when the arg-max of the logits, edited or not, decides, and no log probability is wanted."""
        return self.temperature == 0.0 and self.logprobs is None

    @property
    def edits_logits(self) -> bool:
        """True when logits are changed before a token is drawn."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
            or self.logit_bias or self.bad_words or self.min_new_tokens
        )  # fmt: skip
