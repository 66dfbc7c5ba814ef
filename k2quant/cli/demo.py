"""`k2quant demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts.screen import questions, remark, training, working
from k2quant.cli.parts.terminal.colour import verdict
from k2quant.cli.parts.terminal.tables import Column, paragraph, table

if TYPE_CHECKING:
    from k2quant.eval.drift.findings import Fidelity
    from k2quant.nano.demo import Outcome
    from k2quant.nano.tasks import Item
    from k2quant.nano.tour import Stop


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo-run"))
@click.option(
    "--steps",
    type=click.IntRange(0),
    help="Batches that nano-K2 is trained on; 0 leaves it out.  [default: three minutes' worth on two cores]",
)
def command(folder: Path, *, steps: int | None) -> None:
    """Write a small checkpoint in K2's layout to FOLDER, convert it through every format and check each step.

    Then train nano-K2, a K2 in everything but size, convert it to every other format, run it in each, say what
    each costs, export INT4 to GGUF and read it back, have the gate judge INT4 by what lm-eval makes of its answers, and
    calibrate it. Exits 3 when a step is not what it promises to be.

    \b
    Example:
        k2quant demo demo-run
    """
    trains, judges = (steps != 0 and there for there in _installed())
    if steps != 0 and not judges:
        remark(_left_out(trains=trains))
    _formats(folder)
    known = _nano(folder / "nano", steps) if trains else []
    judged = _gate(folder) if judges else False
    _farewell(folder, known, trained=trains, judged=judged)


def _formats(folder: Path) -> None:
    """Write a small K2, take it through every format and back, check each step and print what came out.

    Raises:
        DestinationForeign: the folder holds something that no demo wrote.
        CheckFailed: a step is not what it promises to be.
    """
    from k2quant.errors import CheckFailed
    from k2quant.nano.demo import begin, compile_codecs, tour

    click.echo(f"A Kimi K2 in everything but size: {begin(folder)}")
    click.echo("Compiling the codecs; later runs find them in a cache ...")
    compile_codecs()
    outcomes = list(tour(folder))
    _show_formats(outcomes, folder)
    failures = [f"{each.step.folder}: {name} {why}" for each in outcomes for name, why in each.failures.items()]
    if failures:
        raise CheckFailed(f"{len(failures)} checks failed, first {failures[0]}")


def _show_formats(outcomes: list[Outcome], folder: Path) -> None:
    from k2quant.ground.units import size
    from k2quant.nano.demo import CLASSES, STEPS

    full = sum(path.stat().st_size for path in (folder / STEPS[0].folder).glob("*.safetensors"))
    columns = [
        Column(head="conversion", left=True),
        Column(head="size"),
        Column(head="ratio"),
        *(Column(head=name) for name in CLASSES.values()),
        Column(head="ok", style=verdict),
        Column(head="time", minor=True),
    ]
    rows = [
        (
            _arrows(each),
            size(each.nbytes),
            f"{each.nbytes / full:.2f}x",
            *each.errors,
            "NO" if each.failures else "yes",
            f"{each.seconds:.2f} s",
        )
        for each in outcomes
    ]
    click.echo(f"\nThrough every format and back:\n{table(columns, rows)}")
    click.echo("\nWhat each step promises; every weight was compared with it:")
    for each in outcomes:
        word = "NO" if each.failures else "yes"
        lines = paragraph(f"{word:<3} {_arrows(each)}: {each.step.promise}", indent="  ", hang="      ")
        click.echo(lines.replace(word, verdict(word), 1))


def _arrows(outcome: Outcome) -> str:
    """Return the formats on the way to a step's folder: `fp8>int4`."""
    return outcome.step.folder.replace("-", ">")


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


def _nano(folder: Path, steps: int | None) -> list[Item]:
    """Train nano-K2, run it in every format, and return questions that its INT4 answers right."""
    from k2quant.nano.run import run

    takes = ", about three minutes on two cores" if steps is None else ""
    click.echo(f"\nnano-K2: training a small K2 from nothing{takes} ...")
    with training("training") as progress:
        trained = run(folder, steps=steps, progress=progress)
    click.echo(f"{trained.parameters:,} parameters, {trained.steps} steps in {trained.seconds:.0f} s: {folder}")
    known = _compare_formats(folder)
    _exported(folder.with_name(f"{folder.name}-int4"))
    return known


def _exported(source: Path) -> None:
    """Export nano-K2 in INT4 for llama.cpp, and read it back by gguf's own code.

    Raises:
        CheckFailed: a tensor holds other values.
    """
    from k2quant.errors import CheckFailed
    from k2quant.exports import export_gguf, read_back_gguf
    from k2quant.ground.extras import install, lacking
    from k2quant.ground.units import size

    if lacking("gguf"):
        remark(f"note: without an export for llama.cpp: gguf is not installed; {install('gguf')}")
        return
    done = export_gguf(source, source.with_name(f"{source.name}.gguf"), restart=True)
    back = read_back_gguf(source, done.files)
    if back.other:
        raise CheckFailed(f"{done.file}: {len(back.other)} tensors hold other values, first {back.other[0]}")
    line = (
        f"For llama.cpp: {done.file}, {size(done.report['bytes_written'])}; gguf's own code reads the values of "
        f"{source} from all of its {back.tensors} tensors"
    )
    click.echo(f"\n{paragraph(line)}")


