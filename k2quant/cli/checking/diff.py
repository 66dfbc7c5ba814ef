"""`k2quant diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.places import PLACE
from k2quant.errors import CheckFailed

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.address import Address

_SHOWN = 50


@click.command(name="diff")
@click.argument("first", type=PLACE)
@click.argument("second", type=PLACE)
@click.option("--workers", type=click.IntRange(min=1), help="Threads; default: one for each core.")
@options.follow_links()
@click.option("--json", "as_json", is_flag=True, help="Print every difference as JSON.")
def command(
    first: Path | Address, second: Path | Address, *, workers: int | None, follow_links: bool, as_json: bool
) -> None:
    """List the tensors in which two checkpoints differ, and how. Exits 3 when some do.

    \b
    Example:
        k2quant diff Kimi-K2.6 Kimi-K2.6-finetuned
    """
    import json

    from k2quant.checking.comparison import compare, rounding_note, unlike
    from k2quant.cli.checking.verify import finding_record, table
    from k2quant.cli.parts.screen import progress
    from k2quant.cli.parts.terminal.tables import paragraph
    from k2quant.ground.pool import checked_workers
    from k2quant.ground.units import counted

    with progress("comparing") as show:
        findings = compare(first, second, workers=checked_workers(workers), follow_links=follow_links, progress=show)
    differences = [finding for finding in findings if unlike(finding)]
    if as_json:
        click.echo(json.dumps([finding_record(finding) for finding in differences], indent=1))
    elif differences:
        for finding in differences[:_SHOWN]:
            click.echo(paragraph(f"{finding.name}: {finding.how()}", hang="  "))
        if len(differences) > _SHOWN:
            click.echo(f"... and {len(differences) - _SHOWN:,} more")
        click.echo(table(differences))
    else:
        note = rounding_note(findings)
        click.echo(f"no difference in {counted(len(findings), 'tensor')}" + (f"; {note}" if note else ""))
    if differences:
        raise CheckFailed(f"{len(differences):,} of {counted(len(findings), 'tensor')} differ")
