"""How sure a number is: Wilson's interval of a share, and a mean with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

TWO_SIDED_95 = 1.959963984540054
"""95% of a normal distribution lie within so many standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over tokens with its standard error; chunks of the text, not tokens, count as independent."""

    value: float
    error: float


def wilson(right: float, count: int, z: float = TWO_SIDED_95) -> tuple[float, float]:
    """Return where the true share plausibly lies, 0 to 1; an end is exact where none or all are right.

    Wilson, Journal of the American Statistical Association 22:209, 1927.

    Args:
        right: how many are right; of what counts in parts, their sum.
        count: of so many, at least 1.
        z: standard deviations to either side.
    """
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - half if right else 0.0), (middle + half if right < count else 1.0)
