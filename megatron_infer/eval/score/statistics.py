"""How sure a mean is: bootstrap intervals over cases, the paired comparison of two runs, the exact sign test.

Owns the resampling. Knows no metric and no file. The same numbers give the same intervals: the seed is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
LEAST_CLUSTERS = 5
"""An interval from fewer independent observations would say nothing, and none is given."""

_CHUNK_ELEMENTS = 1 << 22
"""Numbers drawn at a time, so that memory does not grow with the number of resamples."""


@dataclass(frozen=True)
class Interval:
    """A mean over cases and its confidence interval, in the unit of the values; None from fewer than LEAST_CLUSTERS."""

    mean: float
    low: float | None
    high: float | None
    num_cases: int
    num_clusters: int


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same cases: the mean of the differences, and the cases where each is better.

    p_value: of the two-sided exact sign test; for values of 0 and 1 this is McNemar's exact test.
    """

    difference: Interval
    mean: float
    mean_against: float
    num_won: int
    num_lost: int
    num_tied: int
    p_value: float


def case_means(values_by_case: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """One value per case, the mean of its samples; a case where no sample has a value is left out.

    Samples of one case are no independent observations, so the case is the unit of everything else here.
    """
    means = {}
    for task_id, values in values_by_case.items():
        known = [value for value in values if value is not None]
        if known:
            means[task_id] = sum(known) / len(known)
    return means


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[str] | None = None, weights: Sequence[float] | None = None, *,
    seed: int = SEED, num_resamples: int = NUM_RESAMPLES,
) -> Interval:  # fmt: skip
    """The mean of one value per case, weighted or not, with its percentile bootstrap interval.

    As many clusters as there are, each with all its cases, are drawn with replacement, `num_resamples` times; the
    interval runs between the quantiles (1 - CONFIDENCE) / 2 and (1 + CONFIDENCE) / 2 of the drawn means, interpolated
    linearly. clusters: what each case is of, None where every case stands for itself. Of few clusters the interval is
    too narrow. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Davison and Hinkley
    1997, Bootstrap Methods and their Application, section 3.8, for clusters. Raises ValueError without a value.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    weighed = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    _, places = np.unique(range(len(values)) if clusters is None else np.asarray(clusters, object), return_inverse=True)
    sums: Array = np.bincount(places, weighed * np.asarray(values, dtype=np.float64)).astype(np.float64)
    totals: Array = np.bincount(places, weighed).astype(np.float64)
    mean, num_clusters = float(sums.sum() / totals.sum()), len(sums)
    if num_clusters < LEAST_CLUSTERS:
        return Interval(mean, None, None, len(values), num_clusters)
    means = _resampled_means(sums, totals, np.random.default_rng(seed), num_resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(mean, float(low), float(high), len(values), num_clusters)


def compare(
    values: Mapping[str, float], against: Mapping[str, float], clusters: Mapping[str, str] | None = None
) -> Comparison:
    """Compare two runs on the cases that both have, pair by pair; a positive difference favours `values`.

    The paired bootstrap draws cases, or clusters of them, each with both its values, which is a bootstrap of the
    differences. Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation. Raises
    ValueError if no case is shared.
    """
    shared = [task_id for task_id in values if task_id in against]
    if not shared:
        raise ValueError("the two runs share no case")
    pairs = [(values[task_id], against[task_id]) for task_id in shared]
    differences = [ours - theirs for ours, theirs in pairs]
    of = None if clusters is None else [clusters[task_id] for task_id in shared]
    num_won, num_lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        difference=bootstrap_mean(differences, of), mean=sum(ours for ours, _ in pairs) / len(pairs),
        mean_against=sum(theirs for _, theirs in pairs) / len(pairs), num_won=num_won, num_lost=num_lost,
        num_tied=len(pairs) - num_won - num_lost, p_value=sign_test(num_won, num_lost),
    )  # fmt: skip


def sign_test(num_won: int, num_lost: int) -> float:
    """Two-sided exact p-value of so many wins and losses if each were a fair coin; ties say nothing and do not count.

    2 * P(X <= min(won, lost)) for X binomial with p = 1/2, at most 1; in whole numbers, rounded once. Source: McNemar
    1947 in its exact form, Conover 1999, Practical Nonparametric Statistics, section 3.4.
    """
    total = num_won + num_lost
    combinations = at_most = 1
    for i in range(min(num_won, num_lost)):
        combinations = combinations * (total - i) // (i + 1)
        at_most += combinations
    p_value: float = 2 * at_most / 2**total
    return min(1.0, p_value)


def _resampled_means(sums: Array, totals: Array, generator: np.random.Generator, num_resamples: int) -> Array:
    num_clusters = len(sums)
    rows = max(1, _CHUNK_ELEMENTS // num_clusters)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, rows):
        size = (min(rows, num_resamples - start), num_clusters)
        drawn = generator.integers(0, num_clusters, size=size, dtype=np.int32)
        means[start : start + rows] = sums[drawn].sum(axis=1) / totals[drawn].sum(axis=1)
    return means
