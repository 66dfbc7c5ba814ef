"""How many items a margin takes where each is asked several times, and whether that is what the test then does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom  # type: ignore[import-untyped]  # it has no types

from k2quant.errors import UsageError
from k2quant.eval.statistics import planning
from k2quant.eval.statistics.dirichlet import chance_of_none
from k2quant.eval.statistics.repeats_planning import (
    Differences,
    Measured,
    assumed,
    chance_of_pass,
    items_for,
    measured,
    needed,
    plan_repeats,
    pooled,
    power_of,
    seen,
)


def sampled(flips: float, correlation: float, repeats: int, n: int, margin: float) -> float:
    """Return how often 2,000 candidates of the assumed kind pass: some items flip for good, of some a coin decides."""
    random = np.random.default_rng([repeats, n])
    sure, coins = flips * correlation, 2 * flips * (1 - correlation)
    kinds = random.multinomial(n, [sure / 2, sure / 2, coins, 1 - sure - coins], 2000)
    items = random.multinomial(kinds[:, 2], binom.pmf(np.arange(2 * repeats + 1), 2 * repeats, 0.5))
    items[:, 0] += kinds[:, 0]
    items[:, -1] += kinds[:, 1]
    items[:, repeats] += kinds[:, 3]
    weights = np.append((np.arange(2 * repeats + 1) - repeats) / repeats, -1) + margin
    return float((chance_of_none(weights, np.column_stack((items, np.ones(2000)))) <= 0.05).mean())


@pytest.mark.parametrize(
    ("flips", "correlation", "repeats", "n", "margin"),
    [(0.02, 0.5, 2, 500, 0.01), (0.04, 0.2, 4, 1000, 0.01), (0.1, 0.9, 8, 300, 0.02), (0.1, 0.0, 4, 600, 0.02)],
)
def test_power_is_what_resamples_give(flips: float, correlation: float, repeats: int, n: int, margin: float) -> None:
    """It is what 2,000 candidates of the assumed kind do, within three points and two standard errors."""
    found = power_of(assumed(flips, correlation, repeats), n, margin, 0.05)
    assert found == pytest.approx(sampled(flips, correlation, repeats, n, margin), abs=0.05)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 64))
def test_repeats_take_away_what_is_not_the_items_own(flips: float, correlation: float, repeats: int) -> None:
    """The mean square falls with the repeats to the part that comes again in each of them, and no further."""
    one, many = assumed(flips, correlation, 1), assumed(flips, correlation, repeats)
    assert one.variance == pytest.approx(flips)
    assert many.variance == pytest.approx(flips * (correlation + (1 - correlation) / repeats), abs=1e-12)
    assert 0 <= many.share <= 1
    assert many.size <= 1 + 1e-12


def test_certain_flips_gain_nothing_by_repeats() -> None:
    """Where each item comes out the same again, eight answers need as many items as one; where none does, an eighth."""
    certain = [items_for(assumed(0.06, 1.0, repeats), 0.01, 0.05, 0.8) for repeats in (1, 8)]
    assert certain[0] == certain[1]
    many, few = (items_for(assumed(0.3, 0.0, repeats), 0.01, 0.05, 0.8) for repeats in (1, 8))
    assert many is not None
    assert few is not None
    assert many / 8 < few < many / 7


def test_seen_differences_plan_themselves() -> None:
    """`needed` items as those seen have the power wanted, and so have a twentieth more; their signs do not matter."""
    values, counts = np.array([-4, -1, 0, 1, 4]), np.array([10, 60, 1700, 40, 5])
    items = needed(values, counts, 4, 0.01, 0.05, 0.8)
    assert items is not None
    kind = seen(values, counts, 4)
    assert kind.variance == pytest.approx((15 + 100 / 16) / 1815)
    for n in (items, items + 1, math.ceil(1.05 * items)):
        assert power_of(kind, n, 0.01, 0.05) >= 0.8
    assert power_of(kind, items * 9 // 10, 0.01, 0.05) < 0.8
    assert chance_of_pass(values, counts, 4, 0.01, 0.05) == power_of(kind, 1815, 0.01, 0.05)
    assert chance_of_pass(-values, counts, 4, 0.01, 0.05) == chance_of_pass(values, counts, 4, 0.01, 0.05)


def test_without_differences_the_edge_is_the_plan() -> None:
    """299 items show 1 pp, and no fewer; so do more."""
    assert items_for(Differences(0.0, 0.0), 0.01, 0.05, 0.8) == 299
    assert [power_of(Differences(0.0, 0.0), n, 0.01, 0.05) for n in (298, 299, 10**6)] == [0, 1, 1]


def test_sums_and_normal_distribution_agree() -> None:
    """Where sums end the normal distribution goes on."""
    kind = Differences(0.1, 0.5)
    below, above = (power_of(kind, n, 0.0009, 0.05) for n in (200_000, 200_001))
    assert 0.5 < below < 0.9
    assert above == pytest.approx(below, abs=0.01)


def test_too_many() -> None:
    """More than ten million items are none."""
    assert items_for(Differences(1.0, 1.0), 0.0001, 0.05, 0.8) is None


def test_one_repeat_is_the_plan_of_single_answers() -> None:
    """With one answer to each item the gate's exact test decides, and the plan is its own."""
    found = plan_repeats(margin=0.02, flips=0.04, correlation=0.3, repeats=1)
    assert found.items == planning.plan(margin=0.02, flips=0.04).items
    more = plan_repeats(margin=0.02, flips=0.04, correlation=0.3, repeats=4)
    assert more.items is not None
    assert found.items is not None
    assert more.answers is not None
    assert more.items < found.items < more.answers
    assert more.answers == 4 * more.items
    assert more.as_dict()["answers"] == more.answers


