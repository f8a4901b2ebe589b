"""One row of logits in, one token out: what is kept, how likely it is drawn, and that nothing else matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from megatron_infer.engine.logits import NEVER, Processor
from megatron_infer.engine.request import Draw
from megatron_infer.engine.sampler import draw_numbers, logprobs_on_device, sample, sample_on_device
from megatron_infer.sampling_params import SamplingParams

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


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 5e-324},
        {"temperature": 1e9},
    ],
    ids=str,
)
def test_the_device_draws_what_the_host_draws(params) -> None:
    """Rows of several requests at once, each with its own parameters and random number."""
    rows_SV = np.random.default_rng(1).normal(0, 3, (150, 97)).astype(np.float32)
    rows_SV[:, 50] = rows_SV[:, 20]  # equals, of which the lower index goes first
    draws = [Draw(SamplingParams(**params), seed, 0, position) for seed in range(3) for position in range(50)]
    expected = [sample(row, draw).token_id for row, draw in zip(rows_SV, draws, strict=True)]
    numbers = torch.tensor([draw_numbers(draw) for draw in draws], dtype=torch.float64)
    logits_SV = torch.from_numpy(rows_SV)
    assert sample_on_device(logits_SV, numbers, draws).tolist() == expected
    mixed = numbers.clone()
    mixed[::2, 0] = 0.0
    greedy = [int(row.argmax()) for row in rows_SV]
    drawn = sample_on_device(logits_SV, mixed, draws).tolist()
    assert drawn == [greedy[i] if i % 2 == 0 else expected[i] for i in range(150)]


def test_on_the_device_too_a_row_without_finite_logits_has_no_token() -> None:
    rows_SV = torch.from_numpy(np.stack([LOGITS, LOGITS, LOGITS]))
    rows_SV[0, 1], rows_SV[1, 5] = float("nan"), float("-inf")
    for temperature in (0.0, 1.0):
        draw = Draw(SamplingParams(temperature=temperature), 0, 0, 0)
        ids = sample_on_device(rows_SV, torch.tensor([draw_numbers(draw)] * 3).double(), [draw] * 3).tolist()
        assert ids[:2] == [-1, -1] and ids[2] >= 0


def test_log_probabilities_from_the_device() -> None:
    rows_SV, ids_S = torch.from_numpy(np.stack([LOGITS, LOGITS[::-1]])), torch.tensor([3, -1])
    logprobs_S, top_SC, top_ids_SC = logprobs_on_device(rows_SV, ids_S, 3)
    assert float(logprobs_S[0]) == pytest.approx(np.log(PROBABILITIES[3]), abs=1e-6)
    assert top_ids_SC.tolist() == [[1, 3, 4], [4, 1, 2]]
    assert top_SC[0].tolist() == pytest.approx(np.log(PROBABILITIES[[1, 3, 4]]), abs=1e-6)


# ---- edited rows --------------------------------------------------------------------------------------------------


class Fixed:
    """A guide with one answer."""

    def __init__(self, *ids: int) -> None:
        self._ids = np.array(ids, dtype=np.int64)

    def allowed(self, new_ids: Sequence[int]) -> np.ndarray:
        return self._ids


def edited(processor: Processor, ids: list[int], num_prompt: int, logits: np.ndarray = LOGITS) -> list[float]:
    row = logits.astype(np.float64)
    edit = processor.edit(ids, num_prompt, len(ids) - num_prompt)
    if edit is not None:
        edit.apply(row)
    return row.tolist()


def test_the_repetition_penalty_counts_prompt_and_completion() -> None:
    """transformers' RepetitionPenaltyLogitsProcessor: divided where positive, multiplied where negative."""
    processor = Processor(SamplingParams(repetition_penalty=2.0))
    assert edited(processor, [1, 5, 5, 3], 2) == [0.0, 1.5, 1.0, 1.0, 2.0, -10.0]


def test_presence_and_frequency_count_the_completion_alone() -> None:
    """OpenAI's: c * frequency + [c > 0] * presence are taken off."""
    processor = Processor(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    assert edited(processor, [1, 4, 3, 3, 0], 2) == [-0.75, 3.0, 1.0, 1.0, 2.0, -5.0]
    assert edited(processor, [1, 4], 2) == LOGITS.tolist()


def test_the_penalties_are_those_of_transformers() -> None:
    ids = [3, 1, 1, 5, 0]
    reference = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), torch.from_numpy(LOGITS[None]).double())
    assert edited(Processor(SamplingParams(repetition_penalty=1.3)), ids, 2) == reference[0].tolist()


