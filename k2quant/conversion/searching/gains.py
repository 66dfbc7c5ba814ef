"""What a search bought, in words, by what a report says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from k2quant.conversion.searching.fitting import PLAIN, SOLVED
from k2quant.ground.units import counted


def bought(report: Mapping[str, Any]) -> str | None:
    """Say what a search, a fold or a budget bought, by a report; None where nothing of the kind was asked for.

    `imatrix: held-out error 0.71 of rounding's (median of 48 matrices)`
    """
    said = [*_searched(report), *_folded(report), *_spent(report)]
    return "; ".join(said) or None


def _searched(report: Mapping[str, Any]) -> Iterator[str]:
    if (method := report.get("method")) is None:
        return
    asked = method["asked"]
    found = [facts["scales"] for facts in report["tensors"].values() if "scales" in facts]
    if not found:
        yield f"{asked}: nothing was searched, for no weight gets new codes"
        return
    held_out = [scales for scales in found if scales["measure"] != "weights"]
    middle = median(shipped(scales["method"], scales["relative"]) for scales in held_out or found)
    what = "held-out" if held_out else "squared"
    said = f"{asked}: {what} error {middle:.2f} of rounding's (median of {_matrices(len(held_out or found))})"
    ways = Counter(scales["method"] for scales in found)
    if asked == SOLVED:
        said += "".join(
            f", {ways[other]:,} {_ships(ways[other])} at {other} scales"
            for other in sorted(ways)
            if other not in {PLAIN, SOLVED}
        )
    if rounded := ways[PLAIN]:
        said += f", {rounded:,} {_ships(rounded)} rounded"
    if held_out and (others := len(found) - len(held_out)):
        said += f", {others:,} not measured"
    yield said


def _folded(report: Mapping[str, Any]) -> Iterator[str]:
    """Say how many MLPs were folded: `down_proj` speaks for both of its sides."""
    tried = [
        facts["fold"]["columns"]
        for name, facts in report["tensors"].items()
        if "fold" in facts and ".down_proj." in name
    ]
    if tried:
        yield f"{sum(map(bool, tried)):,} of {counted(len(tried), 'MLP')} folded"


def _spent(report: Mapping[str, Any]) -> Iterator[str]:
    """Say what a budget was spent on."""
    if (budget := report.get("budget")) is None:
        return
    formats = Counter(unit["format"] for unit in budget["units"])
    kept = ", ".join(f"{number:,} in {name}" for name, number in formats.most_common())
    said = f"budget: {budget['bits']:.2f} bits a weight ({kept})"
    after = budget["error"]["chosen"]
    ((least, before),) = ((name, error) for name, error in budget["error"].items() if name != "chosen")
    yield f"{said}, error {after / before:.2f} of what all in {least} would have" if before else said


def _ships(count: int) -> str:
    return "ships" if count == 1 else "ship"


def shipped(method: str, relative: float) -> float:
    """Return the error of what a weight ships with, over that of rounding: 1 where it ships rounded.

    Args:
        method: what it ships with.
        relative: error of the searched scales over that of rounding.
    """
    return 1.0 if method == PLAIN else relative


def _matrices(count: int) -> str:
    return counted(count, "matrix", "matrices")