def test_a_pilot_gives_back_what_it_was_made_of() -> None:
    """20,000 items asked three and five times tell the share of single answers that flip, and how alike repeats are."""
    random = np.random.default_rng(0)
    sure, coins, n = 0.02, 0.1, 20_000
    base = np.ones(n)
    candidate = np.ones(n)
    lost, unsure = random.random(n) < sure, random.random(n) < coins
    candidate[lost] = 0
    base[unsure] = candidate[unsure] = 0.5
    found = measured(random.binomial(3, base), 3, random.binomial(5, candidate), 5)
    assert found.flips == pytest.approx(sure * (1 - coins) + coins / 2, abs=0.004)
    assert found.correlation == pytest.approx(sure * (1 - coins) / (sure * (1 - coins) + coins / 2), abs=0.04)


@pytest.mark.parametrize(("base", "candidate"), [(1, 4), (4, 1), (1, 1)])
def test_a_pilot_of_single_answers_knows_no_correlation(base: int, candidate: int) -> None:
    """Where one side was asked once nothing says how alike its repeats would be."""
    found = measured(np.array([base, 0]), base, np.array([0, 0]), candidate)
    assert found.correlation is None
    assert found.flips == 0.5


def test_a_pilot_without_flips_has_no_correlation() -> None:
    """Where nothing flips there is nothing to be alike."""
    assert measured(np.array([4, 0]), 4, np.array([4, 0]), 4).correlation is None


def test_tasks_weigh_by_their_items_and_flips() -> None:
    """Flips are those of all items; the correlation is that of all flips, and unknown where one that matters is."""
    once, often, calm = Measured(0.02, 1.0), Measured(0.1, 0.25), Measured(0.0, None)
    together = pooled([(once, 300), (often, 100), (calm, 100)])
    assert together.flips == pytest.approx(16 / 500)
    assert together.correlation == pytest.approx((6 + 2.5) / 16)
    assert pooled([(once, 300), (Measured(0.1, None), 100)]).correlation is None
    assert pooled([(calm, 10)]) == Measured(0.0, None)


@pytest.mark.parametrize(
    "nonsense",
    [
        (-0.1, 0.5, 2),
        (1.1, 0.5, 2),
        (0.1, -0.5, 2),
        (0.1, 1.5, 2),
        (0.1, 0.5, 0),
        (math.nan, 0.5, 2),
        (0.1, math.nan, 2),
    ],
)
def test_nonsense(nonsense: tuple[float, float, int]) -> None:
    """Shares that are none, and no repeats, are refused."""
    with pytest.raises(UsageError):
        assumed(*nonsense)
    with pytest.raises(UsageError):
        power_of(Differences(0.1, 1.0), 0, 0.01, 0.05)
