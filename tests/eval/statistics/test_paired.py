"""Statistics of paired answers, against published values, brute force, and the levels that they promise."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial  # type: ignore[import-untyped]  # it has no types

from k2quant.errors import UsageError
from k2quant.eval.statistics import exact, paired
from k2quant.eval.statistics.restricted import GAMMA, critical_curve

MARGINS = (0.01, 0.02, 0.05)


@st.composite
def flips(draw: st.DrawFn, most: int = 400) -> tuple[int, int, int]:
    """Draw losses, gains and items."""
    n = draw(st.integers(1, most))
    lost = draw(st.integers(0, n))
    return lost, draw(st.integers(0, n - lost)), n


def brute_force(lost: int, gained: int, n: int, margin: float, *, bad: bool, flips: list[float]) -> float:
    """Return the largest probability of an outcome as extreme, by a sum over every outcome."""
    outcomes = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)])
    order, seen = paired.score(outcomes[:, 0], outcomes[:, 1], n, margin), paired.score(lost, gained, n, margin)
    extreme = outcomes[order <= seen + 1e-9 if bad else order >= seen - 1e-9]
    counts = np.column_stack([extreme, n - extreme.sum(1)])
    kinds = [((d + margin) / 2, (d - margin) / 2, 1 - d) for d in flips]
    return float(max(multinomial.pmf(counts, n, [max(0.0, p) for p in kind]).sum() for kind in kinds))


class TestScore:
    """Tango's statistic and its interval."""

    def test_known_values(self) -> None:
        """40 losses and 20 gains of 160 give the Z, the interval and the McNemar p that are known for them."""
        found = [float(paired.score(40, 20, 160, margin)) for margin in (0.05, 0.1, 0.2, 0.25)]
        assert found == pytest.approx([-1.5681, -0.5266, 1.5811, 2.6274], abs=5e-5)
        assert paired.interval(40, 20, 160, 0.025) == pytest.approx((0.03086, 0.21806), abs=5e-6)
        assert paired.p_worse(40, 20) == pytest.approx(0.006745, abs=5e-7)

    def test_without_flips(self) -> None:
        """Z is the root of n m / (1 - m), and the interval's ends lie where that is the normal quantile."""
        assert float(paired.score(0, 0, 268, 0.01)) == pytest.approx(math.sqrt(268 * 0.01 / 0.99))
        high = 1.6448536269514722**2 / (500 + 1.6448536269514722**2)
        assert paired.interval(0, 0, 500, 0.05) == pytest.approx((-high, high))

    def test_arrays(self) -> None:
        """Arrays give what their numbers give one by one."""
        lost, gained = np.arange(5), np.arange(5)[::-1]
        single = [float(paired.score(b, c, 50, 0.02)) for b, c in zip(lost, gained, strict=True)]
        assert paired.score(lost, gained, 50, 0.02).tolist() == single

    @given(flips(), st.floats(-0.4, 0.4))
    def test_order(self, counts: tuple[int, int, int], margin: float) -> None:
        """Z falls with a loss, rises with a gain and with the margin, and turns its sign when the models swap."""
        lost, gained, n = counts
        here = float(paired.score(lost, gained, n + 1, margin))
        assert float(paired.score(lost + 1, gained, n + 1, margin)) <= here + 1e-9
        assert float(paired.score(lost, gained + 1, n + 1, margin)) >= here - 1e-9
        assert float(paired.score(lost, gained, n + 1, margin + 0.01)) >= here - 1e-9
        assert float(paired.score(gained, lost, n + 1, -margin)) == pytest.approx(-here, abs=1e-6)

    @given(flips(), st.sampled_from([0.005, 0.05, 0.2]))
    def test_interval(self, counts: tuple[int, int, int], alpha: float) -> None:
        """The interval holds the drop, mirrors when the models swap, and grows with the confidence."""
        lost, gained, n = counts
        low, high = paired.interval(lost, gained, n, alpha)
        assert -1 <= low <= (lost - gained) / n <= high <= 1
        assert paired.interval(gained, lost, n, alpha) == pytest.approx((-high, -low), abs=1e-9)
        wider = paired.interval(lost, gained, n, alpha / 2)
        assert wider[0] <= low + 1e-12
        assert wider[1] >= high - 1e-12


