"""What `convert` and others say of a budget: options, the choice in place of a format, and its ranking."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts.options import Option, all_of

if TYPE_CHECKING:
    from k2quant.calib import Allotment
    from k2quant.cli.parts.places import Place

_OPTIONS = (
    click.option(
        "--budget",
        type=float,
        metavar="BITS",
        help="Bits a weight, such as 4.6, over what --to int4 takes: what loses most a byte, by the data in STATS, "
        "stays in FP8 or BF16, until they are spent.",
    ),
    click.option(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="In place of --budget: the divergence that may be left, foreseen by what --blame measured.",
    ),
    click.option(
        "--blame",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Of eval blame -o, for all of it in INT4: what is measured there outweighs errors of single matrices.",
    ),
)

_SHOWN = 8  # units of a ranking that a dry run prints; JSON has all

_OF_A_RULE = ("to", "scope", "ignore", "grid", "method")


def budget_options() -> Option[Any]:
    """How many bits, and by what they are shared out."""
    return all_of(_OPTIONS)


def allotted(source: Place, options: dict[str, Any]) -> Allotment | None:
    """Take a budget out of a command's options and put the recipe there that meets it; None where there is none.

    Statistics stay there only where the recipe's method reads them.

    Raises:
        UsageError: it makes no sense beside the others.
    """
    given: dict[str, Any] = {name: options.pop(name) for name in ("budget", "max_kl", "blame")}
    if given["budget"] is None and given["max_kl"] is None:
        _refuse_alone(given["blame"])
        return None
    _check_beside(options)
    from k2quant.calib import allot
    from k2quant.cli.parts.screen import progress
    from k2quant.conversion.recipes.rules import METHODS

    said: dict[str, Any] = {name: options[name] for name in _OF_A_RULE} | {"method": options["method"] or METHODS[0]}
    running: dict[str, Any] = {name: options.get(name) for name in ("workers", "follow_links")}
    with progress(f"weighing {source.name}") as show:
        found = allot(source, options["stats"], **said, **given, **running, progress=show)
    options |= {"recipe": found.recipe, **dict.fromkeys(_OF_A_RULE), "ignore": ()}
    if not found.searches:
        options["stats"] = None
    _say_if_nothing_fits(found)
    return found


def _refuse_alone(blame: Path | None) -> None:
    from k2quant.errors import UsageError

    if blame is not None:
        raise UsageError("`blame=` says where a budget counts: it belongs to `budget=` or `max_kl=`")


def _say_if_nothing_fits(found: Allotment) -> None:
    """Say what the smallest step would take, where bits were asked for and no unit is raised by them."""
    from k2quant.cli.parts.screen import warn

    cheapest = found.cheapest
    steps = [
        (size - one.nbytes[cheapest], one.unit, name)
        for one in found.ranked
        for name, size in one.nbytes.items()
        if one.gain is not None and size > one.nbytes[cheapest]
    ]
    if "bits" not in found.asked or not steps or any(one.format != cheapest for one in found.ranked):
        return
    more, unit, name = min(steps)
    bits = found.bits + 8 * more / sum(one.weights for one in found.ranked)
    warn(f"note: with {found.asked['bits']:g} bits nothing is raised: {unit} in {name} alone takes {bits:.2f}")


def _check_beside(options: dict[str, Any]) -> None:
    """Refuse a budget beside what it decides itself, or without what it decides by, before anything is weighed."""
    from k2quant.cli.parts.solving import SOLVED
    from k2quant.errors import UsageError

    if options["recipe"] is not None:
        raise UsageError("`budget=` makes a recipe of its own, and none may stand beside it: leave out `recipe=`")
    if options["to"] is None:
        raise UsageError("`budget=` shares bits out among what INT4 takes: say `to=int4`")
    if options["method"] == SOLVED and options["data"] is None:
        raise UsageError("`method=` gptq runs text through the model while it converts, and `data=` names none")
    if options["stats"] is None:
        raise UsageError(
            "`budget=` weighs errors by what a calibration kept apart, and `stats=` names none: make it with "
            "`k2quant calibrate SOURCE STATS --data FILE`"
        )


def shown(found: Allotment | None, *, as_json: bool) -> dict[str, Any] | None:
    """Print what a budget came to, if there is one and people read it; return it as JSON has it."""
    if found is None:
        return None
    for line in () if as_json else lines(found):
        click.echo(line)
    return {"budget": found.as_json()}


def lines(found: Allotment) -> list[str]:
    """Return what a budget came to, for people: in sum, the first of its ranking, and bits by layer."""
    from k2quant.cli.parts.terminal.tables import Column, table
    from k2quant.ground.units import counted

    asked = f"{found.asked['bits']:g} bits" if "bits" in found.asked else f"{found.asked['kl']:g} nats"
    raised = [one for one in found.ranked if one.format != found.cheapest]
    unit = "nats a token, foreseen" if found.measure == "kl" else "of the residual stream's energy"
    said = [
        f"{'budget':<16} {asked} asked; {found.bits:.3f} bits a weight, {found.least:.3f} were all of it int4",
        f"{'raised':<16} {len(raised)} of {counted(len(found.ranked), 'unit')} that engines hold as one",
        f"{'error':<16} {found.before:.3g} -> {found.after:.3g} {unit}",
        f"{'bits by layer':<16} {_by_layer(found)}",
    ]
    columns = [
        Column(head="unit", left=True),
        Column(head="format", left=True),
        Column(head="int4 loses"),
        Column(head="a MB wins"),
        Column(head="reason", left=True, minor=True),
    ]
    rows = [
        [
            one.unit,
            one.format,
            f"{one.errors[found.cheapest]:.2e}" if one.errors else "",
            f"{one.gain:.2e}" if one.gain is not None else "",
            one.reason,
        ]
        for one in found.ranked[:_SHOWN]
    ]
    more = len(found.ranked) - len(rows)
    return [*said, *table(columns, rows).split("\n"), *([f"({more} more: --json)"] if more > 0 else [])]


def _by_layer(found: Allotment) -> str:
    """Return bits a weight of each layer, runs of equal ones together: `0: 8.0, 1-59: 4.5`."""
    sums: dict[int, tuple[int, int]] = {}
    for one in found.ranked:
        if one.layer is not None:
            bits, size = sums.get(one.layer, (0, 0))
            sums[one.layer] = bits + 8 * one.nbytes[one.format], size + one.weights
    shown = [(layer, f"{bits / max(size, 1):.1f}") for layer, (bits, size) in sorted(sums.items())]
    runs = [(bits, [layer for layer, _ in run]) for bits, run in groupby(shown, key=lambda each: each[1])]
    return ", ".join(
        f"{layers[0]}: {bits}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}: {bits}" for bits, layers in runs
    )
