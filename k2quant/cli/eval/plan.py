"""`k2quant eval plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.eval import repeated
from k2quant.cli.parts.terminal.tables import Column, paragraph, table
from k2quant.errors import UsageError

if TYPE_CHECKING:
    from k2quant.eval.statistics.planning import Plan
    from k2quant.eval.statistics.repeats_planning import RepeatsPlan

_ASSUMED = (0.01, 0.02, 0.04, 0.06, 0.1)


@click.command(name="plan")
@click.option("--margin", metavar="SHARE", default="1pp", show_default=True, help="Largest drop that is good enough.")
@click.option(
    "--power",
    metavar="SHARE",
    default="0.8",
    show_default=True,
    help="Chance of PASS that a good candidate shall have.",
)
@click.option(
    "--alpha",
    metavar="SHARE",
    default="0.05",
    show_default=True,
    help="Chance that one at the margin passes all the same.",
)
@click.option("--flips", metavar="SHARE", help="Share of items that flip between right and wrong, such as 4%.")
@click.option(
    "--pilot",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="BASELINE CANDIDATE",
    help="Two runs to count flips in.",
)
@click.option(
    "--drop", metavar="SHARE", default="0", show_default=True, help="The true drop of the candidate that shall pass."
)
@click.option(
    "--repeats", type=click.IntRange(1, 10_000), metavar="N", help="Answers to each item; also shows 1, 2, 4 and 8."
)
@click.option(
    "--correlation",
    metavar="NUMBER",
    help="Of an item's flips in one repeat with those in another: 0 as different items, 1 always the same.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plans as JSON.")
def command(
    *,
    margin: str,
    power: str,
    alpha: str,
    flips: str | None,
    pilot: tuple[Path, Path] | None,
    drop: str,
    repeats: int | None,
    correlation: str | None,
    as_json: bool,
) -> None:
    """Say how many items a gate needs, before they are paid for.

    The more items flip between right and wrong, in whichever direction, the more it takes to tell a drop below the
    margin from one above it. Without --flips or --pilot it shows what some usual shares of flips would take.

    Where answers are drawn by chance, each item may be asked several times. What that wins depends on how alike the
    repeats of one item are: --correlation.

    \b
    Example:
        k2quant eval plan --margin 1pp --power 0.8 --flips 4%
        k2quant eval plan --margin 1pp --pilot runs/base runs/int4
        k2quant eval plan --margin 1pp --flips 6% --correlation 0.3
    """
    from k2quant.eval.gating.policy import share

    if flips is not None and pilot:
        raise UsageError("--flips and --pilot both name the share of flips; give one of them")
    rules = {"margin": share(margin), "power": share(power), "alpha": share(alpha), "drop": share(drop)}
    measured = _measured(*pilot) if pilot else None
    if repeats is not None or correlation is not None or (measured and "correlation" in measured):
        known = measured["flips"] if measured else None if flips is None else share(flips)
        seen = measured.get("correlation") if measured else None
        alike = seen if correlation is None else _correlation(correlation)
        _show_repeats(rules, measured, repeated.plans(rules, known, alike, repeats), as_json=as_json)
        return
    if measured:
        shares = list(dict.fromkeys((measured["flips"], measured["limit"])))
    else:
        shares = [share(flips)] if flips is not None else [each for each in _ASSUMED if each >= rules["drop"]]
    plans = _plans(rules, shares)
    if as_json:
        _print_json(measured, plans)
        return
    for line in _head(rules, measured):
        click.echo(paragraph(line))
    click.echo(table(_COLUMNS, map(_row, plans)))
    for line in _remarks(plans):
        click.echo(paragraph(line))


def _show_repeats(
    rules: dict[str, float], measured: dict[str, Any] | None, plans: list[RepeatsPlan], *, as_json: bool
) -> None:
    if as_json:
        _print_json(measured, plans)
        return
    for line in _head(rules, measured):
        click.echo(paragraph(line))
    click.echo(table(repeated.COLUMNS, map(repeated.row, plans)))
    for line in repeated.remarks(plans):
        click.echo(paragraph(line))


def _print_json(measured: dict[str, Any] | None, plans: Sequence[Plan | RepeatsPlan]) -> None:
    import json

    click.echo(json.dumps({"pilot": measured, "plans": [each.as_dict() for each in plans]}, indent=1))


def _correlation(text: str) -> float:
    """Read a correlation, 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise UsageError(f"--correlation: expected a number from 0 to 1, found {text!r:.100}")
    return found


def _plans(rules: dict[str, float], shares: list[float]) -> list[Plan]:
    from k2quant.eval import plan

    if not shares:
        raise UsageError(f"a drop of {rules['drop']:.2%} needs at least as many flips; name them with --flips")
    return [plan(**rules, flips=each) for each in shares]


def _measured(base: Path, candidate: Path) -> dict[str, Any]:
    """Count the flips between two runs."""
    from k2quant.eval import read_run
    from k2quant.eval.gating.pairing import pair
    from k2quant.eval.statistics.planning import flips_limit

    pairs = pair(read_run(base), read_run(candidate))
    n = sum(each.items for each in pairs)
    rises = [each.changes() for each in pairs]
    lost, gained = (sum(int((sign * each > 0).sum()) for each in rises) for sign in (-1, 1))
    counts = {"n": n, "lost": lost, "gained": gained}
    if any(each.unit > 1 for each in pairs):
        return counts | repeated.measured(pairs)
    return counts | {"flips": (lost + gained) / n, "limit": flips_limit(lost + gained, n)}


def _head(rules: dict[str, float], measured: dict[str, Any] | None) -> list[str]:
    """Say what is planned, and on what it rests."""
    drop = f"a true drop of {100 * rules['drop']:g} pp" if rules["drop"] else "no true drop"
    good = f"Items that let a candidate with {drop} pass with a chance of {100 * rules['power']:g}%,"
    bad = f"and one whose drop is {100 * rules['margin']:g} pp with at most {100 * rules['alpha']:g}%:"
    lines = [f"{good}\n{bad}", ""]
    if measured and "limit" not in measured:
        return [*repeated.pilot(measured), "", *lines]
    if measured:
        counts = f"The pilot: {measured['n']:,} items, {measured['lost']:,} lost, {measured['gained']:,} gained; "
        limit = f"{measured['flips']:.2%} flipped, at most {measured['limit']:.2%} with 95% confidence."
        return [counts + limit, "", *lines]
    return lines


_COLUMNS = tuple(Column(head=head) for head in ("flips", "items", "chance of PASS"))


def _row(plan: Plan) -> tuple[str, ...]:
    from k2quant.eval.statistics.planning import MOST

    items = f"over {MOST:,}" if plan.items is None else f"{plan.items:,}"
    return f"{plan.flips:.2%}", items, "" if plan.reached is None else f"{plan.reached:.1%}"


def _remarks(plans: list[Plan]) -> list[str]:
    """Say what bounds any plan for this margin."""
    lines = ["", f"With fewer than {plans[0].without_flips:,} items not even a candidate without a single flip passes."]
    if len(plans) > 1:
        lines.append("Plan on the upper end of what the share of flips may be: too few items end as INCONCLUSIVE.")
    return lines
