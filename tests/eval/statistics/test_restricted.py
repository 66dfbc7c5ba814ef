"""P-values of restricted shares of flips, against their definition, outcome by outcome, and the level they promise."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, multinomial  # type: ignore[import-untyped]  # it has no types

from k2quant.errors import UsageError
from k2quant.eval.statistics import exact, paired, restricted

UPPER = pytest.mark.parametrize("upper", [False, True])
CASES = [(5, 0.3, 0.02), (7, 0.05, 0.3)]

Outcome = tuple[int, int]


def outcomes(n: int) -> list[Outcome]:
    """Return all losses and gains of n items."""
    return [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]


def by_definition(n: int, margin: float, gamma: float, *, upper: bool) -> dict[Outcome, float]:
    """Return the p-value of every outcome.

    First Berger and Boos: the largest chance, over the shares under which that number of flips is not too unlikely, of
    such a Z; plus gamma. Then the largest p of all outcomes that are as good or better for the candidate (or as bad).
    """
    every = outcomes(n)
    counts = np.array([(lost, gained, n - lost - gained) for lost, gained in every])
    z, flips = paired.score(counts[:, 0], counts[:, 1], n, margin), counts[:, 0] + counts[:, 1]
    z = -z if upper else z
    extreme = z[:, None] >= z[None] - 1e-10  # is the first as extreme as the second?
    largest = np.zeros(len(every))
    for low, high in pairwise(exact.shares(n, margin)):
        inside = (flips >= binom.ppf(gamma / 2, n, low)) & (flips <= binom.isf(gamma / 2, n, high))
        for share in np.linspace(low, high, 9):
            kind = [(share + margin) / 2, (share - margin) / 2, 1 - share]
            chances = multinomial.pmf(counts, n, np.maximum(kind, 0)) * inside
            largest = np.where(inside, np.maximum(largest, chances @ extreme), largest)
    better = (counts[None, :, 0] <= counts[:, None, 0]) & (counts[None, :, 1] >= counts[:, None, 1])
    p = np.where(better.T if upper else better, largest, 0).max(1) + gamma
    return dict(zip(every, np.minimum(1, p).tolist(), strict=True))


@cache
def p_values(n: int, margin: float, gamma: float, *, upper: bool) -> dict[Outcome, float]:
    """Return the p-value of every outcome as the package finds it: two tests look at them, and they take seconds."""
    return {each: restricted.restricted_p(*each, n, margin, upper=upper, gamma=gamma) for each in outcomes(n)}


@UPPER
@pytest.mark.parametrize(("n", "margin", "gamma"), CASES)
def test_every_p_value_is_that_of_the_definition(n: int, margin: float, gamma: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Of all outcomes, with a gamma so large that it rules out much."""
    found = p_values(n, margin, gamma, upper=upper)
    for outcome, p in by_definition(n, margin, gamma, upper=upper).items():
        assert p - 1e-9 <= found[outcome] <= p + 2e-4


