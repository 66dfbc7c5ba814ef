"""Whether a drop lies below or above a margin, where every item was asked several times: the item is the cluster.

An item's difference x is the share of its answers that the candidate has right, less the baseline's: a number between
-1 and 1, and the drop is minus its mean. Answers to one item are alike, so that ten repeats of it are not ten items; of
the items alone it is assumed that they are drawn independently. Nothing is assumed of the repeats, nor of how x is
spread.

`p_good` and `p_bad` are Gaffke's p-values (Gaffke, Three test statistics for a nonparametric one-sided hypothesis on
the mean of a nonnegative variable, Mathematical Methods of Statistics 14:451, 2005; as a bound Learned-Miller and
Thomas, arXiv 1905.06208). The items get random weights, uniform among all that sum to 1, together with one item more
whose difference is the worst that there is; p is the chance that the weighted drop then is the margin or more. That P(p
<= alpha) is at most alpha, for any n, alpha and distribution, is a theorem (Vlassis and Thomas, arXiv 2607.08415, 2026,
for independent nonnegative variables each with a mean of at most 1: here (1 + x) / (1 - margin)). Where x takes two
values it is the exact binomial test, without any difference (1 - margin) ** n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Counts
from k2quant.eval.statistics.dirichlet import chance_of_none
from k2quant.eval.statistics.repeats_planning import chance_of_pass, needed
from k2quant.eval.statistics.sign_flips import chance_of_sum, needed_places
from k2quant.eval.statistics.tango import check_share

__all__ = ["chance_of_pass", "interval", "needed", "p_bad", "p_good", "p_worse"]

_HALVINGS = 40  # of an interval's end, to 2e-12
_PLACES = 1 << 22  # of a sign-flip distribution: 256 MB and a second


def p_good(values: Counts, counts: Counts, unit: int, margin: float) -> float:
    """Return the p-value of "the drop is at least the margin": small shows that the candidate is good enough.

    It falls as any item's difference, or the margin, rises.

    Args:
        values: int64 `[k]`, the different differences of items, in units of 1 / `unit`, from -`unit` to `unit`.
        counts: int64 `[k]`, how many items have each; at least one item in all.
        unit: what the differences are parts of: a common multiple of both sides' repeats.
        margin: 0 to 1, below 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    _check(values, counts, unit)
    _check_margin(margin)
    return _p(values, counts, unit, margin)


def p_bad(values: Counts, counts: Counts, unit: int, margin: float) -> float:
    """Return the p-value of "the drop is at most the margin": small shows that the candidate is too bad.

    `p_good` with both sides and the margin's sign swapped. With a margin of 0 it tests for damage, and where x is -1, 0
    or 1 that is McNemar's exact test.

    Args:
        values: as for `p_good`.
        counts: likewise.
        unit: likewise.
        margin: 0 to 1, below 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    _check(values, counts, unit)
    _check_margin(margin)
    return _p(-values, counts, unit, -margin)


def p_worse(values: Counts, counts: Counts) -> float:
    """Return the one-sided p-value of "no damage": the chance of so large a drop if each difference had a random sign.

    Exact where the two models are alike and both were asked equally often: then each item's answers could be swapped.
    With different repeats a difference of mean 0 need not be as likely the one way as the other, and the level holds
    for many items alone. Where x is -1, 0 or 1 it is McNemar's exact test.

    Args:
        values: int64 `[k]`, the different differences of items, whole numbers of any unit.
        counts: int64 `[k]`, how many items have each; at least one item in all.

    Raises:
        UsageError: an argument makes no sense.
    """
    largest = int(np.abs(values).max(initial=0)) or 1
    _check(values, counts, largest)
    sizes, place = np.unique(np.abs(values), return_inverse=True)
    items = np.bincount(place, weights=counts).astype(np.int64)[sizes > 0]
    sizes = sizes[sizes > 0]
    if len(sizes) and needed_places(sizes, items) > _PLACES:
        return _p(-values, counts, largest, 0.0)  # a level that holds too, and any size
    return chance_of_sum(int(values @ counts), sizes, items)


def interval(values: Counts, counts: Counts, unit: int, alpha: float) -> tuple[float, float]:
    """Return the interval of the drop at 1 - 2 alpha: all drops that neither test rejects.

    So `p_good` is below alpha just where the upper end is below the margin; each end alone holds with 1 - alpha.

    Args:
        values: as for `p_good`.
        counts: likewise.
        unit: likewise.
        alpha: above 0, below 0.5.

    Returns:
        Lowest and highest drop, -1 to 1.

    Raises:
        UsageError: an argument makes no sense.
    """
    _check(values, counts, unit)
    check_share("alpha", alpha, 0.5)
    return -_highest(-values, counts, unit, alpha), _highest(values, counts, unit, alpha)


def _highest(values: Counts, counts: Counts, unit: int, alpha: float) -> float:
    """Return the largest drop that is not rejected as too large."""
    low, high = -float(values @ counts) / unit / float(counts.sum()), 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _p(values, counts, unit, middle) > alpha else (low, middle)
    return high


def _p(values: Counts, counts: Counts, unit: int, drop: float) -> float:
    """Return the chance that the randomly weighted drop, with one item at the worst, is this drop or more."""
    weights = np.append(values / unit, -1.0) + drop
    if not weights.min() < 0:
        return 0.0
    return float(chance_of_none(weights, np.append(counts, 1)))


def _check(values: NDArray[np.int64], counts: NDArray[np.int64], unit: int) -> None:
    if unit < 1:
        raise UsageError(f"unit: expected at least 1, found {unit!r}")
    if values.ndim != 1 or values.shape != counts.shape or len(np.unique(values)) != len(values):
        raise UsageError(f"expected different values and as many counts, found {values.tolist()} and {counts.tolist()}")
    if (np.abs(values) > unit).any():
        raise UsageError(f"expected differences from -{unit} to {unit}, found {values.min()} to {values.max()}")
    if (counts < 0).any() or counts.sum() < 1:
        raise UsageError(f"expected counts of at least one item in all, found {counts.tolist()}")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        raise UsageError(f"margin: expected 0 to 1, below 1, found {margin!r}")