class TestExact:
    """P-values that hold whatever the share of flips is."""

    @pytest.mark.parametrize("counts", [(0, 0, 30), (2, 1, 40), (5, 9, 50), (10, 0, 30), (1, 0, 12)])
    @pytest.mark.parametrize("margin", MARGINS)
    def test_against_brute_force(self, counts: tuple[int, int, int], margin: float) -> None:
        """Both p-values lie between the sums over all outcomes under the share that was seen and under any share.

        Which shares are looked at between these, and how exactly, is tested with `restricted`.
        """
        every = [*np.linspace(margin, 1, 300).tolist()]
        seen = max(margin, (counts[0] + counts[1]) / counts[2])
        for found, bad in ((paired.p_good(*counts, margin), False), (paired.p_bad(*counts, margin), True)):
            assert found >= brute_force(*counts, margin, bad=bad, flips=[seen]) - 1e-9
            assert found <= brute_force(*counts, margin, bad=bad, flips=every) + 2e-4

    @pytest.mark.parametrize("upper", [False, True])
    @pytest.mark.parametrize("share", [0.02, 0.03, 0.3, 0.97, 1.0])
    def test_one_share_of_flips(self, share: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
        """The probability at one share of flips is that of the sum over all outcomes to 1e-12."""
        n, margin = 60, 0.02
        largest = exact.LargestChance(n, margin, upper=upper)
        seen = float(paired.score(3, 2, n, margin)) + (1e-10 if upper else -1e-10)
        found = largest.at(exact.score_curve(n, margin, seen), share)
        below = brute_force(3, 2, n, margin, bad=upper, flips=[share])
        assert found == pytest.approx(below, abs=1e-12)

    @pytest.mark.parametrize("n", [1, 100, 268, 298, 299])
    def test_no_flips(self, n: int) -> None:
        """Without any flips, p is the chance that no item of n is lost at a rate of the margin, and gamma."""
        assert paired.p_good(0, 0, n, 0.01) == pytest.approx(0.99**n + GAMMA, rel=1e-9)

    @pytest.mark.parametrize(
        ("margin", "score_passes", "passes"), [(0.01, 268, 299), (0.02, 133, 149), (0.005, 539, 598)]
    )
    def test_edge_of_no_flips(self, margin: float, score_passes: int, passes: int) -> None:
        """The score test would already pass without flips where the exact one does not: one item less is not enough."""
        assert float(paired.score(0, 0, score_passes, margin)) >= 1.6448536269514722
        assert paired.p_good(0, 0, score_passes, margin) > 0.065
        assert paired.p_good(0, 0, passes - 1, margin) > 0.05 >= paired.p_good(0, 0, passes, margin)
        assert paired.acceptance(passes - 1, margin, 0.05)[0] == -1
        assert paired.acceptance(passes, margin, 0.05)[0] == 0

    @pytest.mark.parametrize(
        ("counts", "expected", "score_p"),
        [((0, 0, 268), 0.068, 0.050), ((1, 0, 400), 0.091, 0.066), ((3, 2, 500), 0.0739, 0.073)],
    )
    def test_known_values(self, counts: tuple[int, int, int], expected: float, score_p: float) -> None:
        """P-values of a few flips, and how far the score test's are from them."""
        assert paired.p_good(*counts, 0.01) == pytest.approx(expected, abs=1e-3)
        above = math.erfc(float(paired.score(*counts, 0.01)) / math.sqrt(2)) / 2
        assert above == pytest.approx(score_p, abs=1e-3)

    @settings(deadline=None, max_examples=4)
    @given(flips(40), st.sampled_from(MARGINS))
    def test_order(self, counts: tuple[int, int, int], margin: float) -> None:
        """One more loss for a gain or for nothing never looks better, by either p, and one more gain never worse."""
        lost, gained, n = counts
        n += 1
        here, worse, better = (lost, gained, n, margin), (lost + 1, gained, n, margin), (lost, gained + 1, n, margin)
        assert paired.p_good(*worse) >= paired.p_good(*here) - 1e-9 >= paired.p_good(*better) - 2e-9
        assert paired.p_bad(*worse) <= paired.p_bad(*here) + 1e-9 <= paired.p_bad(*better) + 2e-9

    @settings(deadline=None)
    @given(flips())
    def test_mcnemar(self, counts: tuple[int, int, int]) -> None:
        """The detector's p is that of a binomial test of equal coins, one-sided."""
        lost, gained, _ = counts
        expected = binomtest(lost, lost + gained, 0.5, "greater").pvalue if lost + gained else 1.0
        assert paired.p_worse(lost, gained) == pytest.approx(expected, rel=1e-9, abs=1e-15)

    def test_many_items(self) -> None:
        """A hundred thousand items with thousands of flips agree with the normal distribution, which is right there."""
        for lost, gained in ((3500, 2700), (3600, 2500), (2500, 2500)):
            z = float(paired.score(lost, gained, 100_000, 0.01))
            assert paired.p_good(lost, gained, 100_000, 0.01) == pytest.approx(
                math.erfc(z / math.sqrt(2)) / 2, abs=5e-4
            )
            assert paired.p_bad(lost, gained, 100_000, 0.01) == pytest.approx(
                math.erfc(-z / math.sqrt(2)) / 2, abs=3e-3
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, 0, 5, 0.01), "counts"),
            ((3, 3, 5, 0.01), "counts"),
            ((0, 0, 0, 0.01), "counts"),
            ((0, 0, 5, 0.0), "margin"),
        ],
    )
    def test_nonsense(self, arguments: tuple[Any, ...], message: str) -> None:
        """More flips than items, negative counts and a margin of nothing are refused."""
        for function in (paired.p_good, paired.p_bad):
            with pytest.raises(UsageError, match=message):
                function(*arguments)


