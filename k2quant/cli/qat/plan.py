"""`k2quant qat plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts.options import check_early, follow_links, trust_remote_code
from k2quant.cli.parts.screen import warn, working
from k2quant.cli.parts.terminal.tables import paragraph

if TYPE_CHECKING:
    from k2quant.qat.job import Job
    from k2quant.qat.planning import JobPlan
    from k2quant.qat.training.stepping import Timing


_SMALL = 2e11
"""Work of a step up to which it is taken unasked: some seconds of a core or two."""


@click.command(name="plan")
@click.argument("job", metavar="JOB.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="That will train.")
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Take a few steps to say how long the training will take; unasked, that is done for small models.",
)
@click.option(
    "--show", type=click.IntRange(1, 1000), metavar="N", help="Show the first N examples, and what of them is learnt."
)
@follow_links()
@trust_remote_code()
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    job: Path,
    *,
    processes: int,
    measure: bool | None,
    show: int | None,
    follow_links: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Say what JOB.yaml would train, what memory and time that takes, and whether its result could be saved.

    Nothing is written, and of the model only headers and a few weights are read; all of it for --measure, which takes
    a few steps and throws them away. Ends with an error if no routed expert would be fake-quantised. An output that
    `train` would be refused stops no plan; it is warned of.

    With --show the first examples are printed as the model will read them, special tokens too, with what is learnt in
    green, or between marks where there are no colours.

    \b
    Examples:
        k2quant qat plan job.yaml
        k2quant qat plan job.yaml --show 3
    """
    from k2quant.ground.extras import need

    need("qat", "`k2quant qat plan`")
    from k2quant.qat.job import check_data, check_folders, read_job

    read = read_job(job, trust_remote_code=trust_remote_code, follow_links=follow_links)
    check_folders(read)
    check_data(read)
    check_early(Path(read.model), follow_links=follow_links)
    examples = _examples(read, show, as_json=as_json)
    with working(f"planning {job.name}"):
        from k2quant.qat.planning import plan_job  # only now: it loads torch

        plan = plan_job(read, processes=processes)
    if plan.obstacle:
        warn(f"warning: {_refusal(plan.obstacle)}")
    timing = _timing(read, plan, measure)
    if as_json:
        import json

        time = timing and timing._asdict()
        click.echo(json.dumps(_facts(plan) | {"time": time} | examples, indent=1))
        return
    for line in [*_lines(plan, steps=read.training.steps), f"{'time':<20} {_time(timing, read.training.steps)}"]:
        click.echo(paragraph(line, hang=" " * 21))


def _examples(job: Job, count: int | None, *, as_json: bool) -> dict[str, Any]:
    """Show the first examples, before anything else can go wrong; or return them for JSON."""
    if count is None:
        return {}
    from k2quant.cli.qat.examples import facts_of, lines_of
    from k2quant.qat.showing import first_examples

    found = first_examples(job, count)
    if as_json:
        return {"examples": facts_of(found)}
    colour = click.get_current_context().color
    colour = sys.stdout.isatty() if colour is None else colour
    for line in lines_of(found, length=job.data.length, colour=colour):
        click.echo(line)
    return {}


def _timing(job: Job, plan: JobPlan, measure: bool | None) -> Timing | None:  # noqa: FBT001  the option's own three
    """Take some steps, if that is asked for, or costs little; what goes wrong unasked is a warning."""
    if plan.processes > 1 and measure:
        raise click.UsageError("--measure takes its steps in one process, and says nothing of several")
    small = plan.work <= _SMALL and plan.processes == 1
    if measure is False or not (measure or small):
        return None
    import gc

    from k2quant.errors import K2QuantError
    from k2quant.qat.training.stepping import time_job

    gc.enable()  # the command line runs without; a training makes cycles at every step
    try:
        return time_job(job)
    except K2QuantError as error:
        if measure:
            raise
        warn(f"warning: no step could be taken to tell the time: {error}")
        return None


