"""How many items a margin takes where each is asked several times: the size of a run with repeats, planned ahead.

A plan knows of the differences x of items how large they are, not how they are spread in every detail: a share of items
differs by one size, up as often as down, with the mean of x^2 and of x^4 that was seen or is assumed. What passes is
then known for each number of losses and gains, and its chance is a sum over the trinomial. Simulation agrees to a few
points: benchmarks/results/gate.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Counts, Floats, window
from k2quant.eval.statistics.dirichlet import chance_of_none
from k2quant.eval.statistics.exact import chance
from k2quant.eval.statistics.planning import MOST, plan
from k2quant.eval.statistics.tango import check_share

_SUMMED = 200_000  # items up to which chances are sums; above, the normal distribution is as good
_PLACES = 129  # numbers of flips at which the losses that pass are found; between them they lie on a line
_AHEAD = 1.05  # times the items: where the power must hold too


@dataclass(frozen=True, slots=True)
class Differences:
    """How much the two models' right answers differ on an item, for a candidate without any drop."""

    share: float
    """Of the items that differ, 0 to 1."""
    size: float
    """By which they do, 0 to 1, up as often as down."""

    @property
    def variance(self) -> float:
        """The mean square of an item's difference."""
        return self.share * self.size**2


def seen(values: Counts, counts: Counts, unit: int) -> Differences:
    """Return what the differences of items were, their signs aside.

    Args:
        values: int64 `[k]`, the different differences, in units of 1 / `unit`.
        counts: int64 `[k]`, how many items have each.
        unit: what the differences are parts of.
    """
    x = values / unit
    return _of_moments(*(float(counts @ x**power) / float(counts.sum()) for power in (2, 4)))


def assumed(flips: float, correlation: float, repeats: int) -> Differences:
    """Return what the differences of items will be, from those of single answers.

    An item is of one of three kinds. Some flip in every repeat: the share `flips * correlation`. Of some nobody knows
    the answer, and either model is right every second time. The others never flip. The mean of x^2 is `flips *
    (correlation + (1 - correlation) / repeats)` whatever the kinds.

    Args:
        flips: share of single answers that flip, 0 to 1.
        correlation: of an item's difference in one repeat with that in another, 0 to 1.
        repeats: answers to each item, of either side, at least 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    if not 0 <= flips <= 1 or not 0 <= correlation <= 1 or repeats < 1:
        raise UsageError(
            "expected flips and a correlation from 0 to 1 and at least one repeat, "
            f"found {flips!r}, {correlation!r} and {repeats!r}"
        )
    loose = flips * (1 - correlation)
    square = flips * correlation + loose / repeats
    # Of 2 R coins worth 1 / (2 R) each, as the difference of two means over R answers is.
    fourth = flips * correlation + loose * (3 * repeats - 1) / (2 * repeats**3)
    return _of_moments(square, fourth)


def _of_moments(square: float, fourth: float) -> Differences:
    if not fourth:
        return Differences(0.0, 0.0)
    return Differences(min(1.0, square**2 / fourth), math.sqrt(fourth / square))


def chance_of_pass(values: Counts, counts: Counts, unit: int, margin: float, alpha: float) -> float:
    """Return the chance that a candidate without any drop passes, with as many items that differ as much as these do.

    Args:
        values: int64 `[k]`, the different differences of items, in units of 1 / `unit`.
        counts: int64 `[k]`, how many items have each; at least one item in all.
        unit: what the differences are parts of.
        margin: largest drop that is good enough, above 0, below 0.5.
        alpha: chance that a candidate whose drop is the margin passes, above 0, below 0.5.
    """
    return power_of(seen(values, counts, unit), int(counts.sum()), margin, alpha)


def needed(values: Counts, counts: Counts, unit: int, margin: float, alpha: float, power: float) -> int | None:
    """Return how many items that differ as much as these pass a candidate without any drop with this power.

    Args:
        values: as for `chance_of_pass`.
        counts: likewise.
        unit: likewise.
        margin: likewise.
        alpha: likewise.
        power: above 0, below 1.

    Returns:
        The items; None where ten million do not.
    """
    return items_for(seen(values, counts, unit), margin, alpha, power)


def power_of(differences: Differences, n: int, margin: float, alpha: float) -> float:
    """Return the chance that `p_good` of n such items is at most alpha.

    Args:
        differences: of items, for a candidate without any drop.
        n: items, at least 1.
        margin: above 0, below 0.5.
        alpha: above 0, below 0.5.

    Raises:
        UsageError: an argument makes no sense.
    """
    check_share("margin", margin, 0.5)
    check_share("alpha", alpha, 0.5)
    if n < 1:
        raise UsageError(f"n: expected at least 1 item, found {n!r}")
    if n > _SUMMED:
        return _normal_power(differences, n, margin, alpha)
    low, high = window(n, differences.share)
    flips = np.unique(np.linspace(low, high, _PLACES).round().astype(np.int64))
    most = _most_losses(differences.size, flips, n, margin, alpha)
    between = np.floor(np.interp(np.arange(low, high + 1), flips, most + 0.5)).astype(np.int64)
    curve = np.full(n + 1, -1)
    curve[low : high + 1] = between
    return chance(curve, n, differences.share, 0.5)


def _normal_power(differences: Differences, n: int, margin: float, alpha: float) -> float:
    normal = NormalDist()
    if not differences.variance:
        return 1.0
    # The item at the worst costs 1 / n of the margin.
    return normal.cdf((margin - 1 / n) / math.sqrt(differences.variance / n) + normal.inv_cdf(alpha))


def _most_losses(size: float, flips: Counts, n: int, margin: float, alpha: float) -> Counts:
    """Return for each number of items that differ how many of them may be losses; -1 where nothing passes."""
    weights = np.array([margin - size, margin + size, margin, margin - 1])
    low, high = np.full(len(flips), -1), flips.copy()
    while (low < high).any():
        lost = (low + high + 1) // 2
        kinds: Floats = np.stack((lost, flips - lost, n - flips, np.ones_like(flips)), axis=1).astype(np.float64)
        passes = chance_of_none(weights, kinds) <= alpha
        low, high = np.where(passes, lost, low), np.where(passes, high, lost - 1)
    return low


def items_for(differences: Differences, margin: float, alpha: float, power: float) -> int | None:
    """Return a number of such items from which on the chance of PASS is `power`; None where ten million do not do.

    Args:
        differences: of items, for a candidate without any drop.
        margin: above 0, below 0.5.
        alpha: above 0, below 0.5.
        power: above 0, below 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    check_share("margin", margin, 0.5)
    check_share("alpha", alpha, 0.5)
    check_share("power", power, 1)
    normal = NormalDist()
    bound, wanted = normal.inv_cdf(alpha), normal.inv_cdf(max(power, 0.5))
    least = math.ceil(math.log(alpha) / math.log1p(-margin))  # without any difference
    n = max(least, math.ceil((wanted - bound) ** 2 * differences.variance / margin**2))
    while n <= MOST:
        # More than one number, as the chance falls a little until one more loss is allowed.
        reached = min(power_of(differences, ahead, margin, alpha) for ahead in (n, n + 1, math.ceil(n * _AHEAD)))
        if reached >= power:
            return n
        apart = (wanted - bound) / max(0.1, normal.inv_cdf(max(reached, 1e-9)) - bound)
        n = math.ceil(n * min(1.5, max(1.01, apart**2)))
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatsPlan:
    """What a run must hold so that a candidate without any drop passes, where each item is asked several times."""

    margin: float
    """Largest drop that is good enough, 0 to 1."""
    alpha: float
    """Chance that a candidate whose drop is the margin passes all the same."""
    power: float
    """Chance of PASS that the candidate shall have."""
    flips: float
    """Share of single answers that are assumed to flip, 0 to 1."""
    correlation: float
    """Of an item's difference in one repeat with that in another, 0 to 1."""
    repeats: int
    """Answers to each item, of either side."""
    items: int | None
    """How many items give that power; None where ten million do not."""
    reached: float | None
    """The chance of PASS with so many items."""

    @property
    def answers(self) -> int | None:
        """Answers that each model gives in all; None where no number of items does."""
        return None if self.items is None else self.items * self.repeats

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return dataclasses.asdict(self) | {"answers": self.answers}


