"""Means with random weights: against exact fractions, beta distributions, and each other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, gamma  # type: ignore[import-untyped]  # it has no types

from k2quant.eval.statistics import dirichlet
from k2quant.eval.statistics.dirichlet import chance_of_none


def chance(weights: list[float], shapes: list[int]) -> float:
    """Return the chance of one row."""
    return float(chance_of_none(np.array(weights), np.array(shapes, dtype=np.float64)))


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1000).filter(bool), min_size=2, max_size=12, unique=True))
def test_different_weights_against_fractions(weights: list[int]) -> None:
    """With each weight once the chance is a sum of products, here in exact fractions."""
    weights = [-abs(weights[0]), *(weight for weight in weights[1:] if weight != -abs(weights[0]))]
    exact = Fraction(0)
    for weight in (weight for weight in weights if weight < 0):
        part = Fraction(1)
        for other in weights:
            part *= Fraction(weight, weight - other) if other != weight else 1
        exact += part
    assert chance([weight / 1000 for weight in weights], [1] * len(weights)) == pytest.approx(float(exact), rel=1e-9)


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)),
    st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)),
)
def test_two_weights_are_a_beta_distribution(weights: tuple[float, float], shapes: tuple[int, int]) -> None:
    """The share of one of two gamma variables is beta-distributed: to 9 digits, from one item to 300,000."""
    exact = beta.cdf(weights[1] / sum(weights), *shapes)
    assert chance([weights[0], -weights[1]], list(shapes)) == pytest.approx(exact, rel=1e-9, abs=1e-250)


@pytest.mark.parametrize(
    ("weights", "shapes"),
    [
        ((0.99251697, -0.00748303, -0.50748303), (19, 463, 1)),
        ((0.97279488, -0.02720512, -1.02720512), (10, 96, 1)),
        ((0.12463213, -0.00036787, -1.12536787), (218, 57_595, 1)),
        ((0.01, -0.09, -0.99), (300, 12, 2)),
    ],
)
def test_three_weights_against_quadrature(weights: tuple[float, ...], shapes: tuple[int, ...]) -> None:
    """Where much of a small weight meets little of a large one, the path must bend less: the sum stays right."""
    up, *down = (gamma(shape, scale=abs(weight)) for weight, shape in zip(weights, shapes, strict=True))
    places, parts = np.polynomial.legendre.leggauss(600)
    sums, dense = np.zeros(1), np.ones(1)
    for each in down:
        low, high = each.ppf(1e-18), each.isf(1e-18)
        x = (low + high) / 2 + (high - low) / 2 * places
        sums = (sums[:, None] + x).ravel()
        dense = (dense[:, None] * (parts * (high - low) / 2 * each.pdf(x))).ravel()
    assert chance(list(weights), list(shapes)) == pytest.approx(up.cdf(sums) @ dense, rel=1e-8)


def test_rows_are_those_alone() -> None:
    """Many rows at once are what each is alone, whichever weights it lacks and whichever side is the smaller."""
    random = np.random.default_rng(0)
    weights = np.array([-0.99, -0.49, 0.01, 0.51, 1.01])
    shapes = np.floor(10 ** random.uniform(-0.5, 3, (50, 5)))
    shapes[:, 0] += 1
    together = chance_of_none(weights, shapes)
    assert together.tolist() == pytest.approx([float(chance_of_none(weights, row)) for row in shapes], rel=1e-9)
    assert together.min() < 1e-3
    assert together.max() > 0.999


def test_nothing_above_nothing_is_sure() -> None:
    """Without a weight above 0 that occurs the sum is never above 0."""
    assert chance([-1.0, 0.0, 0.5], [1, 100, 0]) == 1.0


def test_a_path_that_leads_nowhere_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bend too large to begin with, smaller ones are taken until half of the points give the same sum."""
    known = chance([0.97279488, -0.02720512, -1.02720512], [10, 96, 1])
    monkeypatch.setattr(dirichlet, "_TILT", 0.6)
    assert chance([0.97279488, -0.02720512, -1.02720512], [10, 96, 1]) == pytest.approx(known, rel=1e-9)
    monkeypatch.setattr(dirichlet, "_TRIES", 1)
    with pytest.raises(AssertionError):
        chance([0.97279488, -0.02720512, -1.02720512], [10, 96, 1])
