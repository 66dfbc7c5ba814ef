"""What a conversion did to the values, in five numbers that can be added up.

The truth is the BF16 pivot: `w` is a weight before the conversion, `w'` the same weight afterwards, both as BF16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one panel, tensor or checkpoint; add panels with `+`, in a fixed order."""

    count: int = 0
    """Weights compared."""
    changed: int = 0
    """Weights whose value changed; -0 equals 0."""
    energy: float = 0.0
    """Sum of w^2."""
    error: float = 0.0
    """Sum of (w - w')^2."""
    worst: float = 0.0
    """Largest |w - w'|."""

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.count + other.count,
            self.changed + other.changed,
            self.energy + other.energy,
            self.error + other.error,
            max(self.worst, other.worst),
        )

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, in decibels; infinite where nothing was lost."""
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.energy / self.error) if self.energy > 0 else -math.inf

    @property
    def exact(self) -> bool:
        """Whether every value came through unchanged."""
        return self.changed == 0
