"""Exact chances on few items, where every outcome can be looked at one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom  # type: ignore[import-untyped]  # it has no types

from k2quant.errors import UsageError
from k2quant.eval.statistics import exact, paired
from k2quant.eval.statistics.binomial import Counts

UPPER = pytest.mark.parametrize("upper", [False, True])


def one_by_one(n: int, margin: float, threshold: float) -> list[int]:
    """Return the most losses of each number of flips whose Z reaches the threshold, by asking for each."""
    return [
        max((lost for lost in range(k + 1) if float(paired.score(lost, k - lost, n, margin)) >= threshold), default=-1)
        for k in range(n + 1)
    ]


def summed(curve: Counts, n: int, flips: float, losses: float, *, upper: bool) -> float:
    """Return the chance of the outcomes under or above a curve, as a sum over all numbers of flips."""
    k = np.arange(n + 1)
    inside = binom.sf(curve, k, losses) if upper else binom.cdf(curve, k, losses)
    return float((binom.pmf(k, n, flips) * inside).sum())


THRESHOLDS = [-9.0, -1.0, 0.0, 0.4, float(paired.score(2, 3, 12, 0.05)), float(paired.score(5, 0, 12, 0.05)), 9.0]


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("margin", [0.05, 0.3])
def test_a_curve_holds_every_outcome_whose_z_reaches_the_threshold(threshold: float, margin: float) -> None:
    """And no other: a Z that is the threshold reaches it. Where the search begins changes nothing."""
    expected = one_by_one(12, margin, threshold)
    assert exact.score_curve(12, margin, threshold).tolist() == expected
    for near in (
        expected,
        [-1] * 13,
        list(range(13)),
        [each - 3 for each in expected],
        [each + 2 for each in expected],
    ):
        assert exact.score_curve(12, margin, threshold, near=np.array(near)).tolist() == expected
    assert exact.score_curve(12, margin, threshold, flips=np.array([3, 4, 11])).tolist() == [
        expected[k] for k in (3, 4, 11)
    ]


@UPPER
@pytest.mark.parametrize(("n", "margin"), [(1, 0.05), (12, 0.05), (13, 0.3), (3000, 0.01)])
@pytest.mark.parametrize("threshold", [-3.0, 0.0, 1.6])
def test_a_chance_is_the_sum_over_all_outcomes(
    n: int,
    margin: float,
    threshold: float,
    upper: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """From no flips at all to nothing but flips, also where only a part of the sum is looked at."""
    curve = exact.score_curve(n, margin, threshold)
    for flips in (0.0, 0.001, 0.02, 0.3, 0.7, 0.999, 1.0):
        for losses in (0.0, 0.2, 0.5, 0.97, 1.0):
            found = exact.chance(curve, n, flips, losses, upper=upper)
            assert found == pytest.approx(summed(curve, n, flips, losses, upper=upper), abs=1e-11)
            if not upper:
                assert exact.chance(curve, n, flips, losses) == found
                assert exact.score_chance(threshold, n, margin, flips, losses) == pytest.approx(found, abs=1e-12)


@UPPER
@pytest.mark.parametrize(("n", "margin"), [(5, 0.3), (12, 0.05), (40, 0.1)])
def test_the_largest_chance_is_that_of_the_worst_share_of_flips(n: int, margin: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """No share of a fine grid has a larger one, and some share has it; at the margin all flips are losses."""
    largest = exact.LargestChance(n, margin, upper=upper)
    assert (largest.n, largest.margin, largest.upper) == (n, margin, upper)
    for threshold in (-1.0, 0.3, 1.0):
        curve = exact.score_curve(n, margin, threshold)
        shares = np.linspace(margin, 1.0, 400)
        fine = [summed(curve, n, share, (share + margin) / (2 * share), upper=upper) for share in shares]
        found = largest.of(curve)
        assert max(fine) <= found + 1e-9
        assert found == pytest.approx(max(fine), abs=2e-3)
        assert found <= 1
        peaks = largest.peaks(curve)
        assert 1 <= len(peaks) <= 4
        assert max(peaks.values()) == pytest.approx(found, abs=1e-12)
        heights = [-1.0, *(largest.at(curve, share) for share in largest.grid), -1.0]
        tops = sum(a <= b >= c for a, b, c in zip(heights, heights[1:], heights[2:], strict=False))
        assert len(peaks) == min(4, tops)  # one for each, and none for its neighbours
        assert all(margin <= share <= 1 and largest.at(curve, share) == height for share, height in peaks.items())
    all_lost = exact.score_curve(n, margin, 0.3)
    assert largest.at(all_lost, margin) == pytest.approx(summed(all_lost, n, margin, 1.0, upper=upper), abs=1e-12)


@UPPER
def test_a_peak_is_closed_in_on(upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Nothing a thousandth of a standard deviation beside it is higher."""
    n, margin = 60, 0.05
    largest = exact.LargestChance(n, margin, upper=upper)
    curve = exact.score_curve(n, margin, 0.8 if not upper else -0.8)
    share, height = max(largest.peaks(curve).items(), key=lambda peak: peak[1])
    near = 1e-3 * math.sqrt(share * (1 - share) / n)
    assert all(largest.at(curve, min(1.0, max(margin, share + step))) <= height + 1e-9 for step in (-near, near))


