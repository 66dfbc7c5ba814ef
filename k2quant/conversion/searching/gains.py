"""What a search bought, in words, by what a report says."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from k2quant.conversion.searching.fitting import PLAIN
from k2quant.ground.units import counted


def bought(report: Mapping[str, Any]) -> str | None:
    """Say what a search bought, by a report: `imatrix: held-out error 0.71 of rounding's (median of 48 matrices)`."""
    if (method := report.get("method")) is None:
        return None
    asked = method["asked"]
    found = [facts["scales"] for facts in report["tensors"].values() if "scales" in facts]
    if not found:
        return f"{asked}: nothing was searched, for no weight gets new codes"
    held_out = [scales for scales in found if scales["measure"] != "weights"]
    middle = median(shipped(scales["method"], scales["relative"]) for scales in held_out or found)
    what = "held-out" if held_out else "squared"
    said = f"{asked}: {what} error {middle:.2f} of rounding's (median of {_matrices(len(held_out or found))})"
    if rounded := sum(scales["method"] == PLAIN for scales in found):
        said += f", {rounded:,} {'ships' if rounded == 1 else 'ship'} rounded"
    if held_out and (others := len(found) - len(held_out)):
        said += f", {others:,} not measured"
    return said


def shipped(method: str, relative: float) -> float:
    """Return the error of what a weight ships with, over that of rounding: 1 where it ships rounded.

    Args:
        method: what it ships with.
        relative: error of the searched scales over that of rounding.
    """
    return 1.0 if method == PLAIN else relative


def _matrices(count: int) -> str:
    return counted(count, "matrix", "matrices")
