"""How one completion is drawn and when it ends: SamplingParams, frozen and validated at construction."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

from megatron_infer.checks import ENDINGS, finite, int_in, one_of, option, positive_int


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn. `temperature` 0 is greedy. Equal seeds give equal ids whatever shares the batch."""

    max_new_tokens: int = option(256, "longest completion in tokens")
    temperature: float = option(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_k: int = option(0, "keep the k most likely tokens (0: all)")
    top_p: float = option(1.0, "keep the smallest set of tokens whose probability reaches p")
    min_p: float = option(0.0, "drop tokens less likely than min_p times the most likely")
    seed: int | None = option(None, "makes sampling repeatable (default: drawn from the system)")
    n: int = option(1, "completions per prompt")
    stop: tuple[str, ...] = option((), "stop strings; the completion ends before the first that appears")
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the completion, beside the model's own")
    logprobs: int | None = option(None, "return log probabilities, with this many alternatives per token (0: none)")
    ending: str = option(
        "raw",
        "where the answer ends: raw (where the model ends it), line, block (of code), or auto (line or block, by the "
        "code around the hole)",
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
        stop: tuple[str, ...] | str = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        one_of("ending", self.ending, ENDINGS)
        positive_int("max_new_tokens", self.max_new_tokens)
        finite("temperature", self.temperature, low=0.0)
        finite("top_p", self.top_p, low=0.0, high=1.0)
        finite("min_p", self.min_p, low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be in (0, 1]; for the most likely token alone use temperature=0")
        int_in("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            int_in("seed", self.seed, 0, 2**63 - 1)
        int_in("n", self.n, 1, self.MAX_N)
        if self.logprobs is not None:
            int_in("logprobs", self.logprobs, 0, self.MAX_LOGPROBS)
        if len(self.stop) > self.MAX_STOP_STRINGS:
            raise ValueError(f"at most {self.MAX_STOP_STRINGS} stop strings, got {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop strings must be non-empty text, got {text!r}")
        for token_id in self.stop_token_ids:
            int_in("stop_token_ids", token_id, 0, 2**31 - 1)

    @property
    def greedy_only(self) -> bool:
        """True when the arg-max alone decides, so that no rank needs another's logits."""
        return self.temperature == 0.0 and self.logprobs is None
