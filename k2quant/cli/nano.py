"""`k2quant nano`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from k2quant.nano.run import Result


@click.command(name="nano")
@click.argument("folder", metavar="DST", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--steps", type=click.IntRange(1), help="Batches to train on.  [default: three minutes' worth on two cores]"
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the weights and the items.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(folder: Path, *, steps: int | None, seed: int, as_json: bool) -> None:
    """Train nano-K2, a K2 in everything but size, on this CPU and write it to DST as a BF16 checkpoint.

    It learns tasks with exact answers, so that what a conversion, calibration or training does to accuracy can be
    measured where no 1 TB checkpoint is at hand. Ends with its accuracy on items that it never saw.

    \b
    Example:
        k2quant nano nano-k2
    """
    import json

    _expect_transformers()
    from k2quant.nano.run import run

    with _progress() as progress:
        result = run(folder, steps=steps, seed=seed, progress=progress)
    if as_json:
        click.echo(json.dumps(result.summary, indent=1))
    else:
        _show(result)


def _expect_transformers() -> None:
    from importlib.util import find_spec

    from k2quant.errors import MissingExtra

    if find_spec("transformers") is None:
        raise MissingExtra("nano-K2 is a transformers model", remedy="pip install transformers")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, float], None] | None]:
    """Show steps, loss, rate and time left while the block runs; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.speed:.1f} steps/s, loss {task.fields[loss]:.3f} nats,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"))
        # A rate is known after two steps; until then the column would find none.
        bar.tasks[task].finished_speed = 0.0

        def show(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, loss=loss)

        yield show


def _show(result: Result) -> None:
    click.echo(f"{result.folder}: {result.parameters:,} parameters, {result.steps} steps in {result.seconds:.0f} s")
    click.echo(
        f"\n{'held-out answers right':<24} {'all':>6} {'95% interval':>14} {'easy':>7} {'middle':>7} {'hard':>7}"
    )
    for line in result.lines():
        click.echo(line)
    loss, error = result.score.loss
    click.echo(f"\nloss of an answer: {loss:.4f} +- {error:.4f} nats a token")
    click.echo(f"Round it:  k2quant convert --to int4 {result.folder} {result.folder}-int4")
