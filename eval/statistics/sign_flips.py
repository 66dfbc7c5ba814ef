"""The sign-flip test: were the differences of this size, each as likely the one way as the other, how often such a sum?

Exact (Fisher, The Design of Experiments, 1935, section 21): of the items whose difference is v in size, a binomial
number with chance one half goes up, so that the sum is a lattice variable. Its distribution comes from its generating
function on the unit circle, and small chances come right to the last digits because the coins are first bent so that
what was seen is the mean (exponential tilting), and the factor is taken back afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from k2quant.eval.statistics.binomial import Counts, Floats

_SPREAD = 9.0  # standard deviations on either side of the mean: less than rounding lies beyond
_NOTHING = -45.0  # of a logarithm: less is rounding
_HALVINGS = 60


def chance_of_sum(seen: int, sizes: Counts, counts: Counts) -> float:
    """Return the chance that the sum of sizes with random signs is at most what was seen.

    Args:
        seen: the sum that was seen.
        sizes: int64 `[k]`, different and above 0.
        counts: int64 `[k]`, how many items have each size.

    Returns:
        The chance, 0 to 1.
    """
    # Sums of what goes up, from 0 to all, have steps half as wide; a common divisor makes them wider.
    divisor = math.gcd(*(int(size) for size in sizes)) if len(sizes) else 1
    sizes = sizes // divisor
    all_up = int(sizes @ counts)
    most = (seen // divisor + all_up) // 2
    if most >= all_up:
        return 1.0
    if most < 0:
        return 0.0
    places = needed_places(sizes, counts)
    return _at_most(most, places, sizes.astype(np.float64), counts.astype(np.float64))


def needed_places(sizes: Counts, counts: Counts) -> int:
    """Return how many places the distribution takes, and the time and memory with it."""
    spread = math.sqrt(float(counts @ np.square(sizes, dtype=np.float64))) / 2
    return 1 << math.ceil(math.log2(2 * _SPREAD * spread + 2 * float(sizes.max()) + 2))


def _at_most(most: int, places: int, sizes: Floats, counts: Floats) -> float:
    """Return the chance of at most so much going up, of what does with chance one half."""
    tilt = _tilt(most, sizes, counts)
    ups = _ups(tilt, sizes)
    mean = float(counts @ (sizes * ups))
    first = math.ceil(mean) - places // 2  # of the places around the mean; outside of them lies nothing
    shares = np.fft.irfft(_turned(places, first, sizes, counts, ups), places)
    at = first + np.arange(places)
    back = -tilt * at - counts @ (np.log1p(-ups) - np.log(0.5))  # what the tilt did to each place
    wanted = (at <= most) & (at >= 0)
    return float(np.clip(shares[wanted] @ np.exp(back[wanted]), 0, 1))


def _turned(places: int, first: int, sizes: Floats, counts: Floats, ups: Floats) -> Any:
    """Return the generating function of what goes up at `places // 2 + 1` points of the half circle."""
    turns = 2 * math.pi / places * np.arange(places // 2 + 1)
    log = 1j * turns * first
    alive = np.arange(len(turns))
    for each in np.argsort(-counts * sizes**2):  # the first ones leave but the points near 1
        with np.errstate(divide="ignore"):  # coins of one half may make 0 exactly
            log[alive] += counts[each] * np.log(1 - ups[each] + ups[each] * np.exp(-1j * sizes[each] * turns[alive]))
        alive = alive[log[alive].real > _NOTHING]
    found = np.zeros(len(turns), dtype=np.complex128)
    found[alive] = np.exp(log[alive])
    return found


def _tilt(most: int, sizes: Floats, counts: Floats) -> float:
    """Return the tilt at which so much goes up in the mean; far enough where nothing shall."""
    low, high = -40 / float(sizes.min()), 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if counts @ (sizes * _ups(middle, sizes)) > most else (middle, high)
    return (low + high) / 2


def _ups(tilt: float, sizes: Floats) -> Floats:
    """Return the chance of each tilted coin to go up; tilts are not above 0."""
    bent = np.exp(tilt * sizes)
    found: Floats = bent / (1 + bent)
    return found
