"""What the items of one task, or of all, come to: counts, shares, and the test that fits how often they were asked.

Where both models answered each item once, the exact paired test decides. Where an item was asked several times, its
answers hang together: the item is the unit, and what counts of it is by how much its share of right answers rose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Comparison, Decision
from k2quant.eval.statistics import paired, repeats
from k2quant.eval.statistics.planning import chance_of_pass, plan
from k2quant.eval.statistics.repeats_planning import seen


class _Tests(NamedTuple):
    """What the statistics say of some items."""

    p_good: float
    p_bad: float
    p_worse: float
    interval: tuple[float, float]
    power: float
    needed: int | None
    spread: tuple[float, float] | None = None


def compared(name: str, pairs: Sequence[Pairs], policy: Policy, margin: float) -> Comparison:
    """Return what the items of some tasks come to.

    Args:
        name: of the comparison.
        pairs: the tasks, at least one.
        policy: alpha and power.
        margin: the largest drop that is good enough.
    """
    changes = _changes(pairs)
    n, lost, gained = len(changes.found), int((changes.found < 0).sum()), int((changes.found > 0).sum())
    repeats_of = {(task.ours.repeats, task.theirs.repeats) for task in pairs}
    tests = (_once if changes.unit == 1 else _repeated)(changes, policy, margin)
    return Comparison(
        name=name,
        n=n,
        base_answers=sum(len(task.base.items) for task in pairs),
        candidate_answers=sum(len(task.candidate.items) for task in pairs),
        base_right=_whole(sum(Fraction(task.base.right, task.ours.repeats) for task in pairs)),
        candidate_right=_whole(sum(Fraction(task.candidate.right, task.theirs.repeats) for task in pairs)),
        repeats=repeats_of.pop() if len(repeats_of) == 1 else None,
        lost=lost,
        gained=gained,
        margin=margin,
        **tests._asdict(),
        decision=decision(tests.p_good, tests.p_bad, policy.alpha),
        base_cut=_total(int(task.ours.cut.sum()) if task.ours.looked else None for task in pairs),
        candidate_cut=_total(int(task.theirs.cut.sum()) if task.theirs.looked else None for task in pairs),
        base_truncated=_total(task.base.truncated for task in pairs),
        candidate_truncated=_total(task.candidate.truncated for task in pairs),
    )


def decision(p_good: float, p_bad: float, alpha: float) -> Decision:
    """Return what two p-values say."""
    if p_bad <= alpha:
        return "FAIL"
    return "PASS" if p_good <= alpha else "INCONCLUSIVE"


class _Changes(NamedTuple):
    """By how much the share of right answers to each item rose."""

    found: NDArray[np.int64]
    """`[items]`, in parts of 1 / `unit`."""
    unit: int


def _changes(pairs: Sequence[Pairs]) -> _Changes:
    unit = math.lcm(*(task.unit for task in pairs))
    return _Changes(np.concatenate([task.changes(unit) for task in pairs]), unit)


def _once(changes: _Changes, policy: Policy, margin: float) -> _Tests:
    n, lost, gained = len(changes.found), int((changes.found < 0).sum()), int((changes.found > 0).sum())
    flips = (lost + gained) / n
    return _Tests(
        p_good=paired.p_good(lost, gained, n, margin),
        p_bad=paired.p_bad(lost, gained, n, margin),
        p_worse=paired.p_worse(lost, gained),
        interval=paired.interval(lost, gained, n, policy.alpha),
        power=chance_of_pass(n, margin, policy.alpha, flips),
        needed=plan(margin=margin, alpha=policy.alpha, power=policy.power, flips=flips).items,
    )


def _repeated(changes: _Changes, policy: Policy, margin: float) -> _Tests:
    values, counts = np.unique(changes.found, return_counts=True)
    found, unit = (values, counts), changes.unit
    differences = seen(*found, unit)
    return _Tests(
        p_good=repeats.p_good(*found, unit, margin),
        p_bad=repeats.p_bad(*found, unit, margin),
        p_worse=repeats.p_worse(*found),
        interval=repeats.interval(*found, unit, policy.alpha),
        power=repeats.chance_of_pass(*found, unit, margin, policy.alpha),
        needed=repeats.needed(*found, unit, margin, policy.alpha, policy.power),
        spread=(differences.share, differences.size),
    )


def differs(pairs: Sequence[Pairs], of: Callable[[Pairs, int], NDArray[np.int64]] = Pairs.changes) -> float:
    """Return the two-sided p-value of "nothing changed".

    Args:
        pairs: the tasks.
        of: what is compared of each item, as `Pairs.changes` gives it.
    """
    unit = math.lcm(*(task.unit for task in pairs))
    found = np.concatenate([of(task, unit) for task in pairs])
    return min(1.0, 2 * min(_p_worse(found, unit), _p_worse(-found, unit)))


def _p_worse(found: NDArray[np.int64], unit: int) -> float:
    if unit == 1:
        return paired.p_worse(int((found < 0).sum()), int((found > 0).sum()))
    return repeats.p_worse(*np.unique(found, return_counts=True))


def _whole(number: Fraction | int) -> float:
    """Return a number, as an integer where it is one."""
    return int(number) if number == int(number) else float(number)


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum of what is known, or None where nothing is: a task that writes no answers has none to cut."""
    found = [count for count in counts if count is not None]
    return sum(found) if found else None