def plan_repeats(
    *, margin: float, alpha: float = 0.05, power: float = 0.8, flips: float, correlation: float, repeats: int
) -> RepeatsPlan:
    """Return how many items a gate needs that are asked several times.

    Args:
        margin: largest drop that is good enough, above 0, below 0.5.
        alpha: chance that a candidate whose drop is the margin passes, above 0, below 0.5.
        power: chance of PASS wanted, above 0, below 1.
        flips: share of single answers that flip, 0 to 1.
        correlation: of an item's difference in one repeat with that in another, 0 to 1.
        repeats: answers to each item, of either side; with 1 the gate's exact test decides, and the plan is its own.

    Raises:
        UsageError: an argument makes no sense.
    """
    kind = assumed(flips, correlation, repeats)
    rules = {"margin": margin, "alpha": alpha, "power": power, "flips": flips}
    if repeats == 1:
        single = plan(**rules)
        items, reached = single.items, single.reached
    else:
        items = items_for(kind, margin, alpha, power)
        reached = None if items is None else power_of(kind, items, margin, alpha)
    return RepeatsPlan(**rules, correlation=correlation, repeats=repeats, items=items, reached=reached)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a pilot says of single answers."""

    flips: float
    """Share of them that flip, 0 to 1."""
    correlation: float | None
    """Of an item's difference in one repeat with that in another, 0 to 1; None where the pilot does not tell."""


def measured(base: Counts, base_repeats: int, candidate: Counts, candidate_repeats: int) -> Measured:
    """Return what a pilot says, which asked each item several times.

    The share of flips and the mean square of what differs in every repeat are unbiased: the part of x^2 that is the
    noise of the answers is what they differ by among themselves. Two runs of one model measure how alike its own
    repeats are.

    Args:
        base: int64 `[items]`, how many of the baseline's answers to each item are right.
        base_repeats: of how many.
        candidate: int64 `[items]`, the same of the candidate.
        candidate_repeats: of how many.
    """
    p, q = base / base_repeats, candidate / candidate_repeats
    flips = float((p * (1 - q) + q * (1 - p)).mean())
    if min(base_repeats, candidate_repeats) < 2 or not flips:
        return Measured(flips, None)
    noise = p * (1 - p) / (base_repeats - 1) + q * (1 - q) / (candidate_repeats - 1)
    lasting = float(((p - q) ** 2 - noise).mean())
    return Measured(flips, min(1.0, max(0.0, lasting / flips)))


def pooled(tasks: Sequence[tuple[Measured, int]]) -> Measured:
    """Return what the pilots of several tasks say together.

    Args:
        tasks: of each what `measured` says, and how many items it has; at least one.
    """
    items = sum(count for _, count in tasks)
    flips = sum(task.flips * count for task, count in tasks)
    told = [task.flips * task.correlation * count for task, count in tasks if task.correlation is not None]
    unknown = any(task.flips and task.correlation is None for task, _ in tasks)
    return Measured(flips / items, None if unknown or not flips else sum(told) / flips)
