"""Tango's score statistic of paired answers, and the interval of the drop that it gives (Stat. Med. 17:891, 1998)."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, cast

import numpy as np

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Floats


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
    check_counts(lost, gained, n)
    check_share("alpha", alpha, 0.5)
    far = -NormalDist().inv_cdf(alpha)
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


def check_counts(lost: int, gained: int, n: int) -> None:
    """Refuse counts that no pair of runs has.

    Raises:
        UsageError: a count is negative, there are no items, or more flips than items.
    """
    if lost < 0 or gained < 0 or n < max(1, lost + gained):
        raise UsageError(f"expected counts of flips among the items, found {lost} lost and {gained} gained of {n}")


LEAST = 1e-9
"""Smallest margin or power: of smaller ones no digit would be right."""


def check_share(name: str, value: float, limit: float, *, least: float = LEAST) -> None:
    """Refuse what is below the least, a billionth unless said otherwise, or not below the limit.

    Raises:
        UsageError: see there.
    """
    if not least <= value < limit:
        raise UsageError(f"{name}: expected above 0, at least {least:g}, and below {limit:g}, found {value!r:.100}")
