"""Statistics of paired answers: the drop in accuracy, and how sure one can be that it is below or above a margin.

Two models answer the same `n` items. `lost` items only the baseline has right, `gained` items only the candidate; the
drop is `(lost - gained) / n`, the share of flips `(lost + gained) / n`. Tango's score statistic Z orders the outcomes:
the larger, the better for the candidate. Its p-values here are not those of a normal distribution, which are wrong
where flips are few, but exact: the largest probability, under any pair of models that the hypothesis allows, of an
outcome as extreme as the one seen. For one share of flips that is a sum over all outcomes, of which only those within
8.5 standard deviations are visited; the largest over all shares is found on a grid and then closed in on.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from k2quant.errors import UsageError
from k2quant.eval.binomial import Floats, beyond, probability, window

Counts = NDArray[np.int64]

_TIE = 1e-10  # two Z so close, relative to 1 or Z, are equal but for rounding
_POINTS = 4  # of the grid for each step of 1 in the root of the expected flips
_NEAR = 40  # points of the grid within twenty flips of either end
_PEAKS = 4  # highest points of the grid that are closed in on
_HALVINGS = 14  # of the grid's step around each of them


def score(lost: Any, gained: Any, n: Any, margin: float) -> Floats:
    """Return Tango's Z of "the drop is the margin": large speaks for a smaller drop, negative for a larger one.

    Args:
        lost: items only the baseline has right; a number or an array of any shape.
        gained: items only the candidate has right; likewise.
        n: items, at least `lost + gained`; likewise.
        margin: the drop in question, above -1 and below 1.

    Returns:
        float64 of the common shape; 0 where margin and flips are both nothing.
    """
    b, c, n = (np.asarray(values, dtype=np.float64) for values in (lost, gained, n))
    half = b + c + (2 * n + b - c) * margin
    # Rounding may leave a root of less than nothing where both solutions agree.
    root = np.sqrt(np.maximum(half * half - 8 * n * b * margin * (1 + margin), 0))
    variance = n * np.maximum((half + root) / (2 * n) - margin - margin * margin, 0)
    above = c - b + n * margin
    return cast("Floats", np.divide(above, np.sqrt(variance), out=np.zeros_like(above * variance), where=variance > 0))


def interval(lost: int, gained: int, n: int, alpha: float) -> tuple[float, float]:
    """Return Tango's score interval of the drop at 1 - 2 alpha; each end alone holds with 1 - alpha.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.
        n: items, at least 1.
        alpha: above 0, below 0.5.

    Returns:
        Lowest and highest drop, -1 to 1.

    Raises:
        UsageError: the counts or alpha make no sense.
    """
    _check(lost, gained, n)
    _check_share("alpha", alpha, 0.5)
    far = NormalDist().inv_cdf(1 - alpha)
    drop = (lost - gained) / n
    return _where_score_is(-far, lost, gained, n, -1.0, drop), _where_score_is(far, lost, gained, n, drop, 1.0)


def _where_score_is(wanted: float, lost: int, gained: int, n: int, low: float, high: float) -> float:
    """Return the drop between `low` and `high` at which Z, which rises with it, is as wanted."""
    for _ in range(100):
        middle = (low + high) / 2
        if score(lost, gained, n, middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def p_good(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the exact p-value of "the drop is at least the margin": small shows that the candidate is good enough.

    Without any flips it is `(1 - margin) ** n` while that is not tiny.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.
        n: items, at least 1.
        margin: above 0, below 1.

    Raises:
        UsageError: the counts or the margin make no sense.
    """
    _check(lost, gained, n)
    _check_share("margin", margin, 1)
    seen = float(score(lost, gained, n, margin))
    return _Largest(n, margin, upper=False).of(_curve(n, margin, seen - _TIE * max(1, abs(seen))))


