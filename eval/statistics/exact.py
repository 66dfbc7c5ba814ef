"""Exact chances of paired outcomes: the sum over all of them, and the largest such sum that a hypothesis allows.

A set of outcomes is a curve: for each number of flips, the most losses that belong to it. Its chance for one share of
flips is a sum over all outcomes, of which only those within 8.5 standard deviations are visited. Its level is the
largest chance over all shares of flips with the margin as drop: found on a grid, then closed in on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from k2quant.eval.statistics.binomial import Counts, Floats, beyond, probability, window
from k2quant.eval.statistics.tango import score

_STEP = 0.5  # of the grid, in standard deviations of the number of flips
_NEAR = 40  # points of the grid within twenty flips of either end
_PEAKS = 4  # highest points of the grid that are closed in on
_HALVINGS = 14  # of the grid's step around each of them


def score_curve(
    n: int, margin: float, threshold: float, *, flips: Counts | None = None, near: Counts | None = None
) -> Counts:
    """Return for each number of flips the most losses whose Z reaches the threshold; -1 where none does.

    Z falls with each loss and rises with each gain, so the curve rises by 0 or 1 from one number of flips to the next.

    Args:
        n: items.
        margin: the drop in question.
        threshold: of Z.
        flips: the numbers of flips; None for 0 to n.
        near: a curve to begin at; the nearer the faster, and the result is the same.
    """
    flips = np.arange(n + 1) if flips is None else flips
    low, high = np.full(len(flips), -1), flips
    probe, step = (flips // 2 if near is None else np.clip(near, 0, flips)), 1
    while (low < high).any():
        reached = score(probe, flips - probe, n, margin) >= threshold
        low, high = np.where(reached, probe, low), np.where(reached, high, probe - 1)
        middle = (low + high + 1) // 2
        # It strides out from where it began, ever wider; once the wanted lies between, it halves.
        probe = np.where(reached, np.minimum(low + step, middle), np.maximum(high + 1 - step, middle))
        step *= 2
    return low


def chance(curve: Counts, n: int, flips: float, losses: float, *, upper: bool = False) -> float:
    """Return the probability that the losses lie on or below the curve, or above it.

    Of n items a share flips, of the flips a share is losses: the number of flips K is binomial, and so are the losses
    among K.
    """
    low, high = window(n, flips)
    return _chance(curve[low : high + 1], low, n, flips, losses, upper=upper)


def score_chance(threshold: float, n: int, margin: float, flips: float, losses: float) -> float:
    """Return the probability that Z reaches the threshold; cheap for any n."""
    low, high = window(n, flips)
    curve = score_curve(n, margin, threshold, flips=np.arange(low, high + 1))
    return _chance(curve, low, n, flips, losses, upper=False)


def _chance(curve: Counts, low: int, n: int, flips: float, losses: float, *, upper: bool) -> float:
    """Return the same as `chance` of a curve over a window of the numbers of flips, from `low` on."""
    k = np.arange(low, low + len(curve))
    return float(inside(curve, low, losses, upper=upper) @ probability(k, n, flips))


def inside(curve: Counts, low: int, losses: float, *, upper: bool) -> Floats:
    """Return for each number of flips, from `low` on, how likely its losses are on or below the curve, or above it.

    With F(k) the probability of at most `curve[k]` losses among k flips, F(k + 1) - F(k) is one binomial probability
    times a factor.

    Args:
        curve: int64 `[N]`, rising by 0 or 1.
        low: flips of its first entry.
        losses: the share of flips that are losses.
        upper: whether what lies above is meant.

    Returns:
        float64 `[N]`.
    """
    k, most = np.arange(low, low + len(curve), dtype=np.float64), curve.astype(np.float64)
    before, now, rise = k[:-1], most[:-1], np.diff(most)
    factor = losses * (rise * (before + 1) / np.maximum(now + 1, 1) - 1)
    change = np.where(now >= 0, factor * probability(now, before, losses), rise * (1 - losses) ** (before + 1))
    start = beyond(int(curve[0]), low, losses, upper=upper)
    return np.clip(start + np.concatenate(([0.0], np.cumsum(-change if upper else change))), 0, 1)


class LargestChance:
    """The largest probability, over all shares of flips with the margin as drop, of outcomes under or above a curve."""

    def __init__(self, n: int, margin: float, *, upper: bool) -> None:
        self.n, self.margin, self.upper = n, margin, upper
        self.grid = shares(n, margin)

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
        return dict(climb(partial(self.at, curve), self.grid, int(place), float(found[place])) for place in best)


def climb(
    at: Callable[[float], float],
    points: Sequence[float],
    place: int,
    height: float,
    *,
    limit: float = -math.inf,
    miss: float = 0.0,
) -> tuple[float, float]:
    """Close in on the maximum around one of some points.

    Args:
        at: the height at a point.
        points: rising.
        place: of the point, which is no lower than those beside it.
        height: there.
        limit: what is asked about; if the maximum is clearly lower, it is not closed in on any further.
        miss: by how much the maximum may be higher than the point; a quarter of it with each halving.

    Returns:
        Where the maximum is, and how high.
    """
    top, low, high = points[place], points[max(place - 1, 0)], points[min(place + 1, len(points) - 1)]
    for halvings in range(_HALVINGS):
        if height < limit - miss / 4**halvings:
            break
        left, right = (low + top) / 2, (top + high) / 2
        heights = {left: at(left), right: at(right), top: height}
        best = max(heights, key=lambda point: heights[point])
        # In this order: at an end, where nothing lies on one side, `left` or `right` is `top` itself.
        low, high = (left, right) if best == top else (low, top) if best == left else (top, high)
        top, height = best, heights[best]
    return top, height


@lru_cache(maxsize=64)
def shares(n: int, margin: float) -> tuple[float, ...]:
    """Return shares of flips from the margin, where all flips are losses, to 1; dense towards both ends."""
    near = margin + np.geomspace(0.02 / n, min(20 / n, 1 - margin), _NEAR)
    first, last = math.asin(math.sqrt(margin)), math.pi / 2  # on this scale a standard deviation is the same anywhere
    far = np.sin(np.linspace(first, last, 1 + math.ceil((last - first) * 2 * math.sqrt(n) / _STEP))) ** 2
    full = 1 - (near[near < 0.5 + margin] - margin)
    points = np.concatenate(([margin, 1.0], near, far, full))
    return tuple(np.unique(np.clip(points, margin, 1.0)).tolist())
