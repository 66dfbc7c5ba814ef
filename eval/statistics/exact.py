"""Exact chances of paired outcomes: the sum over all of them, and the largest such sum that a hypothesis allows.

A set of outcomes is a curve: for each number of flips, the most losses that belong to it. Its chance for one share of
flips is a sum over all outcomes, of which only those within 8.5 standard deviations are visited. A p-value is the
largest chance over all shares of flips with the margin as drop: found on a grid, then closed in on.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Counts, beyond, probability, window
from k2quant.eval.statistics.tango import check_share, score

_TIE = 1e-10  # two bounds on Z so close have the same outcomes but for rounding
_STEP = 0.5  # of the grid, in standard deviations of the number of flips
_NEAR = 40  # points of the grid within twenty flips of either end
_PEAKS = 4  # highest points of the grid that are closed in on
_HALVINGS = 14  # of the grid's step around each of them


def score_curve(
    n: int,
    margin: float,
    threshold: float,
    *,
    within: tuple[Counts, Counts] | None = None,
    flips: Counts | None = None,
) -> Counts:
    """Return for each number of flips the most losses whose Z reaches the threshold; -1 where none does.

    Z falls with each loss and rises with each gain, so the curve rises by 0 or 1 from one number of flips to the next.

    Args:
        n: items.
        margin: the drop in question.
        threshold: of Z.
        within: curves that lie on or below and on or above the one wanted; None where nothing is known.
        flips: the numbers of flips; None for 0 to n.
    """
    flips = np.arange(n + 1) if flips is None else flips
    low, high = within or (np.full(len(flips), -1), flips)
    while (low < high).any():
        middle = (low + high + 1) // 2
        reached = score(middle, flips - middle, n, margin) >= threshold
        low, high = np.where(reached, middle, low), np.where(reached, high, middle - 1)
    return low


def chance(curve: Counts, n: int, flips: float, losses: float, *, upper: bool = False) -> float:
    """Return the probability that the losses lie on or below the curve, or above it.

    Of n items a share flips, of the flips a share is losses: the number of flips K is binomial, and so are the losses
    among K. With F(k) the probability of at most `curve[k]` losses among k flips, F(k + 1) - F(k) is one binomial
    probability times a factor.
    """
    low, high = window(n, flips)
    return _chance(curve[low : high + 1], low, n, flips, losses, upper=upper)


def score_chance(threshold: float, n: int, margin: float, flips: float, losses: float) -> float:
    """Return the probability that Z reaches the threshold; cheap for any n."""
    low, high = window(n, flips)
    curve = score_curve(n, margin, threshold, flips=np.arange(low, high + 1))
    return _chance(curve, low, n, flips, losses, upper=False)


def _chance(curve: Counts, low: int, n: int, flips: float, losses: float, *, upper: bool) -> float:
    """Sum over as many numbers of flips as the curve has, from `low` on."""
    k, most = np.arange(low, low + len(curve), dtype=np.float64), curve.astype(np.float64)
    before, now, rise = k[:-1], most[:-1], np.diff(most)
    factor = losses * (rise * (before + 1) / np.maximum(now + 1, 1) - 1)
    change = np.where(now >= 0, factor * probability(now, before, losses), rise * (1 - losses) ** (before + 1))
    start = beyond(int(curve[0]), low, losses, upper=upper)
    share = start + np.concatenate(([0.0], np.cumsum(-change if upper else change)))
    return float(np.clip(share, 0, 1) @ probability(k, n, flips))


class LargestChance:
    """The largest probability, over all shares of flips with the margin as drop, of outcomes under or above a curve."""

    def __init__(self, n: int, margin: float, *, upper: bool) -> None:
        self.n, self.margin, self.upper = n, margin, upper
        self.grid = _grid(n, margin)

    def at(self, curve: Counts, flips: float) -> float:
        """Return the probability at one share of flips."""
        return chance(curve, self.n, flips, (flips + self.margin) / (2 * flips), upper=self.upper)

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
            # In this order: at an end of the grid, where nothing lies on one side, `left` or `right` is `top` itself.
            low, high = (left, right) if best == top else (low, top) if best == left else (top, high)
            top, height = best, heights[best]
        return top, height


@lru_cache(maxsize=64)
def _grid(n: int, margin: float) -> tuple[float, ...]:
    """Return shares of flips from the margin, where all flips are losses, to 1; dense towards both ends."""
    near = margin + np.geomspace(0.02 / n, min(20 / n, 1 - margin), _NEAR)
    first, last = math.asin(math.sqrt(margin)), math.pi / 2  # on this scale a standard deviation is the same anywhere
    far = np.sin(np.linspace(first, last, 1 + math.ceil((last - first) * 2 * math.sqrt(n) / _STEP))) ** 2
    full = 1 - (near[near < 0.5 + margin] - margin)
    points = np.concatenate(([margin, 1.0], near, far, full))
    return tuple(np.unique(np.clip(points, margin, 1.0)).tolist())


@lru_cache(maxsize=256)
def critical_curve(n: int, margin: float, alpha: float, *, upper: bool) -> Counts:
    """Return the curve of the largest set of outcomes, extreme in Z, whose chance is nowhere above alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: above 0, below 0.5.
        upper: whether the set is what lies above the curve; else it is what lies on and below.

    Raises:
        UsageError: an argument makes no sense.
    """
    if n < 1:
        raise UsageError(f"n: expected at least 1 item, found {n!r}")
    check_share("margin", margin, 1)
    check_share("alpha", alpha, 0.5)
    largest = LargestChance(n, margin, upper=upper)
    critical = _Critical(largest, alpha)
    # In this order a bound rises a few times only; from one end to the other it might at every point.
    shares = np.random.default_rng(0).permutation(largest.grid).tolist()
    while shares:
        for flips in shares:
            critical.tighten(flips)
        shares = [flips for flips, height in largest.peaks(critical.curve).items() if height > alpha]
    critical.curve.setflags(write=False)
    return critical.curve


class _Critical:
    """The bound on Z, and its curve, that holds alpha at all shares of flips that it was tightened for."""

    def __init__(self, largest: LargestChance, alpha: float) -> None:
        self.largest, self.alpha, self.sign = largest, alpha, -1 if largest.upper else 1
        n, margin = largest.n, largest.margin
        ends = sorted(self.sign * float(score(lost, n - lost, n, margin)) for lost in (0, n))
        self.bound, self.end = ends[0] - 1, ends[1] + 1
        self.curve = self._curve(self.bound)
        self.none = self._curve(self.end)

    def _curve(self, bound: float, *within: Counts) -> Counts:
        around = (np.minimum(*within), np.maximum(*within)) if within else None
        return score_curve(self.largest.n, self.largest.margin, self.sign * bound, within=around)

    def tighten(self, flips: float) -> None:
        """Raise the bound just so far that alpha holds at this share of flips too."""
        if self.largest.at(self.curve, flips) <= self.alpha:
            return
        loose, outer, tight, inner, step = self.bound, self.curve, self.end, self.none, 1e-3
        while tight - loose > _TIE and np.abs(outer - inner).sum() > 1:
            bound = min(loose + step, (loose + tight) / 2)
            curve = self._curve(bound, outer, inner)
            if self.largest.at(curve, flips) > self.alpha:
                loose, outer, step = bound, curve, 4 * step
            else:
                tight, inner = bound, curve
        self.bound, self.curve = tight, inner
