"""Answers that several tasks look at are pooled once: pooled more often, they would prove what they do not."""

from __future__ import annotations

from bisect import bisect_left
from math import comb

import pytest

from k2quant.eval.statistics import paired

ITEMS, MARGIN, ALPHA = 60, 0.1, 0.05
LOST, GAINED = 0.12, 0.02
"""Shares of items that flip: a drop of just the margin, at which no more than alpha of all candidates may pass."""


def passed(times: int, gained: int) -> int:
    """Return how many lost answers are one too many for a PASS, where each is pooled so many times."""

    def too_many(lost: int) -> bool:
        return paired.p_good(times * lost, times * gained, times * ITEMS, MARGIN) > ALPHA

    return bisect_left(range(ITEMS - gained + 1), True, key=too_many)


def passes(times: int) -> float:
    """Return how often a candidate at the margin passes where each answer is pooled so many times."""
    found = 0.0
    for gained in range(7):  # more is rarer than one in ten thousand
        for lost in range(passed(times, gained)):
            ways = comb(ITEMS, lost) * comb(ITEMS - lost, gained)
            found += ways * LOST**lost * GAINED**gained * (1 - LOST - GAINED) ** (ITEMS - lost - gained)
    return found


@pytest.mark.parametrize(("times", "least", "most"), [(1, 0.01, ALPHA), (3, 0.15, 0.3)])
def test_the_level_holds_once_and_not_thrice(times: int, least: float, most: float) -> None:
    """The exact test keeps alpha for answers that count once; three parts of each as three items break it."""
    assert least < passes(times) <= most
