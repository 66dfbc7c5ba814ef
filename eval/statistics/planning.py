"""How many items a margin takes: the size of a run, planned before it is paid for.

A candidate without any drop still flips some items, and the more it flips, the more items it takes to show that the
losses are no more than the gains. For the share of flips take what a pilot or an A/A run showed, at its upper limit.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import beyond
from k2quant.eval.statistics.exact import score_chance
from k2quant.eval.statistics.paired import p_good, power
from k2quant.eval.statistics.restricted import LEAST_ALPHA
from k2quant.eval.statistics.tango import check_share

MOST = 10_000_000
"""Items above which a plan says that no number will do."""

_EXACT = 4_000  # items up to which power is that of the exact test; above, of the score test, the same to 0.005
_AHEAD = 1.05  # times the items: where the power must hold too


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run must hold so that a good candidate passes."""

    margin: float
    """Largest drop that is good enough, 0 to 1."""
    alpha: float
    """Chance that a candidate whose drop is the margin passes all the same."""
    power: float
    """Chance of PASS that the candidate shall have."""
    flips: float
    """Share of items that are assumed to flip, 0 to 1."""
    drop: float
    """The candidate's true drop, 0 to 1."""
    items: int | None
    """How many items give that power; None where ten million do not."""
    reached: float | None
    """The chance of PASS with so many items."""
    without_flips: int
    """The fewest items that pass where not one of them flips; no plan has less."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return dataclasses.asdict(self)


def plan(*, margin: float, alpha: float = 0.05, power: float = 0.8, flips: float, drop: float = 0.0) -> Plan:
    """Return how many items a gate needs.

    The chance of PASS does not rise evenly with the items: it falls a little until one more loss is allowed. The number
    returned, a few percent above the smallest that would do, has the power, and so has one more, or a twentieth more.

    Args:
        margin: largest drop that is good enough, above 0, below 0.5.
        alpha: chance that a candidate whose drop is the margin passes, above 0, below 0.5.
        power: chance of PASS wanted, above 0, below 1.
        flips: share of items that flip, 0 to 1.
        drop: the candidate's true drop; below the margin and no larger than `flips`.

    Raises:
        UsageError: an argument makes no sense, or no number of items could do: the drop is the margin or more.
    """
    _check(margin, alpha, power, flips, drop)
    least = _without_flips(margin, alpha)
    items = _enough(_Wanted(margin, alpha, power, flips, drop), least)
    reached = None if items is None else _Wanted(margin, alpha, power, flips, drop).power_at(items)
    return Plan(
        margin=margin,
        alpha=alpha,
        power=power,
        flips=flips,
        drop=drop,
        items=items,
        reached=reached,
        without_flips=least,
    )


def chance_of_pass(n: int, margin: float, alpha: float, flips: float) -> float:
    """Return the chance that a candidate without any drop passes, as a plan has it: exact to 4,000 items, then to .005.

    `power` is exact at any number, and takes minutes where there are a million.

    Args:
        n: items, at least 1.
        margin: largest drop that is good enough, above 0, below 0.5.
        alpha: chance that a candidate whose drop is the margin passes, above 0, below 0.5.
        flips: share of items that flip, 0 to 1.
    """
    return _Wanted(margin, alpha, 0.5, flips, 0.0).power_at(n)


def flips_limit(count: int, n: int, *, confidence: float = 0.95) -> float:
    """Return the upper confidence limit of a share of flips (Clopper and Pearson's), to plan on.

    Args:
        count: flips that were seen.
        n: among so many items.
        confidence: chance that the true share is no larger, above 0, below 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    if not 0 <= count <= n or n < 1:
        raise UsageError(f"expected flips among at least one item, found {count} of {n}")
    check_share("confidence", confidence, 1)
    low, high = count / n, 1.0
    while high - low > 1e-9 and count < n:
        middle = (low + high) / 2
        if beyond(count, n, middle, upper=False) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _check(margin: float, alpha: float, power: float, flips: float, drop: float) -> None:
    check_share("margin", margin, 0.5)
    check_share("alpha", alpha, 0.5, least=LEAST_ALPHA)
    check_share("power", power, 1)
    if not 0 <= flips <= 1:
        raise UsageError(f"flips: expected a share from 0 to 1, found {flips!r}")
    if not abs(drop) <= flips:
        raise UsageError(f"drop: expected no more than the share of flips, {flips:g}, found {drop!r}: only flips drop")
    if drop >= margin:
        raise UsageError(
            f"drop: expected below the margin, {margin:g}, found {drop!r}: such a candidate passes by mistake alone"
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    margin: float
    alpha: float
    power: float
    flips: float
    drop: float

    def score_power(self, n: int) -> float:
        """Return the chance that the score test passes n items."""
        bound = -NormalDist().inv_cdf(self.alpha)
        losses = (self.flips + self.drop) / (2 * self.flips) if self.flips else 0.5
        return score_chance(bound, n, self.margin, self.flips, losses)

    def power_at(self, n: int) -> float:
        """Return the chance that n items pass."""
        if n > _EXACT:
            return self.score_power(n)
        return power(n, self.margin, self.alpha, self.flips, self.drop)


@lru_cache(maxsize=256)
def _without_flips(margin: float, alpha: float) -> int:
    """Return the fewest items that pass where not one flips."""
    one_way = math.ceil(math.log(alpha) / math.log1p(-margin))
    many = math.ceil(NormalDist().inv_cdf(alpha) ** 2 * (1 - margin) / margin)
    high = max(one_way, many, 1)
    if high > _EXACT:
        return high
    while p_good(0, 0, high, margin) > alpha:
        high = math.ceil(high * 1.05)
    low = one_way - 1  # too few already for a candidate all of whose flips are losses
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if p_good(0, 0, middle, margin) > alpha else (low, middle)
    return high


def _enough(wanted: _Wanted, least: int) -> int | None:
    """Return a number of items from which on the power holds."""
    n = max(least, _by_score(wanted))
    while n <= MOST:
        n += math.ceil(n * _short(wanted, n))
        # The power of an even and of an odd number of items differs where few flip.
        if not any(_short(wanted, start + odd) for start in (n, math.ceil(n * _AHEAD)) for odd in (0, 1)):
            return n
        n += math.ceil(n / 100)
    return None


def _short(wanted: _Wanted, n: int) -> float:
    """Return by which part to raise n, so that the power gets nearer to the one wanted; 0 where it is reached."""
    missing = wanted.power - wanted.power_at(n)
    return min(0.1, max(0.01, missing / 4)) if missing > 0 else 0.0


def _by_score(wanted: _Wanted) -> int:
    """Return about how many items the score test needs: first by the normal formula, then by its true power."""
    normal = NormalDist()
    factor = (normal.inv_cdf(max(wanted.power, 0.5)) - normal.inv_cdf(wanted.alpha)) ** 2
    variance = wanted.flips - wanted.drop**2
    n = factor * variance / (wanted.margin - wanted.drop) ** 2
    while n <= MOST and wanted.score_power(math.ceil(n) or 1) < wanted.power:
        n = n * 1.01 + 1
    return math.ceil(n)
