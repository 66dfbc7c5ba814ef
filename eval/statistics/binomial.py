"""Binomial probabilities, from one item to millions, to about 13 digits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

_SPREAD = 8.5  # standard deviations of a binomial; 2e-17 of a normal distribution lies beyond
_SLACK = 40  # and so many counts more, for the skew of rare events

_STIRLING = np.array(
    [0.0] + [math.lgamma(x + 1) - (x + 0.5) * math.log(x) + x - math.log(2 * math.pi) / 2 for x in range(1, 16)]
)


def _series(x: Floats) -> Floats:
    """Return what Stirling's formula leaves of ln x!."""
    large = np.maximum(x, 1)
    square = large * large
    series = (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / square) / square) / square) / large
    return np.where(x < 16, _STIRLING[np.clip(x, 0, 15).astype(np.int64)], series)


_SMALL = _series(np.arange(8192.0))  # most numbers are, and a look-up makes `probability` twice as fast


def _stirling(x: Floats, *, small: bool) -> Floats:
    """Return the same, of whole numbers; `small` says that all have their place in the table."""
    return _SMALL[x.astype(np.int64)] if small else _series(x)


def _part(x: Floats, expected: Floats) -> Floats:
    """Return `x ln(x / expected) + expected - x` without cancellation."""
    excess = (x - expected) / expected
    return expected * ((1 + excess) * np.log1p(excess) - excess)


def probability(x: Any, n: Any, p: float) -> Floats:
    """Return the binomial probabilities of x among n, by Loader's method.

    Args:
        x: counts; a number or an array of any shape.
        n: trials; likewise.
        p: chance of each, 0 to 1.

    Returns:
        float64 of the common shape; 0 where x is below 0 or above n.
    """
    x, n = np.asarray(x, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if p in {0.0, 1.0}:
        return np.where(x == n * p, 1.0, 0.0)
    inner = np.maximum(np.minimum(x, n - 1), 1)
    rest = np.maximum(n - inner, 1)
    size = inner + rest
    small = bool(size.size) and float(size.max()) < len(_SMALL)
    stirling = _stirling(size, small=small) - _stirling(inner, small=small) - _stirling(rest, small=small)
    log = stirling - _part(inner, size * p) - _part(rest, size * (1 - p))
    found = np.exp(log) * np.sqrt(size / (2 * math.pi * inner * rest))
    found = np.where(x == n, np.exp(n * math.log(p)), found)
    found = np.where(x == 0, np.exp(n * math.log1p(-p)), found)
    return np.where((x < 0) | (x > n), 0.0, found)


def window(n: int, p: float) -> tuple[int, int]:
    """Return between which counts all of a binomial lies but for less than rounding."""
    far = _SPREAD * math.sqrt(n * p * (1 - p)) + _SLACK * (0 < p < 1)
    return max(0, math.floor(n * p - far)), min(n, math.ceil(n * p + far))


def beyond(most: int, n: int, p: float, *, upper: bool) -> float:
    """Return the binomial probability of at most `most` among n, or of more."""
    low, high = window(n, p)
    low, high = (max(low, most + 1), high) if upper else (low, min(high, most))
    return float(probability(np.arange(low, high + 1), n, p).sum())
