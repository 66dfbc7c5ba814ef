"""Whether a drop in accuracy lies below or above a margin: exact p-values of paired answers, and what they decide.

Two models answer the same `n` items. `lost` items only the baseline has right, `gained` items only the candidate; the
drop is `(lost - gained) / n`, the share of flips `(lost + gained) / n`. Tango's score statistic Z orders the outcomes:
the larger, the better for the candidate. Its p-values here are not those of a normal distribution, which are wrong
where flips are few, but exact, over the shares of flips that the data allow: see `k2quant.eval.statistics.restricted`.
"""

from __future__ import annotations

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Counts, beyond
from k2quant.eval.statistics.exact import chance
from k2quant.eval.statistics.restricted import critical_curve, restricted_p
from k2quant.eval.statistics.tango import check_counts, check_share, interval, score

__all__ = ["acceptance", "failing", "interval", "p_bad", "p_good", "p_worse", "power", "rejection", "score"]


def p_good(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the exact p-value of "the drop is at least the margin": small shows that the candidate is good enough.

    Without any flips it is `(1 - margin) ** n`, and a millionth as of all p-values, while that is not tiny.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.
        n: items, at least 1.
        margin: above 0, below 1.

    Raises:
        UsageError: the counts or the margin make no sense.
    """
    return _p_value(lost, gained, n, margin, bad=False)


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
    return _p_value(lost, gained, n, margin, bad=True)


def _p_value(lost: int, gained: int, n: int, margin: float, *, bad: bool) -> float:
    """Return the largest chance of what was seen or of anything better for the candidate; with `bad`, worse for it."""
    check_counts(lost, gained, n)
    check_share("margin", margin, 1)
    return restricted_p(lost, gained, n, margin, upper=bad)


def p_worse(lost: int, gained: int) -> float:
    """Return McNemar's exact one-sided p-value of "no drop": the chance of so many losses among equal coins.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.

    Raises:
        UsageError: a count is below nothing.
    """
    check_counts(lost, gained, lost + gained + 1)
    return min(1.0, beyond(lost - 1, lost + gained, 0.5, upper=True))


def acceptance(n: int, margin: float, alpha: float) -> Counts:
    """Return which outcomes pass: those whose `p_good` is at most alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: at least 1e-5, below 0.5.

    Returns:
        int64 `[n + 1]`: for each number of flips, the most losses that pass; -1 where none does. Read-only.

    Raises:
        UsageError: an argument makes no sense.
    """
    return critical_curve(n, margin, alpha, upper=False)


def rejection(n: int, margin: float, alpha: float) -> Counts:
    """Return which outcomes fail: those whose `p_bad` is at most alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: at least 1e-5, below 0.5.

    Returns:
        int64 `[n + 1]`: for each number of flips, the most losses that do not fail yet. Read-only.

    Raises:
        UsageError: an argument makes no sense.
    """
    return critical_curve(n, margin, alpha, upper=True)


def power(n: int, margin: float, alpha: float, flips: float, drop: float = 0.0) -> float:
    """Return the exact chance of PASS for a candidate of this kind.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: at least 1e-5, below 0.5.
        flips: the true share of items that flip, 0 to 1.
        drop: the true drop; its size is at most `flips`.

    Raises:
        UsageError: an argument makes no sense.
    """
    return chance(acceptance(n, margin, alpha), n, *_kind(flips, drop))


def failing(n: int, margin: float, alpha: float, flips: float, drop: float = 0.0) -> float:
    """Return the exact chance of FAIL for a candidate of this kind; arguments as for `power`.

    Raises:
        UsageError: an argument makes no sense.
    """
    return chance(rejection(n, margin, alpha), n, *_kind(flips, drop), upper=True)


def _kind(flips: float, drop: float) -> tuple[float, float]:
    """Return the share of flips and, of them, that of losses."""
    if not 0 <= flips <= 1 or not abs(drop) <= flips:
        raise UsageError(f"expected flips from 0 to 1 and a drop of at most that size, found {flips!r} and {drop!r}")
    return flips, (flips + drop) / (2 * flips) if flips else 0.5
