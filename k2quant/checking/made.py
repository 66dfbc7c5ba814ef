"""How an output's weights were made, by what a report says, where that is more than rounding to nearest.

A report says only which rule a weight is held to, never that one holds: each is checked on the weights themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from k2quant.conversion.searching.fitting import FOLDED, SOLVED
from k2quant.ground import names


class Made(NamedTuple):
    """How weights were made."""

    solved: Collection[str] = frozenset()
    """Those whose codes are none of the nearest, by base."""
    folded: bool = False
    """Whether rows and columns may have been folded."""

    def __bool__(self) -> bool:
        """Tell whether anything is more than rounding."""
        return bool(self.solved) or self.folded


def made(report: Mapping[str, Any]) -> Made:
    """Return how weights were made, by a report that `read_report` found sound.

    Args:
        report: of a conversion.
    """
    method = report.get("method")
    asked = method.get("asked") if isinstance(method, dict) else None
    if asked == FOLDED:
        return Made(folded=True)
    if asked != SOLVED:
        return Made()
    return Made(frozenset(names.split(name)[0] for name, facts in report["tensors"].items() if _is_solved(facts)))


def _is_solved(facts: Mapping[str, Any]) -> bool:
    scales = facts.get("scales")
    return isinstance(scales, dict) and scales.get("method") == SOLVED
