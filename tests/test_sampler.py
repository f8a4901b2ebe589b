"""One row of logits in, one token out: what is kept, how likely it is drawn, and that nothing else matters."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_infer.config import SamplingParams
from megatron_infer.engine.sampler import Draw, sample

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, 2.0, -5.0], dtype=np.float32)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def draw_many(params: SamplingParams, count: int = 400, logits: np.ndarray = LOGITS) -> list[int]:
    return [sample(logits, Draw(params, 7, 0, position)).token_id for position in range(count)]


def test_greedy_takes_the_lowest_index_among_equals() -> None:
    tied = np.array([1.0, 4.0, 4.0], dtype=np.float32)
    assert sample(tied, Draw(SamplingParams(), 0, 0, 0)).token_id == 1


def test_logprobs_are_those_of_the_unscaled_distribution() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, logprobs=3)
    sampled = sample(LOGITS, Draw(params, 1, 0, 0))
    assert sampled.logprob == pytest.approx(np.log(PROBABILITIES[sampled.token_id]), abs=1e-6)
    assert sampled.top_logprobs is not None
    assert [token for token, _ in sampled.top_logprobs] == [1, 3, 4], "most likely first, lower index among equals"
    assert dict(sampled.top_logprobs)[1] == pytest.approx(np.log(PROBABILITIES[1]), abs=1e-6)


def test_frequencies_follow_the_distribution() -> None:
    counts = np.bincount(draw_many(SamplingParams(temperature=1.0), 4000), minlength=6) / 4000
    assert np.abs(counts - PROBABILITIES).max() < 0.03


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"min_p": 0.3}, {1, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 100, "top_p": 0.99999}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 4, "top_p": 0.6, "min_p": 0.9}, {1}),
    ],
    ids=str,
)
def test_limits_keep_exactly_what_they_say(limits, kept) -> None:
    drawn = set(draw_many(SamplingParams(temperature=1.0, **limits), 3000))
    assert drawn <= kept
    assert drawn >= kept - {5}, "all but the very unlikely one turn up"


@pytest.mark.parametrize("temperature", [1e-9, 5e-324, 1e9])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    drawn = draw_many(SamplingParams(temperature=temperature), 200)
    assert set(drawn) == {1} if temperature < 1 else len(set(drawn)) == 6


def test_draws_depend_on_seed_choice_and_position_alone() -> None:
    params = SamplingParams(temperature=1.5)
    base = sample(LOGITS, Draw(params, 3, 0, 5))
    assert sample(LOGITS, Draw(params, 3, 0, 5)) == base
    sequences = {
        tuple(sample(LOGITS, Draw(params, seed, choice, p)).token_id for p in range(20))
        for seed, choice in ((3, 0), (3, 1), (4, 0))
    }
    assert len(sequences) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_without_finite_logits_is_an_error_not_a_token(bad: float) -> None:
    poisoned = LOGITS.copy()
    poisoned[2] = bad
    for params in (SamplingParams(logprobs=0), SamplingParams(temperature=1.0)):
        assert "NaN or Inf" in (sample(poisoned, Draw(params, 0, 0, 0)).error or "")