@UPPER
@pytest.mark.parametrize(("n", "margin", "gamma"), CASES)
def test_a_critical_curve_holds_the_outcomes_of_small_p(n: int, margin: float, gamma: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """And no other, for an alpha between any two p-values."""
    p = p_values(n, margin, gamma, upper=upper)
    values = sorted({*p.values(), gamma})
    between = [(low + high) / 2 for low, high in pairwise(values) if high - low > 1e-6]
    for alpha in [each for each in between if gamma < each < 0.5][::9]:
        curve = restricted.critical_curve(n, margin, alpha, upper=upper, gamma=gamma)
        found = {(lost, gained) for lost, gained in p if (lost > curve[lost + gained]) == upper}
        assert found == {outcome for outcome, value in p.items() if value <= alpha}
        assert not curve.flags.writeable


@UPPER
@settings(deadline=None, max_examples=6)
@given(st.data())
def test_one_more_loss_never_helps_and_one_more_gain_never_hurts(upper: bool, data: st.DataObject) -> None:  # noqa: FBT001  a parameter of the test
    """Whatever shares of flips that rules out."""
    n = data.draw(st.integers(2, 60))
    margin, gamma = data.draw(st.sampled_from([0.005, 0.02, 0.2])), data.draw(st.sampled_from([1e-6, 1e-3, 0.1]))
    lost = data.draw(st.integers(0, n - 1))
    gained = data.draw(st.integers(0, n - 1 - lost))
    here, worse, better = (
        restricted.restricted_p(*outcome, n, margin, upper=upper, gamma=gamma)
        for outcome in ((lost, gained), (lost + 1, gained), (lost, gained + 1))
    )
    worse, better = (better, worse) if upper else (worse, better)
    assert better - 1e-9 <= here <= worse + 1e-9


@UPPER
@pytest.mark.parametrize(
    ("n", "margin", "alpha"), [(30, 0.05, 0.05), (149, 0.02, 0.05), (500, 0.005, 0.01), (1319, 0.01, 0.025)]
)
def test_level(n: int, margin: float, alpha: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """What passes, or fails, has a chance of at most alpha under every share of flips, ruled out or not."""
    curve = restricted.critical_curve(n, margin, alpha, upper=upper)
    assert exact.LargestChance(n, margin, upper=upper).of(curve) <= alpha
    assert set(np.diff(curve).tolist()) <= {0, 1}


@UPPER
def test_a_gamma_that_lies_about_the_flips_breaks_the_level(upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """The same enumeration finds what restricting alone would do: without gamma added, alpha is exceeded."""
    n, margin, alpha, gamma = 300, 0.01, 0.05, 0.04
    curve = restricted.critical_curve(n, margin, alpha + gamma, upper=upper, gamma=gamma)
    assert alpha < exact.LargestChance(n, margin, upper=upper).of(curve) <= alpha + gamma


@pytest.mark.parametrize(("n", "margin", "alpha"), [(299, 0.01, 0.05), (1319, 0.01, 0.025)])
@UPPER
def test_nothing_is_lost_against_all_shares(n: int, margin: float, alpha: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """What passes or fails where all shares are looked at still does; at GSM8K's size more does."""
    new, old = (restricted.critical_curve(n, margin, alpha, upper=upper, gamma=g) for g in (restricted.GAMMA, 0.0))
    won = old - new if upper else new - old
    assert won.min() >= 0
    assert n != 1319 or won.max() > 0


@UPPER
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_no_p_value_is_more_than_gamma_above_that_over_all_shares(upper: bool, data: st.DataObject) -> None:  # noqa: FBT001  a parameter of the test
    """So an outcome may be lost only where that one lies within gamma below alpha."""
    n = data.draw(st.integers(1, 60))
    margin, gamma = data.draw(st.sampled_from([0.005, 0.02, 0.2])), data.draw(st.sampled_from([1e-6, 1e-3, 0.1]))
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    here, over_all = (
        restricted.restricted_p(lost, gained, n, margin, upper=upper, gamma=each) for each in (gamma, 0.0)
    )
    assert here <= min(1.0, over_all + gamma) + 1e-9


@UPPER
@pytest.mark.parametrize(("n", "margin", "alpha"), [(8, 0.1, 0.2), (9, 0.3, 0.05), (1, 0.4, 0.45), (3, 0.05, 0.4)])
def test_without_gamma_the_curve_is_the_largest_set_by_z(n: int, margin: float, alpha: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Outcomes are taken in the order of Z, best or worst first, while no share of flips has more than alpha."""
    largest = exact.LargestChance(n, margin, upper=upper)
    expected = exact.score_curve(n, margin, -99.0 if upper else 99.0)
    for seen in sorted({float(paired.score(*outcome, n, margin)) for outcome in outcomes(n)}, reverse=not upper):
        curve = exact.score_curve(n, margin, seen + 1e-9 if upper else seen - 1e-9)
        if largest.of(curve) > alpha:
            break
        expected = curve
    assert restricted.critical_curve(n, margin, alpha, upper=upper, gamma=0.0).tolist() == expected.tolist()


@pytest.mark.parametrize("place", [0, 1, 60, 100, -2, -1])
def test_a_span_leaves_out_at_most_gamma(place: int) -> None:
    """At most half of it on either side, under every share of the cell, and no less than a share needs."""
    n, gamma = 400, 1e-6
    cells = restricted.Cells(n, 0.01, upper=False, gamma=gamma)
    cell = cells[place % len(cells)]
    assert (cells[0].low, cells[len(cells) - 1].high) == (0.01, 1.0)
    for share in np.linspace(cell.low, cell.high, 5):
        assert max(binom.cdf(cell.first - 1, n, share), binom.sf(cell.last, n, share)) <= gamma / 2
    assert binom.cdf(cell.first, n, cell.low) > gamma / 2
    assert binom.sf(cell.last - 1, n, cell.high) > gamma / 2


@pytest.mark.parametrize(("counts", "upper"), [((195, 20), False), ((330, 80), True)])
def test_what_is_left_alone_far_out_would_change_nothing(counts: Outcome, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """At 21,600 items, beside a look at every cell."""
    n, margin = 21_600, 0.01
    cells = restricted.Cells(n, margin, upper=upper, gamma=restricted.GAMMA)
    chances = []
    for cell in (cells[place] for place in range(len(cells))):
        z = cells.seen(*counts, cell)
        chances += [] if z is None else [cells.chance(cells.of(z, cell), cell, cell.low)]
    found = restricted.restricted_p(*counts, n, margin, upper=upper) - restricted.GAMMA
    assert max(chances) - 1e-12 <= found <= max(chances) * 1.01


def test_arguments_that_make_no_sense_are_refused() -> None:
    """No items, a margin of 1, an alpha of a half or of gamma's size; one item and shares just below are allowed."""
    for arguments, message in (
        ((0, 0.1, 0.1), "n: "),
        ((5, 1.0, 0.1), "margin"),
        ((5, 0.1, 0.5), "alpha"),
        ((5, 0.1, 9e-6), "alpha: expected above 0, at least 1e-05"),
    ):
        with pytest.raises(UsageError, match=message):
            restricted.critical_curve(*arguments, upper=False)
    assert restricted.critical_curve(1, 0.9, 0.49, upper=False).tolist() == [0, 0]
    assert math.isclose(restricted.LEAST_ALPHA, 10 * restricted.GAMMA)


@UPPER
def test_outcomes_of_one_z_count_together_however_it_is_rounded(upper: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Some outcomes have one Z but for its last bits: where no share is ruled out, each has the p-value of both."""
    n, margin = 20, 0.1
    outcomes = [(lost, k - lost) for k in range(n + 1) for lost in range(k + 1)]
    scores = sorted((float(paired.score(*outcome, n, margin)), outcome) for outcome in outcomes)
    twins = [(one, other) for (a, one), (b, other) in pairwise(scores) if 0 < b - a < 1e-12]
    for one, other in twins[:5]:
        values = [restricted.restricted_p(*outcome, n, margin, upper=upper, gamma=0.0) for outcome in (one, other)]
        assert values[0] == values[1]
    assert twins
