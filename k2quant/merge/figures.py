"""What of an update is left when the weights have been rounded, in numbers that can be added up.

D is the exact update, scaling * B @ A. Wq is the weight as it is stored, W0q the base's weight as it would be stored
without the update, both as BF16. Their difference E = Wq - W0q is the update that a model really gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from k2quant.ground.names import TENSOR_CLASSES
from k2quant.kernels.codecs.figures import Figures


@dataclass(frozen=True, slots=True)
class MergeFigures(Figures):
    """The figures of a weight with an update added: what rounding did to the sum, and what it did to the update."""

    update: float = 0.0
    """Sum of D^2."""
    effective: float = 0.0
    """Sum of E^2."""
    inner: float = 0.0
    """Sum of D * E."""
    lost: float = 0.0
    """Sum of min(D^2, (D - E)^2): the update's energy where the weight came no nearer to what was asked for, and else
    that of what is missing or too much."""
    codes_changed: int = 0
    """Weights whose code, or whose bits in BF16, are not those without the update."""
    groups: int = 0
    """Groups of weights that share an INT4 scale."""
    groups_below_half_step: int = 0
    """Those of them in which no |D| reaches half a step of the base's scale."""

    def __add__(self, other: Figures) -> MergeFigures:
        if not isinstance(other, MergeFigures):
            return NotImplemented
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "worst"
        }
        return MergeFigures(**sums, worst=max(self.worst, other.worst))

    @property
    def norm(self) -> float:
        """Frobenius norm of the exact update."""
        return math.sqrt(self.update)

    @property
    def ratio(self) -> float:
        """|E| / |D|; 0 for no update."""
        return math.sqrt(self.effective / self.update) if self.update else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between E and D; 0 where one of them is nothing."""
        product = self.norm * math.sqrt(self.effective)
        return self.inner / product if product else 0.0

    @property
    def lost_share(self) -> float:
        """The share of the update's energy that is lost; 1 where no weight came nearer to what was asked for."""
        return self.lost / self.update if self.update else 0.0

    @property
    def changed_share(self) -> float:
        """The share of weights whose code changed."""
        return self.codes_changed / self.count if self.count else 0.0


class ClassSum(NamedTuple):
    """What was merged into the tensors of one class."""

    kind: str
    """One of `TENSOR_CLASSES`."""
    tensors: int
    figures: MergeFigures

    def summary(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "class": self.kind,
            "tensors": self.tensors,
            "norm": self.figures.norm,
            "cosine": self.figures.cosine,
            "ratio": self.figures.ratio,
            "lost": self.figures.lost_share,
            "codes_changed": self.figures.changed_share,
        }


def by_class(tensors: Mapping[str, Mapping[str, Any]]) -> list[ClassSum]:
    """Sum the figures of a report's `tensors` by class, in the order of the report."""
    found: dict[str, list[MergeFigures]] = {}
    for facts in tensors.values():
        if "update" in facts.get("figures", ()):
            found.setdefault(facts["class"], []).append(MergeFigures(**facts["figures"]))
    return [ClassSum(kind, len(found[kind]), total(found[kind])) for kind in TENSOR_CLASSES if kind in found]


def total(parts: Iterable[MergeFigures]) -> MergeFigures:
    """Add figures up, in their order."""
    return sum(parts, start=MergeFigures())
