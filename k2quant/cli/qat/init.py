"""`k2quant qat init`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from k2quant.cli.parts.options import follow_links, words
from k2quant.formats.known import FORMATS
from k2quant.qat import QATConfig


@click.command(name="init")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    metavar="JOB.yaml",
    type=click.Path(path_type=Path),
    default=Path("job.yaml"),
    show_default=True,
    help="File to write.",
)
@click.option(
    "--to",
    type=words([name for name, kind in FORMATS.items() if kind.trained]),
    default=QATConfig().to,
    show_default=True,
    help="Format of the export.",
)
@click.option("--data", metavar="PATH", help="What to learn from; else a name stands there to be replaced.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@follow_links()
def command(model: Path, *, output: Path, to: str, data: str | None, force: bool, follow_links: bool) -> None:
    """Write a commented job file for the checkpoint in MODEL: every key, what it means, and values that fit the model.

    Of the model only headers and config are read.

    \b
    Example:
        k2quant qat init nano-k2 -o job.yaml
    """
    from typing import cast

    from k2quant.formats.known import ExportFormat
    from k2quant.qat.job import write_template

    write_template(model, output, to=cast("ExportFormat", to), data=data, follow_links=follow_links, force=force)
    name = "" if data else "name your data in it (data.path), then "
    click.echo(f"{output}: written; {name}see what it takes: k2quant qat plan {shlex.quote(str(output))}")
