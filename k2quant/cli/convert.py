"""`k2quant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from k2quant.cli.parts import conversion, options
from k2quant.cli.parts.results import suggest


@click.command(name="convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@conversion.format_options()
@conversion.method_options()
@options.device(more="Where the arithmetic runs: cpu or cuda.", others=("cpu",))
@conversion.run_options()
def command(
    source: Path, destination: Path, *, dry_run: bool, as_json: bool, shard_size: str | None, **options: Any
) -> None:
    """Convert the checkpoint in SOURCE and write it to DESTINATION.

    The same command after a kill resumes; on a finished DESTINATION it says so and does nothing.

    \b
    Example:
        k2quant convert --to int4 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
    """
    options["shard_size"] = conversion.shard_bytes(shard_size)
    options["recipe"] = conversion.read_stdin(options["recipe"])
    if dry_run:
        _dry_run(source, destination, as_json=as_json, **options)
    else:
        _convert(source, destination, as_json=as_json, **options)


def _convert(source: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.cli.parts.screen import progress
    from k2quant.conversion.convert import convert
    from k2quant.conversion.searching.gains import bought

    with progress(f"{source.name} to {conversion.target(options)}") as show:
        done = convert(source, destination, progress=show, **options)
    conversion.announce(done)
    gain = None if done.already_done else bought(done.report)
    if as_json:
        click.echo(json.dumps(conversion.summary(done, destination) | ({} if gain is None else {"bought": gain})))
        return
    click.echo(conversion.last_line(done, destination))
    if not done.already_done:
        click.echo(conversion.quality(done))
    if gain is not None:
        click.echo(gain)
    linked = ("--follow-links",) if options["follow_links"] else ()
    suggest(("k2quant", "verify", *linked, source, destination), ("k2quant", "report", destination))


def _dry_run(source: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    from k2quant.cli.parts.screen import working
    from k2quant.conversion.convert import codecs_of, planned
    from k2quant.conversion.resume import refuse_nested
    from k2quant.ground.pool import checked_workers

    refuse_nested(source, destination)
    choice = conversion.choice(options)
    with working(f"reading the headers of {source.name}"):
        plan, rounder = planned(source, choice, options["stats"], follow_links=options["follow_links"])
    codecs_of(options["device"])
    conversion.dry_run(
        plan,
        destination,
        restart=options["restart"],
        workers=checked_workers(options["workers"]),
        as_json=as_json,
        rounder=rounder,
    )
