"""What changes a row of logits before its token is drawn: penalties, biases, ids that are forbidden or alone allowed.

Plain data and NumPy, without torch. A request's Processor makes an Edit for each of its rows; the sampler applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_infer.sampling_params import SamplingParams

NEVER = -(2.0**127)
"""The logit of an id that stands for no token, which is never drawn: finite, as a row must be; exact in bfloat16."""

_BIAS, _PENALTY, _MINUS = range(3)


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """Changes of n logits x of one row, in float64: x + bias; then x / penalty, or x * penalty below 0; then x - minus.

    The order is vLLM's. ids_n: int64. changes_3n: float64, the rows bias, penalty and minus. is_exclusive: no other id
    may be drawn.
    """

    ids_n: npt.NDArray[np.int64]
    changes_3n: npt.NDArray[np.float64]
    is_exclusive: bool = False

    def apply(self, row_V: npt.NDArray[np.float64]) -> None:
        """Change `row_V` in place; what may not be drawn becomes -inf."""
        bias_n, penalty_n, minus_n = self.changes_3n
        x_n = row_V[self.ids_n] + bias_n
        if self.is_exclusive:
            row_V.fill(-np.inf)
        row_V[self.ids_n] = np.where(x_n > 0, x_n / penalty_n, x_n * penalty_n) - minus_n


class Guide(Protocol):
    """What the first tokens of a completion must be, where they are not free."""

    def allowed(self, new_ids: Sequence[int]) -> npt.NDArray[np.int64] | None:
        """The ids, ascending, of which one must follow `new_ids`; None once any may."""
        ...


@dataclass(frozen=True, eq=False)
class Processor:
    """What one request asks for, beside how a token is drawn.

    repetition_penalty counts the tokens of prompt and completion, presence and frequency penalty those of the
    completion alone. bad_words: ids of forbidden words; a word's last token is forbidden where the others stand before
    it, be it in the prompt. end_ids: forbidden below min_new_tokens. A guide that would be left without an id prevails
    over what is forbidden.
    """

    sampling: SamplingParams
    end_ids: frozenset[int] = frozenset()
    bad_words: Sequence[tuple[int, ...]] = ()
    guide: Guide | None = None

    def needs_history(self, new_ids: Sequence[int]) -> bool:
        """Whether a row can only be edited once all tokens before it are known."""
        params = self.sampling
        has_penalty = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        is_guided = self.guide is not None and self.guide.allowed(new_ids) is not None
        return bool(has_penalty) or is_guided or any(len(word) > 1 for word in self.bad_words)

    def edit(self, ids: Sequence[int], num_prompt: int, num_new: int) -> Edit | None:
        """The change of the row behind `ids`, of which `num_prompt` are the prompt's; None: there is none.

        `num_new` tokens of the completion come before it; one of them may be missing in `ids` where no history counts.
        """
        params, new_ids = self.sampling, ids[num_prompt:]
        parts: list[tuple[Any, int, Any]] = []
        if params.logit_bias:
            biased, values = zip(*params.logit_bias, strict=True)
            parts.append((biased, _BIAS, values))
        if params.repetition_penalty != 1.0:
            parts.append((np.unique(ids), _PENALTY, params.repetition_penalty))
        if new_ids and (params.presence_penalty or params.frequency_penalty):
            seen, counts = np.unique(new_ids, return_counts=True)
            parts.append((seen, _MINUS, params.presence_penalty + params.frequency_penalty * counts))
        forbidden = {word[-1] for word in self.bad_words if _ends_with(ids, word[:-1])}
        if num_new < params.min_new_tokens:
            forbidden |= self.end_ids
        if forbidden:
            parts.append((sorted(forbidden), _BIAS, -np.inf))
        allowed_n = None if self.guide is None else self.guide.allowed(new_ids)
        return _joined(parts, allowed_n) if parts or allowed_n is not None else None


def _ends_with(ids: Sequence[int], tail: tuple[int, ...]) -> bool:
    return not tail or tuple(ids[-len(tail) :]) == tail


def _joined(parts: Sequence[tuple[Any, int, Any]], allowed_n: npt.NDArray[np.int64] | None) -> Edit:
    """One Edit of (ids, row of changes, values) parts; of those for one row the last prevails."""
    sources = [np.asarray(ids, dtype=np.int64) for ids, _, _ in parts]
    ids_n = np.unique(np.concatenate(sources if allowed_n is None else [*sources, allowed_n]))
    neutral_3n = np.repeat([[0.0], [1.0], [0.0]], len(ids_n), axis=1)
    changes_3n = neutral_3n.copy()
    for source, (_, row, values) in zip(sources, parts, strict=True):
        changes_3n[row, np.searchsorted(ids_n, source)] = values
    if allowed_n is None:
        return Edit(ids_n, changes_3n)
    is_allowed_n = np.isin(ids_n, allowed_n)
    if (changes_3n[_BIAS, is_allowed_n] == -np.inf).all():
        changes_3n = neutral_3n
    changes_3n[_BIAS, ~is_allowed_n] = -np.inf
    return Edit(ids_n, changes_3n, is_exclusive=True)
