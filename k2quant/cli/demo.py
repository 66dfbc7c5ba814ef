"""`k2quant demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo-run"))
def command(folder: Path) -> None:
    """Write a small checkpoint in K2's layout to FOLDER, convert it through every format and check each step.

    Exits 3 when a step is not what it promises to be.

    \b
    Example:
        k2quant demo demo-run
    """
    from k2quant.demo import run

    run(folder)
