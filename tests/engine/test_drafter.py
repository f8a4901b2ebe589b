"""The look-up finds what a rescan finds, in the order in which one reads; what is drafted follows what pays."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infer.engine.drafter import MAX_CANDIDATES, MAX_MATCH, MIN_MATCH, LookupDrafter, Ngrams
from megatron_infer.engine.request import Draft, Request, Sampled
from megatron_infer.sampling_params import SamplingParams

END = 99
"""A model's end token"""
OLD = [random.Random(1).randrange(100, 10_000) for _ in range(40)]
ANSWER = list(range(20_000, 20_030))


def rescanned(ids: list[int], tail: list[int]) -> tuple[int, int]:
    """What Ngrams.find says it finds, by comparing at every place."""
    best, found = 0, 0
    places = [at for at in range(1, len(ids)) if ids[at - 1 : at + 1] == tail[-2:]][::-1][:MAX_CANDIDATES]
    for at in places if len(tail) >= MIN_MATCH else ():
        pairs = zip(reversed(ids[: at + 1]), reversed(tail[-MAX_MATCH:]), strict=False)
        length = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if at + 1 < len(ids) and ids[at + 1] != -1 and length > best:
            best, found = length, at + 1
    return found, best


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_look_up_finds_what_a_rescan_finds(data: st.DataObject) -> None:
    some_ids = st.lists(st.integers(-1, data.draw(st.integers(0, 4))), max_size=60)
    pieces = data.draw(st.lists(some_ids, max_size=4))
    ngrams = Ngrams()
    ids: list[int] = []
    for piece in pieces:
        ngrams.extend(piece)
        ids += piece
        tails = [ids[-MAX_MATCH:], [i for i in data.draw(some_ids) if i >= 0]]
        for tail in tails:
            if -1 not in tail:
                assert ngrams.find(tail) == rescanned(ids, tail)
    assert ngrams.ids == ids


# ---- what is drafted ------------------------------------------------------------------------------------------------


def drafter_of(num_draft_tokens: int = 15) -> LookupDrafter:
    return LookupDrafter(num_draft_tokens)


def request_of(ids: list[int], **options: object) -> Request:
    return Request(0, ids, SamplingParams(max_new_tokens=1000), 10**6, frozenset({END}), **options)


def answered(drafter: LookupDrafter, request: Request, answer: list[int], row_cost: float = 0.25) -> int:
    """Have the request get `answer`, END included; how many steps that takes. A step without drafts takes a second."""
    num_steps = 0
    while request.finish_reason is None:
        draft, source = drafter.propose(request)
        rest = answer[len(request.ids) - request.num_prompt :]
        draft = draft[: len(rest) - 1]
        request.accept([Sampled(token_id) for token_id in rest[: len(draft) + 1]], draft, source)
        drafter.observe(1, 1 + len(draft), 1 + row_cost * len(draft))
        num_steps += 1
    return num_steps


def taught() -> LookupDrafter:
    """One that has seen the prompt OLD answered with ANSWER."""
    drafter = drafter_of()
    answered(drafter, request_of(OLD), [*ANSWER, END])
    return drafter


def test_the_answer_is_read_behind_the_prefix_wherever_that_lies() -> None:
    """Prefix first: <pre> ... a b <suf> ... a b c d ... <mid>. What follows the prefix's end is c d, not <suf>."""
    prefix, suffix = [1, 2, 3, 10, 11, 12], [5, 6, 10, 11, 12, 13, 14, 7]
    ids = [90, *prefix, 91, *suffix, 92]
    request = request_of(ids, prefix=range(1, 1 + len(prefix)))
    drafter = drafter_of()
    drafter._hits[("prompt", 2)] = 1.0
    assert drafter.propose(request) == Draft([13, 14, 7, 92, *prefix, 13, 14, 7, 92, *prefix][:15], "prompt")


def test_what_repeats_itself_goes_round() -> None:
    drafter = drafter_of(8)
    drafter._hits[("prompt", 3)] = 1.0
    assert drafter.propose(request_of([5, 1, 2, 3, 1, 2, 3, 1, 2, 3])) == Draft([1, 2, 3, 1, 2, 3, 1, 2], "prompt")


@pytest.mark.parametrize("num_typed", [0, 1, 10, 20])
def test_the_rest_of_the_last_answer_is_drafted_whole(num_typed: int) -> None:
    drafter = taught()
    rest = [*ANSWER, END][num_typed:]
    draft = drafter.propose(request_of([*OLD, *ANSWER[:num_typed]]))
    assert draft == Draft(rest[:15], "typed")


def test_a_draft_ends_with_the_end_of_the_answer() -> None:
    drafter = taught()
    assert drafter.propose(request_of([*OLD, *ANSWER[:-3]])) == Draft([*ANSWER[-3:], END], "typed")
    drafter = drafter_of()
    drafter._hits[("prompt", 3)] = 1.0
    ended = [*OLD[:4], END, 5, 6, *OLD[:4]]
    assert drafter.propose(request_of(ended)) == Draft([END], "prompt")