class Pointed(exact.LargestChance):
    """Chances with one maximum, at a share that is given."""

    top = 0.0

    def at(self, curve: Counts, flips: float) -> float:  # noqa: ARG002  what the package asks for
        """Return less, the further away a share is."""
        return 1 - abs(flips - self.top)


@pytest.mark.parametrize("place", [0, 1, -3, -2])
@pytest.mark.parametrize("part", [0.2, 0.8])
def test_a_peak_between_any_two_points_of_the_grid_is_closed_in_on(place: int, part: float) -> None:
    """Also between the first two and the last two, whichever of them is nearer."""
    pointed = Pointed(30, 0.1, upper=False)
    start, end = pointed.grid[place], pointed.grid[place + 1]
    pointed.top = start + part * (end - start)
    ((share, height),) = pointed.peaks(np.zeros(31, np.int64)).items()
    assert share == pytest.approx(pointed.top, abs=1e-3 * (end - start))
    assert height == pytest.approx(1)


@pytest.mark.parametrize(("n", "margin"), [(1, 0.05), (30, 0.3), (1000, 0.01), (5000, 0.02)])
def test_shares_of_flips_lie_close_enough_to_miss_no_maximum(n: int, margin: float) -> None:
    """From the margin to 1, half a standard deviation apart at most, and forty within twenty flips of either end."""
    grid = exact.shares(n, margin)
    assert (grid[0], grid[-1]) == (margin, 1.0)
    assert all(low < high for low, high in pairwise(grid))
    angles = [math.asin(math.sqrt(share)) for share in grid]
    assert max(high - low for low, high in pairwise(angles)) <= 0.5 / (2 * math.sqrt(n)) * (1 + 1e-9)
    reach = min(20 / n, 1 - margin) * (1 + 1e-9)
    below, above = (
        [step for step in steps if step > 1e-12]
        for steps in ([share - margin for share in grid], [1 - share for share in grid])
    )
    assert sum(step <= reach for step in below) >= 40
    assert min(below) == pytest.approx(0.02 / n)
    assert min(above) == pytest.approx(0.02 / n)
    if reach < 0.5:
        assert sum(step <= reach for step in above) >= 40


@pytest.mark.parametrize(("limit", "asked"), [(-math.inf, 28), (1.0, 28), (1.05, 0), (1.02, 2), (1.005, 4)])
def test_a_peak_that_stays_below_the_limit_is_left_alone(limit: float, asked: int) -> None:
    """The nearer it could come to the limit, the longer it is closed in on."""
    calls: list[float] = []

    def at(point: float) -> float:
        calls.append(point)
        return 1 - abs(point - 2) / 1e9

    assert exact.climb(at, [0.0, 1.0, 2.0, 3.0], 2, 1.0, limit=limit, miss=0.04) == (2.0, 1.0)
    assert len(calls) == asked


def test_arguments_that_make_no_sense_are_refused() -> None:
    """No margin and a margin of 1; one just below is allowed."""
    for p_value in (paired.p_good, paired.p_bad):
        for margin in (0.0, 1.0, 1.5):
            with pytest.raises(UsageError, match="margin"):
                p_value(1, 0, 5, margin)
        assert 0 < p_value(1, 0, 5, 0.9) <= 1
