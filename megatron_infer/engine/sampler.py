"""From one row of logits to one token id.

Works on one row at a time in float64 on the host, so that nothing in the batch, no thread count and no rank changes a
bit of what is drawn. Randomness is counter-based: (seed, choice, position) alone decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_infer.config import SamplingParams
from megatron_infer.engine.request import Sampled

Row = npt.NDArray[np.float64]

NOT_FINITE = "the model produced NaN or Inf for this request; check the checkpoint's weights and dtype"


@dataclass(frozen=True)
class Draw:
    """What a row is sampled with: its parameters, the request's own seed, and how many tokens it has generated."""

    params: SamplingParams
    seed: int
    choice: int
    position: int


def sample(logits_V: npt.NDArray[np.float32], draw: Draw) -> Sampled:
    """Sample one token; log probabilities are those of the unscaled distribution (temperature 1, nothing cut).

    Args:
        logits_V: fp32 logits of one sequence, [vocabulary].
        draw: how to sample.
    Returns:
        The token, or an error in place of one when a logit is NaN or +Inf.
    """
    row_V = logits_V.astype(np.float64)
    if not np.isfinite(row_V).all():
        return Sampled(token_id=0, error=NOT_FINITE)
    params = draw.params
    token_id = int(row_V.argmax()) if params.temperature == 0.0 else _draw_token(row_V, draw)
    if params.logprobs is None:
        return Sampled(token_id)
    logprobs_V = _log_softmax(row_V).astype(np.float32)
    top = _most_likely(logprobs_V, params.logprobs)
    return Sampled(token_id, float(logprobs_V[token_id]), tuple((int(i), float(logprobs_V[i])) for i in top))


def _log_softmax(row_V: Row) -> Row:
    shifted_V = row_V - row_V.max()
    result: Row = shifted_V - np.log(np.exp(shifted_V).sum())
    return result


def _most_likely(values_V: npt.NDArray[np.float32] | Row, count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest values, largest first, the lower index first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.intp)
    if count < len(values_V):
        threshold = np.partition(values_V, -count)[-count]
        candidates = np.flatnonzero(values_V >= threshold)
    else:
        candidates = np.arange(len(values_V))
    order = np.argsort(-values_V[candidates], kind="stable")
    result: npt.NDArray[np.intp] = candidates[order][:count]
    return result


def _draw_token(row_V: Row, draw: Draw) -> int:
    """Inverse-CDF sampling over what top-k, then top-p, then min-p leave, most likely first."""
    params = draw.params
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest become -inf
        scaled_V = (row_V - row_V.max()) / params.temperature
    probs_V = np.exp(_log_softmax(scaled_V))
    ids = _most_likely(probs_V, params.top_k or len(probs_V))
    probs = probs_V[ids]
    if params.top_p < 1.0:
        before = np.cumsum(probs) - probs
        kept = before < params.top_p * probs.sum()
        kept[0] = True
        ids, probs = ids[kept], probs[kept]
    if params.min_p > 0.0:
        kept = probs >= params.min_p * probs[0]
        ids, probs = ids[kept], probs[kept]
    cumulative = np.cumsum(probs)
    drawn = np.searchsorted(cumulative, _uniform(draw) * cumulative[-1], side="right")
    return int(ids[min(int(drawn), len(ids) - 1)])


def _uniform(draw: Draw) -> float:
    generator = np.random.Generator(np.random.Philox(key=[draw.seed, draw.choice], counter=draw.position))
    return float(generator.random())