def finer_grid(n: int, margin: float) -> list[float]:
    """Return shares of flips between those that the package looks at."""
    inner = exact.shares(n, margin)
    return [low + (high - low) * part for low, high in pairwise(inner) for part in (0.23, 0.5, 0.81)]


class TestLevel:
    """The promise: a candidate whose drop is the margin passes with a chance of at most alpha, and so fails."""

    @pytest.mark.parametrize("margin", MARGINS)
    @pytest.mark.parametrize("n", [20, 59, 133, 149, 198, 268, 299, 400])
    @pytest.mark.parametrize("upper", [False, True])
    def test_level(self, n: int, margin: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
        """At no share of flips, between those the package looks at, is the level above alpha."""
        curve = paired.rejection(n, margin, 0.05) if upper else paired.acceptance(n, margin, 0.05)
        largest = exact.LargestChance(n, margin, upper=upper)
        assert max(largest.at(curve, share) for share in finer_grid(n, margin)) <= 0.05 + 1e-9

    def test_level_where_nearly_all_items_flip(self) -> None:
        """There the number of flips spreads least, and a grid even in its root would step over the highest chance."""
        curve, n, margin, alpha = paired.acceptance(5193, 0.02, 0.025), 5193, 0.02, 0.025
        for flips in np.linspace(0.955, 0.965, 101):
            assert exact.chance(curve, n, flips, (flips + margin) / (2 * flips)) <= alpha

    def test_score_test_breaks_it(self) -> None:
        """The same enumeration finds the score test's worst level, .068: it would find ours too."""
        largest = exact.LargestChance(268, 0.01, upper=False)
        assert largest.of(exact.score_curve(268, 0.01, 1.6448536269514722)) == pytest.approx(0.068, abs=5e-4)

    @pytest.mark.parametrize(("n", "margin"), [(40, 0.05), (61, 0.1)])
    def test_acceptance_is_the_p_value(self, n: int, margin: float) -> None:
        """An outcome passes exactly if its p-value is at most alpha, and fails exactly if the other one is."""
        good, bad = paired.acceptance(n, margin, 0.05), paired.rejection(n, margin, 0.05)
        for k in (0, 1, 8, n):
            for most, function, step in ((good[k], paired.p_good, 1), (bad[k], paired.p_bad, -1)):
                for lost in range(max(0, most - 1), min(k, most + 2) + 1):
                    assert (step * (most - lost) >= (step < 0)) == (function(lost, k - lost, n, margin) <= 0.05)

    @pytest.mark.parametrize(
        ("n", "margin", "alpha"), [(40, 0.05, 0.05), (150, 0.02, 0.05), (150, 0.05, 0.1), (400, 0.01, 0.05)]
    )
    @pytest.mark.parametrize("upper", [False, True])
    def test_no_outcome_more_would_hold_alpha(self, n: int, margin: float, alpha: float, upper: bool) -> None:  # noqa: FBT001  a parameter of the test
        """Where all shares count, what passes, or fails, is all that can: the next outcome by Z would exceed alpha."""
        curve = critical_curve(n, margin, alpha, upper=upper, gamma=0.0)
        lost, k = curve + (0 if upper else 1), np.arange(n + 1)  # beside the curve
        there = (lost >= 0) & (lost <= k)
        beside = paired.score(lost[there], (k - lost)[there], n, margin)
        threshold = beside.min() + 1e-9 if upper else beside.max() - 1e-9
        wider = exact.score_curve(n, margin, threshold)
        largest = exact.LargestChance(n, margin, upper=upper)
        assert np.abs(wider - curve).sum() == 1
        assert largest.of(curve) <= alpha < largest.of(wider)

    def test_curve_rises_by_steps(self) -> None:
        """One more flip lets at most one more loss pass, as the sum over flips takes for granted."""
        for n in (1, 7, 150, 1319):
            for curve in (paired.acceptance(n, 0.02, 0.05), paired.rejection(n, 0.02, 0.05)):
                assert set(np.diff(curve).tolist()) <= {0, 1}
                assert curve[0] in {-1, 0}


class TestPower:
    """The chance of a verdict."""

    @pytest.mark.parametrize(
        ("share", "drop"), [(0.0, 0.0), (0.04, 0.0), (0.04, 0.02), (0.04, 0.04), (0.1, -0.03), (1.0, 0.0)]
    )
    def test_against_brute_force(self, share: float, drop: float) -> None:
        """Power is the sum of the probabilities of the outcomes that pass, and so for FAIL."""
        n, margin = 160, 0.03
        kinds = [(share + drop) / 2, (share - drop) / 2, 1 - share]
        good, bad = paired.acceptance(n, margin, 0.05), paired.rejection(n, margin, 0.05)
        outcomes = np.array([(b, c, n - b - c) for b in range(n + 1) for c in range(n + 1 - b)])
        chance, k, lost = multinomial.pmf(outcomes, n, kinds), outcomes[:, 0] + outcomes[:, 1], outcomes[:, 0]
        assert paired.power(n, margin, 0.05, share, drop) == pytest.approx(chance[lost <= good[k]].sum(), abs=1e-11)
        assert paired.failing(n, margin, 0.05, share, drop) == pytest.approx(chance[lost > bad[k]].sum(), abs=1e-11)

    def test_gsm8k(self) -> None:
        """1,319 items with 4% flips cannot carry one point, and carry two."""
        assert paired.power(1319, 0.01, 0.05, 0.04) == pytest.approx(0.55, abs=0.01)
        assert paired.power(1319, 0.02, 0.05, 0.04) == pytest.approx(0.97, abs=0.01)

    def test_one_way_flips(self) -> None:
        """Where every flip is a loss, the losses are binomial."""
        curve = paired.acceptance(500, 0.02, 0.05)
        most = max(k for k in range(501) if curve[k] >= k)
        assert paired.power(500, 0.02, 0.05, 0.01, 0.01) == pytest.approx(float(binom.cdf(most, 500, 0.01)), abs=1e-12)

    def test_impossible_kinds(self) -> None:
        """A drop larger than the share of flips is refused."""
        with pytest.raises(UsageError, match="drop"):
            paired.power(100, 0.02, 0.05, 0.01, 0.02)