def test_a_bias_comes_before_the_penalties() -> None:
    params = SamplingParams(logit_bias={3: -4.0, 0: 1.0, 2: -math.inf}, repetition_penalty=2.0, presence_penalty=1.0)
    assert edited(Processor(params), [3, 3], 1) == [1.0, 3.0, -math.inf, -5.0, 2.0, -5.0]


@pytest.mark.parametrize(("ids", "forbidden"), [([4, 1, 2], {3, 0}), ([1, 2, 4], {0}), ([4, 2], {0})], ids=str)
def test_a_bad_word_is_forbidden_at_its_last_token(ids, forbidden) -> None:
    processor = Processor(SamplingParams(bad_words=("word",)), bad_words=[(1, 2, 3), (0,)])
    row = edited(processor, ids, 2)
    assert {i for i, x in enumerate(row) if x == -math.inf} == forbidden


def test_no_end_token_before_the_shortest_length() -> None:
    processor = Processor(SamplingParams(min_new_tokens=2), end_ids=frozenset({1, 5}))
    for ids in ([4], [4, 3]):
        assert [i for i, x in enumerate(edited(processor, ids, 1)) if x == -math.inf] == [1, 5]
    assert processor.edit([4, 3, 3], 1, 2) is None


def test_a_guide_leaves_its_ids_alone_and_prevails_where_nothing_else_would_be_left() -> None:
    params = SamplingParams(logit_bias={2: -math.inf, 3: 1.0, 1: 9.0})
    inf = math.inf
    assert edited(Processor(params, guide=Fixed(2, 3)), [0], 1) == [-inf, -inf, -inf, 3.0, -inf, -inf]
    assert edited(Processor(params, guide=Fixed(2)), [0], 1) == [-inf, -inf, 1.0, -inf, -inf, -inf]


def test_log_probabilities_are_those_of_the_unedited_row() -> None:
    edit = Processor(SamplingParams(logit_bias={1: -math.inf})).edit([0], 1, 0)
    sampled = sample(LOGITS, Draw(SamplingParams(logprobs=2), 0, 0, 0, edit))
    assert sampled.token_id == 3
    assert sampled.logprob == pytest.approx(np.log(PROBABILITIES[3]), abs=1e-6)
    assert sampled.top_logprobs is not None and sampled.top_logprobs[0][0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e9, 1e300])
def test_what_is_forbidden_is_never_drawn(temperature: float) -> None:
    padded = np.array([0.0, NEVER, 1.0, NEVER], dtype=np.float32)
    edit = Processor(SamplingParams(logit_bias={2: -math.inf})).edit([0], 1, 0)
    params = SamplingParams(temperature=temperature)
    draws = [Draw(params, 1, 0, position, edit if position % 2 else None) for position in range(200)]
    drawn = [sample(padded, draw).token_id for draw in draws]
    assert set(drawn[1::2]) == {0}
    assert set(drawn[::2]) == ({2} if temperature == 0.0 else {0, 2})
    numbers = torch.tensor([draw_numbers(draw) for draw in draws], dtype=torch.float64)
    logits_SV = torch.from_numpy(np.tile(padded, (200, 1)))
    assert sample_on_device(logits_SV, numbers, draws).tolist() == drawn


def test_the_device_edits_as_the_host_does() -> None:
    rng = np.random.default_rng(2)
    rows_SV = rng.normal(0, 3, (60, 97)).astype(np.float32)
    draws = []
    for row in range(60):
        params = SamplingParams(
            temperature=float(row % 3) / 2, repetition_penalty=1.0 + row % 4 / 8, presence_penalty=0.3 * (row % 2),
            frequency_penalty=0.7, logit_bias={int(i): float(rng.normal(0, 9)) for i in rng.permutation(97)[:5]},
        )  # fmt: skip
        guide = Fixed(*sorted(rng.permutation(97)[:20].tolist())) if row % 5 == 0 else None
        edit = None if row % 7 == 0 else Processor(params, guide=guide).edit(rng.integers(0, 97, 30).tolist(), 9, 21)
        draws.append(Draw(params, row, 0, row, edit))
    expected = [sample(row, draw).token_id for row, draw in zip(rows_SV, draws, strict=True)]
    numbers = torch.tensor([draw_numbers(draw) for draw in draws], dtype=torch.float64)
    assert sample_on_device(torch.from_numpy(rows_SV), numbers, draws).tolist() == expected
    plain = [replace(draw, edit=None) for draw in draws]
    assert sample_on_device(torch.from_numpy(rows_SV), numbers, plain).tolist() != expected
