"""No change of structure changes an answer: the demo's ids and log probabilities, hashed, are what they always were."""

from __future__ import annotations

import pytest

from tests.bits import HASHES, WAYS, digest

NATIVE = [way for way in WAYS if way != "reference" and "tp" not in way]


@pytest.mark.parametrize("way", NATIVE)
def test_answers_keep_their_bits(way: str) -> None:
    """Several ranks, and the reference ops, are left to `python -m tests.bits`."""
    assert digest(way) == HASHES[WAYS[way][0]]
