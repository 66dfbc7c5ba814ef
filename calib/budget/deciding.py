"""From errors and bytes to a choice, and a reason for each unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2quant.calib.budget.choosing import Step, hull, ranked, until, within
from k2quant.calib.budget.result import Allotment, Ranked
from k2quant.calib.budget.units import LEAST, Unit
from k2quant.conversion.recipes.rules import WrittenRule
from k2quant.errors import UsageError
from k2quant.formats.known import FormatName
from k2quant.ground import names

_MB = 10**6

_SLACK = 0.005
"""Bits by which a budget may lie below INT4's own: 4.5 is asked, and 4.500004 it is with the shapes of K2's experts."""

Errors = dict[str, dict[FormatName, float]]
"""By unit, then by format; none of a unit that was not measured."""


def check_bits(units: Sequence[Unit], budget: float) -> None:
    """Refuse a budget that no choice meets.

    Raises:
        UsageError: it is below what INT4 takes, or above what BF16 does.
    """
    size = sum(unit.size for unit in units)
    low, high = (8 * sum(pick(unit.nbytes.values()) for unit in units) / size for pick in (min, max))
    if not low - _SLACK <= budget <= high:
        raise UsageError(
            f"`budget=` {budget:g}: these {size:,} weights take {low:.4f} bits each in INT4, scales counted, and "
            f"{high:.4f} in BF16; ask for something between"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice."""

    chosen: dict[str, FormatName]
    steps: list[Step]
    """All of them, the steepest first."""
    taken: list[Step]
    asked: dict[str, float]


def choose(units: Sequence[Unit], errors: Errors, budget: float | None, max_kl: float | None) -> Choice:
    """Take steps until the budget is spent, or the divergence is reached.

    Args:
        units: all of them.
        errors: of those that were measured.
        budget: bits a weight, as `check_bits` allows them.
        max_kl: in its place, the sum of errors that may be left.
    """
    steps = ranked(hull(unit.name, unit.nbytes, errors[unit.name]) for unit in units if unit.name in errors)
    size, least = sum(unit.size for unit in units), sum(unit.nbytes[LEAST] for unit in units)
    if budget is not None:
        taken = within(steps, int(budget * size / 8) - least)
    else:
        taken = until(steps, sum(found[LEAST] for found in errors.values()) - float(max_kl or 0))
    chosen = dict.fromkeys((unit.name for unit in units), LEAST) | {step.unit: step.to for step in taken}
    return Choice(chosen, steps, taken, {"bits": budget} if budget is not None else {"kl": float(max_kl or 0)})


def allotment_of(
    found: Choice, units: Sequence[Unit], errors: Errors, rules: tuple[WrittenRule, ...], said: Mapping[str, Any]
) -> Allotment:
    """Return what a choice comes to, ranked.

    Args:
        found: the choice.
        units: all of them.
        errors: of those that were measured.
        rules: by which each unit gets its format.
        said: by what errors were measured.
    """
    first = {step.unit: step for step in reversed(found.steps)}
    order = {name: place for place, name in enumerate(dict.fromkeys(step.unit for step in found.steps))}
    known = {unit.name: place for place, unit in enumerate(units)}

    def rank(unit: Unit) -> tuple[bool, int, int]:
        return unit.name not in errors, order.get(unit.name, len(order)), known[unit.name]

    cut = found.taken[-1].rate if found.taken else None
    ranking = tuple(
        Ranked(
            unit=unit.name,
            kind=names.tensor_class(unit.weights[0].main.name),
            layer=names.layer(unit.weights[0].base),
            tensors=len(unit.weights),
            weights=unit.size,
            format=found.chosen[unit.name],
            nbytes=dict(unit.nbytes),
            errors=dict(errors.get(unit.name, {})),
            gain=first[unit.name].rate * _MB if unit.name in first else None,
            reason=_reason(unit, found, measured=unit.name in errors, cut=cut),
        )
        for unit in sorted(units, key=rank)
    )
    size = sum(unit.size for unit in units)
    least = sum(unit.nbytes[LEAST] for unit in units)
    return Allotment(
        rules=rules,
        ranked=ranking,
        bits=8 * sum(unit.nbytes[found.chosen[unit.name]] for unit in units) / size,
        least=8 * least / size,
        most=8 * (least + sum(step.nbytes for step in found.steps)) / size,
        before=sum(each[LEAST] for each in errors.values()),
        after=sum(each[found.chosen[name]] for name, each in errors.items()),
        measure="kl" if "blame" in said else "outputs",
        asked=found.asked,
        said=said,
    )


def _reason(unit: Unit, found: Choice, *, measured: bool, cut: float | None) -> str:
    """Say why a unit has its format."""
    own = [step for step in found.steps if step.unit == unit.name]
    taken = [step for step in found.taken if step.unit == unit.name]
    if unit.fixed:
        return f"{LEAST}: in the source already, copied"
    if not measured:
        return f"{LEAST}: not measured by the calibration"
    if not own:
        return f"{LEAST}: no format loses less here"
    if not taken:
        above = cut is None or own[0].rate >= cut
        why = "no room for it" if above and "bits" in found.asked else "below the cut"
        return f"{LEAST}: {own[0].to} would take away {own[0].rate * _MB:.2e} a MB, {why}"
    return f"{taken[-1].to}: takes away {taken[-1].rate * _MB:.2e} a MB, above the cut"