@pytest.mark.parametrize("num_typed", [0, 10])
@pytest.mark.parametrize("num_new", [1, 3])
def test_tokens_cut_in_another_way_at_the_end_of_what_was_typed(num_typed: int, num_new: int) -> None:
    """The user stopped within a token: `num_new` others stand for it and the next, then the answer is the old one."""
    drafter = taught()
    seam = list(range(300, 300 + num_new))
    rest = [*ANSWER[num_typed + 2 :], END]
    request = request_of([*OLD, *ANSWER[:num_typed], seam[0]])
    answered(drafter, request, [*seam[1:], *rest])
    assert sum(accepted for _, accepted in request.drafts.values()) >= len(rest) / 2


def test_where_the_answer_leaves_the_old_one_so_do_the_drafts() -> None:
    drafter = taught()
    other = random.Random(2).sample(range(30_000, 40_000), 50)
    request = request_of(OLD)
    answered(drafter, request, [*ANSWER[:10], *other, END])
    assert request.drafts == {"typed": (15, 10)}


def test_an_aborted_answer_is_remembered_too() -> None:
    drafter = drafter_of()
    request = request_of(OLD)
    drafter.propose(request)
    request.accept([Sampled(token_id) for token_id in ANSWER[:1]])
    drafter.propose(request)
    request.accept([Sampled(token_id) for token_id in ANSWER[1:2]])
    request.finish("abort")
    assert drafter.propose(request_of(OLD)) == Draft(ANSWER[:2], "typed")


def test_memory_is_bounded() -> None:
    drafter = drafter_of()
    for number in range(200):
        first = 1000 * number
        answered(drafter, request_of([first, first + 1]), [*range(first + 2, first + 500), END])
    assert len(drafter._progress) == 1
    assert len(drafter._recent.ids) < 40_000


# ---- how much -------------------------------------------------------------------------------------------------------


def wrong_guesses(length: int) -> tuple[list[int], list[int]]:
    """A prompt and an answer whose every token was seen before, behind the same two, with another one next."""
    answer = random.Random(3).sample(range(100, 10_000), length)
    pairs = zip([7, *answer], answer, strict=False)
    return [token_id for pair in pairs for token_id in (*pair, 50)] + [7], answer


def test_what_is_never_right_is_hardly_ever_drafted() -> None:
    prompt, answer = wrong_guesses(300)
    drafter = drafter_of()
    request = request_of(prompt)
    assert answered(drafter, request, [*answer, END]) == 301
    assert sum(tokens for tokens, _ in request.drafts.values()) <= 9, "3 % of the steps, were a row as dear as a step"


def test_right_guesses_are_drafted_further_and_further() -> None:
    text = random.Random(4).sample(range(100, 10_000), 200)
    drafter = drafter_of()
    request = request_of([*text, *text[:2]])
    assert answered(drafter, request, [*text[2:], END]) < 198 / 5
    tokens, accepted = request.drafts["prompt"]
    assert accepted >= 0.95 * tokens


@pytest.mark.parametrize(("row_cost", "least", "most"), [(0.0, 10, 15), (0.9, 0, 0)])
def test_the_measured_cost_of_a_row_decides_how_much(row_cost: float, least: int, most: int) -> None:
    """Of a guess that is right in two of three cases."""
    drafter = drafter_of()
    for _ in range(20):
        drafter.observe(1, 1, 1.0)
        for _ in range(5):
            drafter.observe(1, 5, 1 + row_cost * 4)
    drafter._hits[("prompt", 3)] = 0.67
    draft, _ = drafter.propose(request_of([5, 1, 2, 3, 4, 1, 2, 3, 4]))
    assert least <= len(draft) <= most


def test_costs_are_those_of_as_many_sequences() -> None:
    """A row that costs a tenth of a step is a bargain for one sequence, and not where eight share the step."""
    drafter = drafter_of()
    for num_seqs in (1, 8):
        for _ in range(100):
            drafter.observe(num_seqs, num_seqs, 1.0)
            drafter.observe(num_seqs, num_seqs + 2, 1.2)
    drafter._hits[("prompt", 3)] = 0.67
    prompt = [5, 1, 2, 3, 4, 1, 2, 3, 4]
    assert len(drafter.propose(request_of(prompt)).token_ids) == 0
    drafter.observe(1, 1, 1.0)
    assert len(drafter.propose(request_of(prompt)).token_ids) >= 3


def test_a_row_that_was_dear_is_tried_again() -> None:
    drafter = drafter_of()
    drafter._hits[("prompt", 3)] = 0.9
    prompt = [5, 1, 2, 3, 4, 1, 2, 3, 4]
    for _ in range(50):
        drafter.observe(1, 1, 1.0)
        drafter.observe(1, 2, 9.0)
    assert not drafter.propose(request_of(prompt)).token_ids
    for _ in range(300):
        drafter.observe(1, 1, 1.0)
    assert drafter.propose(request_of(prompt)).token_ids
