"""From one row of logits to one token id: on the host row by row, or on the device for all rows of a step.

Works in float64 and on each row by itself, so that nothing in the batch, no thread count and no rank changes a bit of
what is drawn. Randomness is counter-based: (seed, choice, position) alone decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_infer.engine.logits import NEVER, Edit
from megatron_infer.engine.request import Draw, Sampled

Row = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 16
"""Rows sorted together on the device: a float64 copy of a vocabulary of 49152 takes 6 MiB for them."""
NOT_FINITE = "the model produced NaN or Inf for this request; check the checkpoint's weights and dtype"


def sample(logits_V: npt.NDArray[np.float32], draw: Draw) -> Sampled:
    """Sample one token; log probabilities are those of the model's own distribution (nothing edited, scaled or cut).

    Args:
        logits_V: fp32 logits of one sequence, [vocabulary].
        draw: how to sample.
    Returns:
        The token, or an error in place of one when a logit is NaN or +Inf.
    """
    row_V = logits_V.astype(np.float64)
    if not np.isfinite(row_V).all():
        return Sampled(token_id=0, error=NOT_FINITE)
    token_id = _token(row_V, draw) if draw.known_id is None else draw.known_id
    if draw.num_logprobs is None:
        return Sampled(token_id)
    logprobs_V = _log_softmax(row_V).astype(np.float32)
    top = _most_likely(logprobs_V, draw.num_logprobs)
    return Sampled(token_id, float(logprobs_V[token_id]), tuple((int(i), float(logprobs_V[i])) for i in top))


def _token(row_V: Row, draw: Draw) -> int:
    drawn_V = np.where(row_V <= NEVER, -np.inf, row_V)
    if draw.edit is not None:
        draw.edit.apply(drawn_V)
    return int(drawn_V.argmax()) if draw.params.temperature == 0.0 else _draw_token(drawn_V, draw)


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


def draw_numbers(draw: Draw) -> tuple[float, float, float, float, float]:
    """What `sample_on_device` needs to know of a draw; the random number depends on (seed, choice, position) alone."""
    params = draw.params
    uniform = 0.0 if params.temperature == 0.0 or draw.known_id is not None else _uniform(draw)
    return params.temperature, float(params.top_k), params.top_p, params.min_p, uniform


def sample_on_device(logits_SV: Tensor, draws_S5: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`sample` for many rows without the host: ids_S int64, -1 where a logit is NaN or infinite.

    The same steps in float64. Sums over the vocabulary may round otherwise than NumPy's, which shows only where the
    random number falls on the edge between two tokens.

    Args:
        logits_SV: of any floating dtype. draws_S5: float64, `draw_numbers` of each of `draws`.
    """
    ids = []
    for start in range(0, len(draws), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        raw_SV = logits_SV[rows].double()
        drawn_SV = torch.where(raw_SV <= NEVER, -torch.inf, raw_SV)
        _edit_rows(drawn_SV, [draw.edit for draw in draws[rows]])
        drawn_S = _sample_rows(drawn_SV, draws_S5[rows])
        if any(draw.known_id is not None for draw in draws[rows]):
            known = [-1 if draw.known_id is None else draw.known_id for draw in draws[rows]]
            known_S = torch.tensor(known, dtype=torch.int64, device=drawn_S.device)
            drawn_S = torch.where(known_S >= 0, known_S, drawn_S)
        ids.append(torch.where(raw_SV.isfinite().all(dim=1), drawn_S, -1))
    return torch.cat(ids)


def _edit_rows(logits_SV: Tensor, edits: Sequence[Edit | None]) -> None:
    """`Edit.apply` of several rows, in place: the same operations in float64, hence the same bits."""
    edited = [(row, edit) for row, edit in enumerate(edits) if edit is not None]
    if not edited:
        return
    device = logits_SV.device
    rows_n = torch.from_numpy(np.repeat([row for row, _ in edited], [len(e.ids_n) for _, e in edited])).to(device)
    ids_n = torch.from_numpy(np.concatenate([edit.ids_n for _, edit in edited])).to(device)
    changes_3n = torch.from_numpy(np.concatenate([edit.changes_3n for _, edit in edited], axis=1)).to(device)
    bias_n, penalty_n, minus_n = changes_3n
    x_n = logits_SV[rows_n, ids_n] + bias_n
    for row, edit in edited:
        if edit.is_exclusive:
            logits_SV[row] = -torch.inf
    logits_SV[rows_n, ids_n] = torch.where(x_n > 0, x_n / penalty_n, x_n * penalty_n) - minus_n


def _sample_rows(logits_SV: Tensor, draws_S5: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p, uniform = (column[:, None] for column in draws_S5.unbind(1))
    is_greedy = temperature == 0.0
    scaled_SV = (logits_SV - logits_SV.amax(dim=1, keepdim=True)) / torch.where(is_greedy, 1.0, temperature)
    probs_SV, ids_SV = torch.softmax(scaled_SV, dim=1).sort(dim=1, descending=True, stable=True)
    rank_V = torch.arange(probs_SV.shape[1], device=probs_SV.device)
    kept_SV = ((rank_V < top_k) | (top_k == 0)) & (probs_SV > 0)
    probs_SV = probs_SV * kept_SV
    before_SV = probs_SV.cumsum(dim=1) - probs_SV
    kept_SV &= (before_SV < top_p * probs_SV.sum(dim=1, keepdim=True)) | (top_p == 1.0) | (rank_V == 0)
    kept_SV &= probs_SV >= min_p * probs_SV[:, :1]
    cumulative_SV = (probs_SV * kept_SV).cumsum(dim=1)
    drawn_S1 = (cumulative_SV <= uniform * cumulative_SV[:, -1:]).sum(dim=1, keepdim=True)
    drawn_S1 = torch.minimum(drawn_S1, kept_SV.sum(dim=1, keepdim=True) - 1)
    drawn_S1 = ids_SV.gather(1, drawn_S1.clamp(min=0))
    return torch.where(is_greedy, logits_SV.argmax(dim=1, keepdim=True), drawn_S1)[:, 0]


def logprobs_on_device(logits_SV: Tensor, ids_S: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities fp32 of ids_S [S], and the `count` largest of each row with their ids [S, count]."""
    logprobs_SV = torch.log_softmax(logits_SV.double(), dim=1).float()
    # Not topk: among equals the lower index goes first.
    top_SC, top_ids_SC = (part[:, :count] for part in logprobs_SV.sort(dim=1, descending=True, stable=True))
    return logprobs_SV.gather(1, ids_S.clamp(min=0)[:, None])[:, 0], top_SC, top_ids_SC