def p_bad(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the exact p-value of "the drop is at most the margin": small shows that the candidate is too bad.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.
        n: items, at least 1.
        margin: above 0, below 1.

    Raises:
        UsageError: the counts or the margin make no sense.
    """
    _check(lost, gained, n)
    _check_share("margin", margin, 1)
    seen = float(score(lost, gained, n, margin))
    return _Largest(n, margin, upper=True).of(_curve(n, margin, seen + _TIE * max(1, abs(seen))))


def p_worse(lost: int, gained: int) -> float:
    """Return McNemar's exact one-sided p-value of "no drop": the chance of so many losses among equal coins.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.

    Raises:
        UsageError: a count is below nothing.
    """
    _check(lost, gained, lost + gained + 1)
    return min(1.0, beyond(lost - 1, lost + gained, 0.5, upper=True))


def acceptance(n: int, margin: float, alpha: float) -> Counts:
    """Return which outcomes pass: those whose `p_good` is at most alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: above 0, below 0.5.

    Returns:
        int64 `[n + 1]`: for each number of flips, the most losses that pass; -1 where none does. Read-only.

    Raises:
        UsageError: an argument makes no sense.
    """
    return _critical(n, margin, alpha, upper=False)


def rejection(n: int, margin: float, alpha: float) -> Counts:
    """Return which outcomes fail: those whose `p_bad` is at most alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: above 0, below 0.5.

    Returns:
        int64 `[n + 1]`: for each number of flips, the most losses that do not fail yet. Read-only.

    Raises:
        UsageError: an argument makes no sense.
    """
    return _critical(n, margin, alpha, upper=True)


def power(n: int, margin: float, alpha: float, flips: float, drop: float = 0.0) -> float:
    """Return the exact chance of PASS for a candidate of this kind.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: above 0, below 0.5.
        flips: the true share of items that flip, 0 to 1.
        drop: the true drop; its size is at most `flips`.

    Raises:
        UsageError: an argument makes no sense.
    """
    return _below(acceptance(n, margin, alpha), n, *_kind(flips, drop))


def failing(n: int, margin: float, alpha: float, flips: float, drop: float = 0.0) -> float:
    """Return the exact chance of FAIL for a candidate of this kind; arguments as for `power`.

    Raises:
        UsageError: an argument makes no sense.
    """
    return _below(rejection(n, margin, alpha), n, *_kind(flips, drop), upper=True)


def _kind(flips: float, drop: float) -> tuple[float, float]:
    """Return the share of flips and, of them, that of losses."""
    if not 0 <= flips <= 1 or not abs(drop) <= flips:
        raise UsageError(f"expected flips from 0 to 1 and a drop of at most that size, found {flips!r} and {drop!r}")
    return flips, (flips + drop) / (2 * flips) if flips else 0.5


def _check(lost: int, gained: int, n: int) -> None:
    if lost < 0 or gained < 0 or n < max(1, lost + gained):
        raise UsageError(f"expected counts of flips among the items, found {lost} lost and {gained} gained of {n}")


def _check_share(name: str, value: float, limit: float) -> None:
    if not 0 < value < limit:
        raise UsageError(f"{name}: expected above 0 and below {limit:g}, found {value!r}")


def _curve(n: int, margin: float, threshold: float, within: tuple[Counts, Counts] | None = None) -> Counts:
    """Return for each number of flips the most losses whose Z reaches the threshold; -1 where none does.

    Z falls with each loss and rises with each gain, so the curve rises by 0 or 1 from one number of flips to the next.
    """
    flips = np.arange(n + 1)
    low, high = within or (np.full(n + 1, -1), flips)
    while (low < high).any():
        middle = (low + high + 1) // 2
        reached = score(middle, flips - middle, n, margin) >= threshold
        low, high = np.where(reached, middle, low), np.where(reached, high, middle - 1)
    return low


def _below(curve: Counts, n: int, flips: float, losses: float, *, upper: bool = False) -> float:
    """Return the probability that the losses lie on or below the curve, or above it.

    Of n items a share flips, of the flips a share is losses: the number of flips K is binomial, and so are the losses
    among K. With F(k) the probability of at most `curve[k]` losses among k flips, F(k + 1) - F(k) is one binomial
    probability times a factor.
    """
    low, high = window(n, flips)
    k, most = np.arange(low, high + 1, dtype=np.float64), curve[low : high + 1].astype(np.float64)
    before, now, rise = k[:-1], most[:-1], np.diff(most)
    factor = losses * (rise * (before + 1) / np.maximum(now + 1, 1) - 1)
    change = np.where(now >= 0, factor * probability(now, before, losses), rise * (1 - losses) ** (before + 1))
    start = beyond(int(curve[low]), low, losses, upper=upper)
    share = start + np.concatenate(([0.0], np.cumsum(-change if upper else change)))
    return float(np.clip(share, 0, 1) @ probability(k, n, flips))


class _Largest:
    """The largest probability, over all shares of flips with the margin as drop, of outcomes under or above a curve."""

    def __init__(self, n: int, margin: float, *, upper: bool) -> None:
        self.n, self.margin, self.upper = n, margin, upper
        self.grid = _grid(n, margin)

    def at(self, curve: Counts, flips: float) -> float:
        """Return the probability at one share of flips."""
        return _below(curve, self.n, flips, (flips + self.margin) / (2 * flips), upper=self.upper)

    def of(self, curve: Counts) -> float:
        """Return the largest probability."""
        return min(1.0, max(self.peaks(curve).values()))

    def peaks(self, curve: Counts) -> dict[float, float]:
        """Return the highest local maxima over the grid, closed in on: shares of flips with their probabilities."""
        found = np.array([self.at(curve, flips) for flips in self.grid])
        padded = np.concatenate(([-1.0], found, [-1.0]))
        tops = np.flatnonzero((found >= padded[:-2]) & (found >= padded[2:]))
        best = sorted(tops, key=lambda place: -found[place])[:_PEAKS]
        return dict(self._climb(curve, int(place), float(found[place])) for place in best)

    def _climb(self, curve: Counts, place: int, height: float) -> tuple[float, float]:
        """Close in on the maximum around a point of the grid."""
        grid = self.grid
        top, low, high = grid[place], grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
        for _ in range(_HALVINGS):
            left, right = (low + top) / 2, (top + high) / 2
            heights = {left: self.at(curve, left), right: self.at(curve, right), top: height}
            best = max(heights, key=lambda flips: heights[flips])
            low, high = (low, top) if best == left else (top, high) if best == right else (left, right)
            top, height = best, heights[best]
        return top, height


@lru_cache(maxsize=64)
def _grid(n: int, margin: float) -> tuple[float, ...]:
    """Return shares of flips from the margin, where all flips are losses, to 1; dense towards both ends."""
    near = margin + np.geomspace(0.02 / n, min(20 / n, 1 - margin), _NEAR)
    first, last = math.sqrt(margin * n), math.sqrt(n)
    far = np.linspace(first, last, 1 + math.ceil((last - first) * _POINTS)) ** 2 / n
    full = 1 - (near[near < 0.5 + margin] - margin)
    points = np.concatenate(([margin, 1.0], near, far, full))
    return tuple(np.unique(np.clip(points, margin, 1.0)).tolist())


@lru_cache(maxsize=256)
def _critical(n: int, margin: float, alpha: float, *, upper: bool) -> Counts:
    """Return the curve of the largest set of outcomes, extreme in Z, whose probability never exceeds alpha."""
    if n < 1:
        raise UsageError(f"n: expected at least 1 item, found {n!r}")
    _check_share("margin", margin, 1)
    _check_share("alpha", alpha, 0.5)
    largest = _Largest(n, margin, upper=upper)
    shares: tuple[float, ...] = largest.grid
    strict = NormalDist().inv_cdf(1 - alpha) - 0.1
    while True:
        curve, strict = _strict_enough(largest, alpha, shares, strict)
        shares = tuple(flips for flips, chance in largest.peaks(curve).items() if chance > alpha)
        if not shares:
            curve.setflags(write=False)
            return curve


def _strict_enough(largest: _Largest, alpha: float, shares: tuple[float, ...], strict: float) -> tuple[Counts, float]:
    """Return the lowest bound on Z, and its curve, that holds alpha at all these shares of flips.

    Args:
        largest: of which test.
        alpha: the level.
        shares: of flips.
        strict: a bound to begin with; where it holds already, lower ones are tried.
    """
    sign = -1 if largest.upper else 1

    def curve_of(bound: float, within: tuple[Counts, Counts] | None = None) -> Counts:
        return _curve(largest.n, largest.margin, sign * bound, within)

    def too_likely(curve: Counts) -> tuple[float, ...]:
        return tuple(flips for flips in shares if largest.at(curve, flips) > alpha)

    step, loose, tight = 0.05, strict, strict
    open_at = too_likely(outer := curve_of(loose))
    while not open_at:
        tight, loose, step = loose, loose - step, 2 * step
        open_at = too_likely(outer := curve_of(loose))
    # A share of flips at which a larger set was unlikely enough stays so for every smaller set.
    shares = open_at
    while tight <= loose or (open_at := too_likely(curve_of(tight))):
        if tight > loose:
            loose, shares, outer = tight, open_at, curve_of(tight)
        tight, step = loose + step, 2 * step
    inner = curve_of(tight)
    while tight - loose > _TIE and np.abs(outer - inner).sum() > 1:
        middle = (loose + tight) / 2
        curve = curve_of(middle, (np.minimum(outer, inner), np.maximum(outer, inner)))
        if open_at := too_likely(curve):
            loose, outer, shares = middle, curve, open_at
        else:
            tight, inner = middle, curve
    return inner, tight
