"""The sign-flip test: every sign there is, and coins."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom  # type: ignore[import-untyped]  # it has no types

from k2quant.eval.statistics.sign_flips import chance_of_sum


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(0, 1023))
def test_against_every_sign(items: list[int], which: int) -> None:
    """It is the share of all signs that give at most what was seen."""
    sums = [sum(map(int.__mul__, signs, items)) for signs in itertools.product((-1, 1), repeat=len(items))]
    seen = sums[which % len(sums)]
    sizes, counts = np.unique(items, return_counts=True)
    share = sum(each <= seen for each in sums) / len(sums)
    assert chance_of_sum(seen, sizes, counts) == pytest.approx(share, rel=1e-10)


@pytest.mark.parametrize(("n", "up"), [(1, 0), (40, 10), (1000, 300), (300_000, 140_000)])
def test_equal_sizes_are_coins(n: int, up: int) -> None:
    """Of one size it is a binomial, small chances to 9 digits too."""
    found = chance_of_sum(7 * (2 * up - n), np.array([7]), np.array([n]))
    assert found == pytest.approx(binom.cdf(up, n, 0.5), rel=1e-9)


def test_ends() -> None:
    """All up is sure, less than all down impossible; no differences are all up."""
    assert chance_of_sum(9, np.array([1, 2]), np.array([1, 4])) == 1
    assert chance_of_sum(-11, np.array([1, 2]), np.array([1, 4])) == 0
    assert chance_of_sum(0, np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 1


def test_many_sizes_and_items_are_quick() -> None:
    """300,000 items of 64 sizes take no minutes."""
    begun = time.perf_counter()
    found = chance_of_sum(-100_000, np.arange(1, 65), np.full(64, 300_000 // 64))
    assert found == pytest.approx(5.19e-7, rel=0.01)  # 4.89 standard deviations
    assert time.perf_counter() - begun < 20