def _compare_formats(folder: Path) -> list[Item]:
    """Run the model in every format, print what each costs, and return what the last one knows."""
    from k2quant.nano.tour import tour

    with working("answering in every format"):
        stops = list(tour(folder))
    click.echo("\nThe same 1800 held-out items answered from packed weights:")
    click.echo(table(_COSTS, map(_costs, stops)))
    return stops[-1].score.known()


_COSTS = (
    Column(head="format", left=True),
    Column(head="shards"),
    Column(head="right"),
    Column(head="95% interval", minor=True),
    Column(head="loss, nats"),
    Column(head="more than BF16"),
    Column(head="tokens/s", minor=True),
)


def _costs(stop: Stop) -> list[str]:
    """Return a row of what nano-K2 costs in a format."""
    from k2quant.formats.known import FORMATS
    from k2quant.ground.units import size

    low, high = stop.accuracy.interval
    more = f"{stop.gap[0]:+.4f} ± {stop.gap[1]:.4f}" if FORMATS[stop.format].quantised else ""
    return [
        stop.format,
        size(stop.nbytes),
        f"{stop.accuracy.share:.1%}",
        f"{low:.1%}-{high:.1%}",
        f"{stop.score.loss[0]:.4f}",
        more,
        f"{stop.tokens_per_second:.0f}",
    ]


def _gate(folder: Path) -> bool:
    """Have lm-eval ask nano-K2 as trained and as INT4, the gate say whether INT4 is good enough; return if it could."""
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
        decided = gate(*runs)
    except (MissingExtra, Incomparable, HarnessFault) as error:
        # No lm-eval, or a nano-K2 of a few steps, which says nothing or nothing that is right.
        click.echo(paragraph(f"no verdict: {error}"))
        return False
    drift = measure_fidelity(*(folder / name for name in names), text=folder / "tasks" / TEXT)
    page = write_reports(decided, folder / "gate", fidelity=drift).html
    show(decided, page=page)
    click.echo(f"\nThe report, with pictures: {page}")
    _calibrated(folder, drift)
    return True


def _calibrated(folder: Path, rounded: Fidelity) -> None:
    """Calibrate nano-K2 on items of its training, convert it with scales that know them, and say what that buys.

    Args:
        folder: of the demo.
        rounded: how far INT4 by the plain rule drifts, on held-out items.
    """
    from k2quant.calib import calibrate
    from k2quant.conversion.convert import convert
    from k2quant.conversion.searching.gains import bought
    from k2quant.eval import measure_fidelity
    from k2quant.nano.benchmark import TEXT, TRAIN
    from k2quant.nano.demo import ROUNDED

    source, stats, place = (folder / name for name in ("nano", "nano-stats", "nano-int4-imatrix"))
    with working("calibrating"):
        data = folder / "tasks" / TRAIN
        calibrate(source, stats, data=data, samples=_ROWS, length=_ROW, restart=True)
        done = convert(source, place, to=ROUNDED.to, method="imatrix", stats=stats, restart=True)
        searched = measure_fidelity(source, place, text=folder / "tasks" / TEXT)
    drifts = (f"{each.value:.5f} ± {each.error:.5f}" for each in (rounded.kl, searched.kl))
    line = f"Calibrated, {bought(done.report)}; drift from BF16 {' -> '.join(drifts)} nats a token: {place}"
    click.echo(f"\n{paragraph(line)}")


_ROWS, _ROW = 256, 128  # tokens that calibrate nano-K2 in seconds

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


def _farewell(folder: Path, known: list[Item], *, trained: bool, judged: bool) -> None:
    """Say how the environment is entered, where it is not, and what to type on what was made."""
    from k2quant.cli.nano import ask
    from k2quant.nano.demo import ROUNDED, START

    first, int4 = folder / START, folder / ROUNDED.folder
    commands: list[tuple[object, ...]] = [
        ("inspect", folder / "nano" if trained else first),
        ("convert", "--dry-run", "--to", ROUNDED.to, first, f"{folder}-again"),
        ("verify", first, int4),
        ("report", int4),
        ("verify", "--checksums", int4),
    ]
    if judged:
        commands[-1] = ("eval", "gate", folder / "runs" / "nano", folder / "runs" / "nano-int4")
    click.echo("\nNow you:")
    entered = entering()
    if entered is not None:
        click.echo(f"  {entered}")
    for command in commands:
        click.echo(f"  {shlex.join(('k2quant', *map(str, command)))}")
    if trained:
        ask(folder / "nano-int4", known)


def entering() -> str | None:
    """Return what enters the virtual environment that this runs from, or None where `k2quant` is found without it."""
    import os
    import shutil
    import sys

    programs = Path(sys.prefix) / "bin"
    found = shutil.which("k2quant")
    if found is not None and Path(found).parent.resolve() == programs.resolve():
        return None
    if sys.prefix == sys.base_prefix or not (programs / "activate").is_file():
        return None
    script = programs / "activate"
    near = Path(os.path.relpath(script))
    return shlex.join((".", str(script if near.parts[0] == ".." else near)))
