"""Items that are asked several times: what the p-values and the interval of their differences promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from k2quant.errors import UsageError
from k2quant.eval.statistics import paired, repeats, sign_flips
from k2quant.eval.statistics.binomial import Counts

Found = tuple[Counts, Counts, int]


@st.composite
def differences(draw: st.DrawFn) -> Found:
    """Return values, counts and their unit, of one item to a few thousand."""
    unit = draw(st.sampled_from([1, 2, 3, 4, 8, 24]))
    kinds = draw(st.dictionaries(st.integers(-unit, unit), st.integers(1, 400), min_size=1, max_size=7))
    return np.array(list(kinds)), np.array(list(kinds.values())), unit


def moved(found: Found, start: int, end: int) -> Found:
    """Return the same with one item of the first kind in another kind's place."""
    values, counts, unit = found
    items = np.repeat(values, counts).tolist()
    items[items.index(start)] = end
    return (*np.unique(items, return_counts=True), unit)


@settings(deadline=None)
@given(differences(), st.floats(0.001, 0.4), st.data())
def test_a_better_item_speaks_for_the_candidate(found: Found, margin: float, data: st.DataObject) -> None:
    """`p_good` falls, and `p_bad` and `p_worse` rise, with any item's difference."""
    start = int(data.draw(st.sampled_from(found[0].tolist())))
    end = data.draw(st.integers(start, found[2]))
    better = moved(found, start, end)
    assert repeats.p_good(*better, margin) <= repeats.p_good(*found, margin) * (1 + 1e-8) + 1e-12
    assert repeats.p_bad(*better, margin) * (1 + 1e-8) + 1e-12 >= repeats.p_bad(*found, margin)


@settings(deadline=None)
@given(differences(), st.floats(0.001, 0.3), st.floats(1.01, 3))
def test_a_wider_margin_passes_sooner(found: Found, margin: float, times: float) -> None:
    """`p_good` falls and `p_bad` rises with the margin."""
    assert repeats.p_good(*found, times * margin) <= repeats.p_good(*found, margin) * (1 + 1e-8) + 1e-12
    assert repeats.p_bad(*found, times * margin) * (1 + 1e-8) + 1e-12 >= repeats.p_bad(*found, margin)


@settings(deadline=None, max_examples=25)
@given(differences(), st.floats(0.001, 0.4), st.integers(2, 6))
def test_units_are_only_units(found: Found, margin: float, times: int) -> None:
    """Differences in finer parts, and in another order, are the same differences."""
    values, counts, unit = found
    finer = (times * values[::-1], counts[::-1], times * unit)
    assert repeats.p_good(*finer, margin) == pytest.approx(repeats.p_good(*found, margin), rel=1e-8)
    assert repeats.p_bad(*finer, margin) == pytest.approx(repeats.p_bad(*found, margin), rel=1e-8)
    assert repeats.p_worse(*finer[:2]) == pytest.approx(repeats.p_worse(values, counts), rel=1e-8)
    assert repeats.interval(*finer, 0.05) == pytest.approx(repeats.interval(*found, 0.05), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(differences(), st.floats(0.001, 0.4), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_interval_is_what_is_not_rejected(found: Found, margin: float, alpha: float) -> None:
    """The margin lies above the interval where `p_good` is below alpha, and below it where `p_bad` is."""
    low, high = repeats.interval(*found, alpha)
    drop = -float(found[0] @ found[1]) / found[2] / found[1].sum()
    assert -1 <= low <= drop <= high <= 1
    good, bad = repeats.p_good(*found, margin), repeats.p_bad(*found, margin)
    assume(abs(good - alpha) > 1e-7 and abs(bad - alpha) > 1e-7)
    assert (good < alpha) == (high < margin)
    assert (bad < alpha) == (low > margin)


@settings(deadline=None, max_examples=25)
@given(differences(), st.sampled_from([0.01, 0.05]))
def test_sides_may_be_swapped(found: Found, alpha: float) -> None:
    """The interval of the one is that of the other, mirrored."""
    values, counts, unit = found
    low, high = repeats.interval(values, counts, unit, alpha)
    assert repeats.interval(-values, counts, unit, alpha) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("n", "margin"), [(1, 0.3), (268, 0.01), (299, 0.01), (598, 0.005), (20_000, 0.0005)])
def test_without_differences(n: int, margin: float) -> None:
    """Where no item differs it is the exact test's p: 299 items show 1 pp, 298 do not."""
    assert repeats.p_good(np.array([0]), np.array([n]), 4, margin) == pytest.approx((1 - margin) ** n, rel=1e-10)
    assert repeats.p_worse(np.array([0]), np.array([n])) == 1


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (10, 8), (40, 12), (3, 9)])
def test_damage_in_single_answers_is_mcnemars(lost: int, gained: int) -> None:
    """Where x is -1, 0 or 1 both tests for damage are McNemar's."""
    found = np.array([-1, 0, 1]), np.array([lost, 500, gained])
    assert repeats.p_worse(*found) == pytest.approx(paired.p_worse(lost, gained), rel=1e-9)
    assert repeats.p_bad(*found, 1, 0.0) == pytest.approx(paired.p_worse(lost, gained), rel=1e-9)


