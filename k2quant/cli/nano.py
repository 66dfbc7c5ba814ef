"""`k2quant nano`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.screen import training
from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.tables import Column

if TYPE_CHECKING:
    from k2quant.nano.run import Result
    from k2quant.nano.tasks import Item


@click.command(name="nano")
@click.argument("folder", metavar="DST", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--steps", type=click.IntRange(1), help="Batches to train on.  [default: three minutes' worth on two cores]"
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the weights and the items."
)
@click.option(
    "--tasks",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write its held-out items as tasks for `k2quant eval run --include DIR`, and others to train on.",
)
@options.soft_lock()
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(folder: Path, *, steps: int | None, seed: int, tasks: Path | None, soft_lock: bool, as_json: bool) -> None:
    """Train nano-K2, a K2 in everything but size, on this CPU and write it to DST as a BF16 checkpoint.

    It learns tasks with exact answers, so that what a conversion, calibration or training does to accuracy can be
    measured where no 1 TB checkpoint is at hand. Ends with its accuracy on items that it never saw.

    \b
    Example:
        k2quant nano nano-k2 --tasks nano-tasks
    """
    import gc
    import json

    from k2quant.ground.extras import need

    need("run", "`k2quant nano`")
    gc.enable()  # the command line runs without; a training makes cycles at every step
    from k2quant.nano.writing import refuse_others

    refuse_others(folder)
    from k2quant.nano.benchmark import write_tasks  # only now: it loads torch
    from k2quant.nano.run import run

    with training("training") as progress:
        result = run(folder, steps=steps, seed=seed, soft_lock=soft_lock, progress=progress)
    if tasks is not None:
        write_tasks(tasks)
    if as_json:
        click.echo(json.dumps(result.summary, indent=1))
    else:
        _show(result)


def _show(result: Result) -> None:
    click.echo(f"{result.folder}: {result.parameters:,} parameters, {result.steps} steps in {result.seconds:.0f} s")
    click.echo(f"\nHeld-out answers right:\n{tables.table(_COLUMNS, result.rows())}")
    loss, error = result.score.loss
    click.echo(f"\nloss of an answer: {loss:.4f} +- {error:.4f} nats a token")
    ask(result.folder, result.score.known())
    folders = shlex.join((str(result.folder), f"{result.folder}-int4"))
    click.echo(f"\nRound it:\n  k2quant convert --to int4 {folders}")


_COLUMNS = (
    Column(head="task", left=True),
    Column(head="all"),
    Column(head="95% interval", minor=True),
    *(Column(head=level) for level in ("easy", "middle", "hard")),
)


def ask(folder: Path, known: list[Item]) -> None:
    """Suggest questions that a nano-K2 was not trained on and answers right, as commands with their answers."""
    if not known:
        click.echo(
            "\nNothing to ask it: it answers no held-out question right. A longer training (--steps) teaches it."
        )
        return
    click.echo("\nAsk it what it was not trained on:")
    for item in known:
        command = ("k2quant", "generate", str(folder), "--prompt", item.question)
        click.echo(f"  {shlex.join(command)}\n    {item.answer}")
