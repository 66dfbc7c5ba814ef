"""`k2quant demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo-run"))
@click.option(
    "--steps",
    type=click.IntRange(0),
    help="Batches that nano-K2 is trained on; 0 leaves it out.  [default: three minutes' worth on two cores]",
)
def command(folder: Path, *, steps: int | None) -> None:
    """Write a small checkpoint in K2's layout to FOLDER, convert it through every format and check each step.

    Then train nano-K2, a K2 in everything but size, convert it to FP8 and INT4, run it in all three formats and say
    what each costs. Exits 3 when a step is not what it promises to be.

    \b
    Example:
        k2quant demo demo-run
    """
    from k2quant.demo import run

    run(folder)
    if steps != 0:
        _nano(folder / "nano", steps)


def _nano(folder: Path, steps: int | None) -> None:
    from k2quant.cli.nano import training_progress
    from k2quant.nano.run import run

    click.echo("\nnano-K2: training a small K2 from nothing, about three minutes on two cores ...")
    with training_progress() as progress:
        trained = run(folder, steps=steps, progress=progress)
    click.echo(f"{trained.parameters:,} parameters, {trained.steps} steps in {trained.seconds:.0f} s: {folder}")
    _table(folder)
    question = "A0478+3="
    click.echo(f'\nAsk it:  k2quant generate {folder}-int4 --prompt "{question}"')


def _table(folder: Path) -> None:
    """Run the model in every format and print what each costs."""
    from rich.console import Console
    from rich.table import Table

    from k2quant.nano.tour import tour
    from k2quant.units import size

    title = "The same answers from packed weights, 1800 held-out items"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("format", "shards", "answers right", "95%", "loss, nats", "more than BF16", "tokens/s"):
        table.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    for stop in tour(folder):
        low, high = stop.accuracy.interval
        loss, error = stop.score.loss
        more, spread = stop.gap
        table.add_row(
            stop.format,
            size(stop.nbytes),
            f"{stop.accuracy.share:.1%}",
            f"{low:.1%}-{high:.1%}",
            f"{loss:.4f} ± {error:.4f}",
            "" if stop.format == "bf16" else f"{more:+.4f} ± {spread:.4f}",
            f"{stop.tokens_per_second:.0f}",
        )
    Console().print(table)
