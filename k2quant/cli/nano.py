"""`k2quant nano`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.screen import training

if TYPE_CHECKING:
    from k2quant.nano.run import Result


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
    click.echo(
        f"\n{'held-out answers right':<24} {'all':>6} {'95% interval':>14} {'easy':>7} {'middle':>7} {'hard':>7}"
    )
    for line in result.lines():
        click.echo(line)
    loss, error = result.score.loss
    click.echo(f"\nloss of an answer: {loss:.4f} +- {error:.4f} nats a token")
    click.echo(f"Round it:  k2quant convert --to int4 {result.folder} {result.folder}-int4")
