"""`k2quant qat train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts.options import check_early, follow_links, soft_lock, trust_remote_code
from k2quant.cli.parts.screen import staged_training, warn
from k2quant.cli.parts.terminal.tables import paragraph

if TYPE_CHECKING:
    from k2quant.qat.run.history import Evaluation
    from k2quant.qat.run.result import Result

_CONTROL = (
    "Part of it is more training, not recovery. A control tells:\nthe same job with `training: {fake_quantize: false}`."
)


@click.command(name="train")
@click.argument("job", metavar="JOB.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left in the output folder.")
@click.option("--check", is_flag=True, help="Of a training that is done, read every byte again, not sizes and times.")
@soft_lock()
@follow_links()
@trust_remote_code()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    job: Path,
    *,
    restart: bool,
    check: bool,
    soft_lock: bool,
    follow_links: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Train what JOB.yaml says, in one process; the same command after a kill goes on from the last checkpoint.

    On several devices: accelerate launch -m k2quant.qat JOB.yaml, or torchrun in the place of accelerate.

    \b
    Example:
        k2quant qat train job.yaml
    """
    import gc

    from k2quant.ground.extras import need

    need("qat", "`k2quant qat train`")
    gc.enable()  # the command line runs without; a training makes cycles at every step
    from k2quant.qat.job import check_data, check_folders, read_job
    from k2quant.qat.run.result import finished

    read = read_job(job, trust_remote_code=trust_remote_code, follow_links=follow_links)
    check_folders(read)
    result = None if restart or check else finished(read)
    if result is None:
        check_data(read)
        check_early(Path(read.model), follow_links=follow_links)
        from k2quant.qat.training.training import train

        with staged_training("training") as (progress, stage):
            result = train(read, restart=restart, soft_lock=soft_lock, progress=progress, stage=stage)
    for note in result.notes:
        warn(f"note: {note}")
    if as_json:
        import json

        click.echo(json.dumps(_facts(result), indent=1))
        return
    _show(result, control=not read.training.fake_quantize)


def _facts(result: Result) -> dict[str, Any]:
    from dataclasses import asdict

    whole = result._asdict() | {"folder": str(result.folder), "notes": list(result.notes)}
    return whole | {"evaluation": asdict(result.evaluation) if result.evaluation else None}


def _show(result: Result, *, control: bool) -> None:
    from k2quant.ground.units import counted, duration
    from k2quant.qat.report.recovery import headline
    from k2quant.qat.run.history import HISTORY, read_end

    if result.resumed == result.steps:
        click.echo(f"{result.folder}: trained before, nothing to do")
        if result.checked == "times":
            said = "Sizes and times of its files are as they were; no byte was\nread again. --check does that."
            click.echo(paragraph(said))
    else:
        since = f" from step {result.resumed}" if result.resumed else ""
        click.echo(f"{result.folder}: {result.steps} steps{since} in {duration(result.seconds)}")
    if result.evaluation is None:
        click.echo("\nno rows were held out, so no loss was measured")
    else:
        _show_losses(result.evaluation)
        said = headline(read_end(result.folder / HISTORY), control=control)
        click.echo("\n" + paragraph(f"{said}.".replace("; ", ";\n")))
        if result.evaluation.answers is None:
            click.echo(paragraph("A share of a loss is no share of answers:\nk2quant eval gate compares those."))
        if not control:
            click.echo(paragraph(_CONTROL))
    if result.starved:
        experts = counted(result.starved, "expert")
        click.echo(paragraph(f"Too few tokens, so post-training rounding stays: {experts}; the report lists them."))
    click.echo(f"Report:     {result.folder / 'report.html'}")
    click.echo(f"Export it:  k2quant qat export {shlex.quote(str(result.folder))} DST")


def _show_losses(last: Evaluation) -> None:
    from k2quant.qat.report.recovery import percent

    answers = last.answers
    rows = [
        ("start, in BF16", last.start, answers.start if answers else None),
        ("start, rounded", last.start_rounded, answers.start_rounded if answers else None),
        ("trained, rounded", last.loss, answers.right if answers else None),
        ("trained, in BF16", last.unrounded, answers.unrounded if answers else None),
    ]
    click.echo("\nheld out            nats a token" + (f"   right of {answers.count:,} answers" if answers else ""))
    for name, loss, right in rows:
        if loss is not None:
            share = f"   {percent(right, answers.count):>7}" if answers and right is not None else ""
            click.echo(f"  {name:<18} {loss:>11.4f}{share}")
