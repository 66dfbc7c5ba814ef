"""`k2quant clean`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts.places import PLACE

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.address import Address
    from k2quant.checkpoint.writing.cleaning import Found


@click.command(name="clean")
@click.argument("place", metavar="DESTINATION", type=PLACE)
@click.option("--yes", is_flag=True, help="Remove it, locks of other machines too: their processes have ended.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(place: Path | Address, *, yes: bool, as_json: bool) -> None:
    """Name what a stopped run left in DESTINATION that nothing will need, and with --yes remove it.

    Files that are not whole, shards of a source, uploads that were never completed, locks. What the run had finished
    stays, and the same command goes on from it.

    \b
    Example:
        k2quant clean s3://models/Kimi-K2-Instruct-INT4 --yes
    """
    from k2quant.checkpoint.reader import INCOMPLETE, REPORT
    from k2quant.checkpoint.writing.cleaning import look

    found = look(place, report=REPORT, incomplete=INCOMPLETE, remove=yes)
    if as_json:
        left = [each._asdict() for each in found.left]
        click.echo(json.dumps({"destination": str(place), "left": left, "removed": yes, "goes_on": found.goes_on}))
        return
    for line in _lines(found, place, removed=yes):
        click.echo(line)


def _lines(found: Found, place: Path | Address, *, removed: bool) -> list[str]:
    from k2quant.ground.units import counted, size

    lines = []
    for each in found.left:
        known = [size(each.size)] if each.size is not None else []
        lines.append(f"{each.kind:<8} {each.name}: " + ", ".join([*known, *([each.said] if each.said else [])]))
    count = counted(len(found.left), "thing")
    if not found.left:
        said = "nothing is left over"
    else:
        said = f"{count} removed" if removed else f"{count} left over; `k2quant clean {place} --yes` removes it"
    more = "; what was finished stays, and the same command goes on" if found.goes_on else ""
    return [*lines, f"{place}: {said}{more}"]
