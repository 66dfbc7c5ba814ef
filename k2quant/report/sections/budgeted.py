"""How bits were shared out: which modules stay in a larger format, ranked by the error that a byte removes, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from k2quant.ground.units import size
from k2quant.report.choices.budgets import Budget, Unit
from k2quant.report.content import Report
from k2quant.report.words import DASH, code, count, table, text, tile

_SHOWN = 30  # units of the ranking; K2 has some 500
_FORMATS = 10


def tiles(report: Report) -> Iterator[str]:
    """Yield the number that matters."""
    if (budget := report.budget) is not None:
        asked = f"{budget.limit:g} {'nats a token' if budget.asked == 'kl' else 'asked for'}"
        yield tile("Bits a weight", f"{budget.bits:.2f}", f"{asked}; scales counted, weights in scope alone")


def section(report: Report) -> str:
    """Return sums and the ranking; nothing where no bits were shared out."""
    budget = report.budget
    if budget is None:
        return ""
    listed = _ranking(budget.units[:_SHOWN], "ranking of units")
    ranked = len(budget.units)
    more = f"<p class=note>and {ranked - _SHOWN:,} more, in k2quant_report.json</p>" if ranked > _SHOWN else ""
    return (
        f"<section class=card><h2>Where the bits went</h2><p class=note>{_note(budget)}</p>{_sums(budget)}"
        f"<details{' open' if ranked <= _OPEN else ''}><summary>The ranking, {ranked:,} in all</summary>{listed}{more}"
        "</details></section>"
    )


_OPEN = 30


def as_json(report: Report) -> dict[str, Any] | None:
    """Return it as JSON holds it; None where no bits were shared out."""
    budget = report.budget
    if budget is None:
        return None
    formats = {name: {"units": units, "weights": weights} for name, units, weights, _, _ in _by_format(budget)}
    return {**budget._asdict(), "units": len(budget.units), "formats": formats}


def _note(budget: Budget) -> str:
    what = "nats a token" if budget.measure == "kl" else "of the energy where they are added"
    less = f", {budget.after / budget.before:.2f} of it" if budget.before else ""
    return (
        "What engines hold in one module gets one format. All in the smallest, their errors come to "
        f"{budget.before:.3g} {what}, as chosen to {budget.after:.3g}{less}. Bytes go where each removes most; what "
        "ranks below the cut has the smallest format."
    )


def _by_format(budget: Budget) -> Iterator[tuple[str, int, int, int, float]]:
    """Yield each format with its units, weights, bytes, and the sum of errors that were measured."""
    formats = Counter(unit.format for unit in budget.units)
    for name, number in formats.most_common(_FORMATS):
        own = [unit for unit in budget.units if unit.format == name]
        sums = sum(unit.weights for unit in own), sum(unit.nbytes for unit in own)
        yield name, number, *sums, sum(unit.error or 0 for unit in own)


def _sums(budget: Budget) -> str:
    rows = [
        [name.upper(), f"{number:,}", count(weights), size(nbytes), f"{error:.3g}"]
        for name, number, weights, nbytes, error in _by_format(budget)
    ]
    return table(["format", "modules", "weights", "size", "error"], rows, css="compact", label="formats")


def _ranking(units: tuple[Unit, ...], label: str) -> str:
    rows = [
        [
            code(unit.name),
            unit.format.upper(),
            DASH if unit.gain is None else f"{unit.gain:.2g}",
            DASH if unit.error is None else f"{unit.error:.2g}",
            size(unit.nbytes),
            text(unit.reason),
        ]
        for unit in units
    ]
    return table(["module", "format", "error a MB", "error left", "size", "why"], rows, css="reasons", label=label)
