"""The soak's verdict can fail, and the soak itself runs; `python -m tests.soak` is the long form."""

from __future__ import annotations

import pytest

from tests.soak import LIMITS, slope, verdict

FLAT = dict.fromkeys(LIMITS, 40.0)


@pytest.mark.parametrize("name", list(LIMITS))
@pytest.mark.parametrize("direction", [1, -1])
def test_a_slow_leak_is_not_flat(name: str, direction: int) -> None:
    """One unit in five minutes, twice the limit of memory per minute."""
    minutes = [i / 10 for i in range(300)]
    step = 2 * LIMITS[name] if name == "rss_mib" else 0.2
    leaking = [{**FLAT, name: 40.0 + direction * (step * minute // 0.5) * 0.5} for minute in minutes]
    assert verdict(minutes, [FLAT] * 300)[1]
    lines, is_flat = verdict(minutes, leaking)
    assert not is_flat
    assert [line.split(":")[0] for line in lines if "NOT FLAT" in line] == [name]


def test_what_fills_in_the_first_third_is_not_a_leak() -> None:
    minutes = [float(i) for i in range(30)]
    warming = [{**FLAT, "rss_mib": 40.0 + min(minute, 10.0)} for minute in minutes]
    assert verdict(minutes, warming)[1]
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == 2.0
