"""`k2quant demo`."""

from __future__ import annotations

from pathlib import Path

import click

from k2quant.cli.parts.screen import questions, remark, training


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo-run"))
@click.option(
    "--steps",
    type=click.IntRange(0),
    help="Batches that nano-K2 is trained on; 0 leaves it out.  [default: three minutes' worth on two cores]",
)
def command(folder: Path, *, steps: int | None) -> None:
    """Write a small checkpoint in K2's layout to FOLDER, convert it through every format and check each step.

    Then train nano-K2, a K2 in everything but size, convert it to FP8 and INT4, run it in all three formats, say what
    each costs, and have the gate judge INT4 by what lm-eval makes of its answers. Exits 3 when a step is not what it
    promises to be.

    \b
    Example:
        k2quant demo demo-run
    """
    from k2quant.nano.demo import run

    trains, judges = (steps != 0 and there for there in _installed())
    if steps != 0 and not judges:
        remark(_left_out(trains=trains))
    run(folder)
    if trains:
        _nano(folder / "nano", steps)
    if judges:
        _gate(folder)


def _installed() -> tuple[bool, bool]:
    """Return whether nano-K2 can be trained here, and whether it can be asked and judged with pictures too."""
    from k2quant.ground.extras import lacking

    return not lacking("run"), not (lacking("eval") or lacking("report"))


def _left_out(*, trains: bool) -> str:
    """Say before the demo begins where it will end, and what it lacks."""
    from k2quant.ground.extras import install, lacking, listed

    ends = "after nano-K2, without the gate" if trains else "after the conversions, without nano-K2 and the gate"
    lacks = listed((*lacking("eval"), *lacking("report")))
    return f"note: this demo ends {ends}: {lacks} not installed; {install('eval')}"


def _nano(folder: Path, steps: int | None) -> None:
    from k2quant.nano.run import run

    takes = ", about three minutes on two cores" if steps is None else ""
    click.echo(f"\nnano-K2: training a small K2 from nothing{takes} ...")
    with training("training") as progress:
        trained = run(folder, steps=steps, progress=progress)
    click.echo(f"{trained.parameters:,} parameters, {trained.steps} steps in {trained.seconds:.0f} s: {folder}")
    _table(folder)
    question = "A0478+3="
    click.echo(f'\nAsk it:  k2quant generate {folder}-int4 --prompt "{question}"')


def _table(folder: Path) -> None:
    """Run the model in every format and print what each costs."""
    from k2quant.formats.known import FORMATS
    from k2quant.ground.units import size
    from k2quant.nano.tour import tour

    click.echo("\nThe same 1800 held-out items answered from packed weights:")
    click.echo(f"{'':<5}{'shards':>9}{'right':>8}{'95%':>14}{'loss, nats':>12}{'more than BF16':>19}{'tokens/s':>10}")
    for stop in tour(folder):
        low, high = stop.accuracy.interval
        more = f"{stop.gap[0]:+.4f} ± {stop.gap[1]:.4f}" if FORMATS[stop.format].quantised else ""
        click.echo(
            f"{stop.format:<5}{size(stop.nbytes):>9}{stop.accuracy.share:>8.1%}{f'{low:.1%}-{high:.1%}':>14}"
            f"{stop.score.loss[0]:>12.4f}{more:>19}{stop.tokens_per_second:>10.0f}"
        )


def _gate(folder: Path) -> None:
    """Have lm-eval ask nano-K2 as trained and as INT4, and the gate say whether INT4 is good enough."""
    from k2quant.cli.eval.gate import show
    from k2quant.errors import HarnessFault, Incomparable, MissingExtra
    from k2quant.eval import gate, measure_fidelity
    from k2quant.eval.report import write_reports
    from k2quant.nano.benchmark import GROUP, TEXT, write_tasks

    click.echo("\nIs INT4 good enough? lm-eval asks both, k2quant's gate decides:")
    names = ("nano", "nano-int4")
    try:
        write_tasks(folder / "tasks", _ITEMS)
        runs = [_evaluated(folder, name, GROUP) for name in names]
        verdict = gate(*runs)
    except (MissingExtra, Incomparable, HarnessFault) as error:
        # No lm-eval, or a nano-K2 of a few steps, which says nothing or nothing that is right.
        click.echo(f"no verdict: {error}")
        return
    drift = measure_fidelity(*(folder / name for name in names), text=folder / "tasks" / TEXT)
    page = write_reports(verdict, folder / "gate", fidelity=drift).html
    show(verdict)
    click.echo(f"\nThe report, with pictures: {page}")


_ITEMS = 100  # of each of six families and three levels


def _evaluated(folder: Path, name: str, task: str) -> Path:
    import shutil

    from k2quant.eval import run
    from k2quant.eval.asking.request import Request

    place = folder / "runs" / name
    shutil.rmtree(place, ignore_errors=True)  # of an earlier demo, whose nano-K2 was another
    request = Request(model=str(folder / name), tasks=(task,), include=(folder / "tasks",), batch_size=64)
    with questions(f"asking {name}") as progress:
        run(request, place, progress=progress)
    return place