@pytest.mark.parametrize("counts", [(10, 1301, 8), (20, 1281, 18), (3, 495, 2)])
def test_single_answers_cost_some_power(counts: tuple[int, int, int]) -> None:
    """With one answer an item the bound is above the exact p, here by up to a half: the gate keeps the exact one."""
    exact = paired.p_good(counts[0], counts[2], sum(counts), 0.01)
    assert exact < repeats.p_good(np.array([-1, 0, 1]), np.array(counts), 1, 0.01) < 1.5 * exact


def test_all_lost_and_all_gained() -> None:
    """The ends of the scale: nothing speaks for a candidate that lost all, nothing against one that gained all."""
    lost, gained = (np.array([-4]), np.array([50]), 4), (np.array([4]), np.array([50]), 4)
    assert (repeats.p_good(*lost, 0.5), repeats.p_bad(*gained, 0.0)) == (1, 1)
    assert repeats.p_bad(*lost, 0.5) == pytest.approx(0.75**50, rel=1e-9)  # half a drop is three lost of four
    assert repeats.interval(*lost, 0.05) == pytest.approx((2 * 0.05 ** (1 / 50) - 1, 1.0), abs=1e-9)


@pytest.mark.parametrize("repeated", [2, 8])
@pytest.mark.parametrize("uncertain", [0.0, 0.3])
def test_the_level_holds(repeated: int, uncertain: float) -> None:
    """Of 1,000 candidates whose drop is the margin no more than alpha and two standard errors pass, or fail.

    The items differ in how sure they are; most of the drop is in few of them.
    """
    random = np.random.default_rng([repeated, round(10 * uncertain)])
    n, margin, resamples = 400, 0.02, 1000
    base = np.where(random.random((resamples, n)) < uncertain, 0.5, 1.0)
    lost = random.random((resamples, n)) < margin / (1 - uncertain / 2)  # of its items: the drop is their chance
    change = random.binomial(repeated, np.where(lost, 0.0, base)) - random.binomial(repeated, base)
    values = np.arange(-repeated, repeated + 1)
    passed = failed = 0
    for row in change:
        counts = np.bincount(row + repeated, minlength=len(values))
        passed += repeats.p_good(values, counts, repeated, margin) <= 0.05
        failed += repeats.p_bad(values, counts, repeated, margin) <= 0.05
    most = 0.05 + 2 * math.sqrt(0.05 * 0.95 / resamples)
    assert passed / resamples <= most
    assert failed / resamples <= most
    assert passed > 0.01 * resamples  # it is a test at all


def test_damage_of_endless_sizes_is_still_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sign flips would take too much memory, Gaffke's p at a margin of 0 stands in."""
    found = np.array([-7, 2]), np.array([30, 40])
    flips = repeats.p_worse(*found)
    monkeypatch.setattr(repeats, "_PLACES", 16)
    assert sign_flips.needed_places(np.array([2, 7]), np.array([40, 30])) > 16
    assert repeats.p_worse(*found) == repeats.p_bad(*found, 7, 0.0)
    assert repeats.p_worse(*found) == pytest.approx(flips, rel=1)


@pytest.mark.parametrize(
    ("values", "counts", "unit", "margin"),
    [
        ([0], [10], 0, 0.01),
        ([0, 0], [10, 1], 1, 0.01),
        ([0, 1], [10], 1, 0.01),
        ([-3, 0], [1, 9], 2, 0.01),
        ([0, 1], [0, 0], 1, 0.01),
        ([0, 1], [-1, 3], 1, 0.01),
        ([0], [10], 1, 1.0),
        ([0], [10], 1, -0.1),
        ([0], [10], 1, math.nan),
    ],
)
def test_nonsense(values: list[int], counts: list[int], unit: int, margin: float) -> None:
    """Differences beyond the unit, twice the same, no items and margins that are none are refused."""
    for test in (repeats.p_good, repeats.p_bad):
        with pytest.raises(UsageError):
            test(np.array(values), np.array(counts), unit, margin)


def test_alpha_is_a_share() -> None:
    """An interval at no confidence is refused."""
    with pytest.raises(UsageError, match="alpha"):
        repeats.interval(np.array([0]), np.array([9]), 1, 0.7)
