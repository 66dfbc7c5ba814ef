"""What to raise first: steps along each unit's curve of bytes and errors, the steepest first.

A unit's formats are points: bytes, and error. On their lower convex hull every step removes less error a byte than the
one before it, so that taking steps of all units in falling order never asks for a step before its own predecessor. That
is Dantzig's rule for the knapsack with such curves: what it reaches is the best of its size, and with a size between
two steps it misses the best by less than the one step that found no room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from k2quant.calib.budget.units import LEAST
from k2quant.formats.known import FORMATS, FormatName


@dataclass(frozen=True, slots=True)
class Step:
    """A unit from one format to a dearer one."""

    unit: str
    to: FormatName
    nbytes: int
    """More bytes than before."""
    removed: float
    """Less error than before, above 0."""

    @property
    def rate(self) -> float:
        """Error that a byte removes."""
        return self.removed / self.nbytes


def hull(unit: str, nbytes: Mapping[FormatName, int], errors: Mapping[FormatName, float]) -> list[Step]:
    """Return the steps of a unit, the steepest first; formats that a mix of others beats have none.

    Args:
        unit: its name.
        nbytes: by format.
        errors: by format.
    """
    order = list(FORMATS)  # of formats that take as much, and lose as much, the first
    points = sorted(nbytes, key=lambda name: (nbytes[name], errors[name], order.index(name)))
    kept: list[FormatName] = [LEAST]
    for name in points[points.index(LEAST) + 1 :]:
        if errors[name] >= errors[kept[-1]] or nbytes[name] <= nbytes[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1], nbytes, errors) <= _slope(kept[-1], name, nbytes, errors):
            kept.pop()
        kept.append(name)
    return [
        Step(unit, after, nbytes[after] - nbytes[before], errors[before] - errors[after])
        for before, after in pairwise(kept)
    ]


def _slope(
    one: FormatName, other: FormatName, nbytes: Mapping[FormatName, int], errors: Mapping[FormatName, float]
) -> float:
    return (errors[one] - errors[other]) / (nbytes[other] - nbytes[one])


def ranked(steps: Iterable[Sequence[Step]]) -> list[Step]:
    """Return the steps of all units, the steepest first; of equal ones that of the unit whose name comes first."""
    numbered = [(step, number) for each in steps for number, step in enumerate(each)]
    return [step for step, _ in sorted(numbered, key=lambda one: (-one[0].rate, one[0].unit, one[1]))]


def within(steps: Sequence[Step], room: int) -> list[Step]:
    """Return the steps that are taken with so many bytes to spend; one without room is passed over, with its unit.

    Args:
        steps: as `ranked` has them.
        room: bytes.
    """
    taken: list[Step] = []
    stopped: set[str] = set()
    for step in steps:
        if step.unit in stopped:
            continue
        if step.nbytes > room:
            stopped.add(step.unit)
            continue
        room -= step.nbytes
        taken.append(step)
    return taken


def until(steps: Sequence[Step], excess: float) -> list[Step]:
    """Return the steps that are taken until so much error is gone, or all: BF16 loses nothing.

    Args:
        steps: as `ranked` has them.
        excess: error to be removed.
    """
    taken: list[Step] = []
    for step in steps:
        if excess <= 0:
            break
        excess -= step.removed
        taken.append(step)
    return taken