def _time(timing: Timing | None, steps: int) -> str:
    from k2quant.ground.units import counted, duration

    if timing is None:
        return "not measured: --measure takes a few steps to tell"
    measured = f", {duration(timing.evaluation)} a measurement" if timing.evaluation else ""
    return (
        f"about {duration(timing.whole)} here: {counted(steps, 'step')} of {duration(timing.step)}{measured}; from "
        f"{counted(timing.taken, 'step')} just now"
    )


def _facts(plan: JobPlan) -> dict[str, Any]:
    from dataclasses import asdict

    covered = {kind: {"quantised": some, "weights": all_} for kind, (some, all_) in plan.coverage.items()}
    return asdict(plan) | {"coverage": covered, "bytes_needed": plan.bytes_needed, "disk_needed": plan.disk_needed}


def _lines(plan: JobPlan, *, steps: int) -> list[str]:
    from k2quant.ground.units import size

    some, whole = (sum(counts) for counts in zip(*plan.coverage.values(), strict=True))
    wide = max(len("fake-quantised"), len(f"{whole:,}"))
    lines = [f"{'weights':<20} {'fake-quantised':>{wide}} {'of':>{wide}} {'share':>7}"]
    for kind, (part, count) in [*plan.coverage.items(), ("all", (some, whole))]:
        lines.append(f"{kind:<20} {part:>{wide},} {count:>{wide},} {part / max(count, 1):>7.1%}")
    lines += ["", f"{'trained':<20} {plan.trained:>{wide},} numbers", ""]
    each = "" if plan.processes == 1 else f", on each of {plan.processes} devices"
    lines += [f"{name:<20} {size(count):>{wide}}" for name, count in plan.memory.items()]
    lines += [f"{'memory':<20} {size(plan.bytes_needed):>{wide}}{each}; activations come on top", ""]
    short = "" if plan.disk_needed <= plan.disk_free else ": TOO LITTLE"
    teacher = " and what the teacher says" if plan.teacher_bytes else ""
    disk = f"for {plan.checkpoints} checkpoints at a time{teacher}; {size(plan.disk_free)} free{short}"
    lines += [f"{'disk':<20} {size(plan.disk_needed):>{wide}} {disk}", ""]
    learnt = f"{plan.learnt:,} tokens to learn; {plan.held_out:,} rows held out"
    lines += [
        f"{'data':<20} {plan.pieces:,} pieces of text in {plan.rows:,} rows, {learnt}",
        *_conversations(plan),
        f"{'epochs':<20} {plan.epochs:.2f}",
        f"{'export':<20} {size(plan.export_bytes)}; tried on {', '.join(plan.tried)}: equal bits",
    ]
    lines += [f"{'output':<20} {_output(plan, steps)}"]
    lines += [f"{'note':<20} {note}" for note in plan.notes]
    return lines


def _conversations(plan: JobPlan) -> list[str]:
    """Say what the rows with messages hold, if there are any."""
    from k2quant.ground.units import counted

    census = plan.census
    if not census.chats:
        return []
    losing = f" (in {census.losing:,} the chat template drops some)" if census.losing else ""
    said = (
        f"{census.chats:,}: {census.tools:,} with tools, {census.tool_calls:,} with calls, "
        f"{census.reasoning:,} with reasoning{losing}; {counted(census.weightless, 'message')} of weight 0"
    )
    return [f"{'conversations':<20} {said}"]


def _output(plan: JobPlan, steps: int) -> str:
    """Say what `train` would find."""
    if plan.obstacle:
        return _refusal(plan.obstacle)
    if plan.begun is None:
        return "new"
    if plan.begun == steps:
        return "holds this training, done: nothing is left for train to do"
    return f"holds this training up to step {plan.begun:,}: train goes on from there"


def _refusal(why: str) -> str:
    """Say why `train` would be refused the output, with the flags of `train`, which can do something about it."""
    from k2quant.cli.parts.flags import in_flags
    from k2quant.cli.qat.train import command as train

    return f"train would be refused the output: {in_flags(why, train)}"
