"""`k2quant calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.data import check_data, data_options
from k2quant.cli.parts.results import suggest
from k2quant.cli.parts.terminal.tables import paragraph

if TYPE_CHECKING:
    from k2quant.calib import Calibration, CalibrationPlan


@click.command(name="calibrate")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("stats", type=click.Path(path_type=Path))
@data_options(required=True)
@click.option(
    "--hessians",
    is_flag=True,
    help="Also sum products of all pairs of columns, by which convert judges; gptq sums its own.",
)
@options.device(more="Where layers compute: cpu, cuda or cuda:N.", others=("cpu",))
@click.option("--dry-run", is_flag=True, help="Print what it would cost, write nothing; exit 1 if it does not fit.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left in STATS.")
@options.follow_links()
@options.soft_lock()
@options.trust_remote_code()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(source: Path, stats: Path, *, dry_run: bool, as_json: bool, memory: str, **options: Any) -> None:
    """Run data through the checkpoint in SOURCE and write to STATS what goes into each of its matrices.

    One layer at a time, in any format; STATS is what `convert --method imatrix` asks for. The documents of --data are
    parted by their hashes: eight tenths are measured, a tenth judges, a tenth is kept. The same command after a kill
    resumes; on a finished STATS it says so and does nothing.

    \b
    Examples:
        k2quant calibrate Kimi-K2-Instruct stats --data chats.jsonl --dry-run
        k2quant calibrate Kimi-K2-Instruct stats --data chats.jsonl
    """
    from k2quant.ground.extras import need
    from k2quant.ground.units import parse_size

    need("run", "`k2quant calibrate`")
    options["memory"] = parse_size(memory)
    check_data(source, options, tokenizer=not dry_run)
    if dry_run:
        _dry_run(source, stats, as_json=as_json, options=options)
    else:
        _calibrate(source, stats, as_json=as_json, options=options)


def _calibrate(source: Path, stats: Path, *, as_json: bool, options: dict[str, Any]) -> None:
    import gc
    import json

    gc.enable()  # the command line runs without; a pass makes garbage
    from k2quant.calib import calibrate, coverage_of, open_stats  # only now: it loads torch and transformers
    from k2quant.cli.parts.screen import remark, staged_tokens
    from k2quant.ground.units import counted
    from k2quant.model.generation import silence

    silence()
    with staged_tokens("loading") as (show, stage):
        done = calibrate(source, stats, progress=show, stage=stage, **options)
    if done.resumed:
        remark(f"resumed: {counted(done.resumed, 'layer')} finished before")
    found = open_stats(stats)
    coverage = coverage_of(found)
    if as_json:
        click.echo(json.dumps(_summary(done, found.fingerprint) | {"coverage": coverage.as_json()}))
        return
    for line in (_last_line(done), *coverage.lines()):
        click.echo(paragraph(line))
    linked = ("--follow-links",) if options["follow_links"] else ()
    suggest(
        ("k2quant", "convert", "--to", "int4", "--method", "imatrix", "--stats", stats, *linked, source, "DST"),
        ("k2quant", "report", stats),
    )


def _summary(done: Calibration, fingerprint: str) -> dict[str, Any]:
    """Return what a run came to, as JSON has it."""
    data = {
        name: {"documents": len(part.hashes), "tokens": part.count, "rows": len(part.tokens)}
        for name, part in done.samples.parts.items()
    }
    return {
        "stats": str(done.folder),
        "already_done": done.already_done,
        "resumed": done.resumed,
        "seconds": done.seconds,
        "fingerprint": fingerprint,
        "data": data,
        "notes": list(done.samples.notes()),
    }


def _last_line(done: Calibration) -> str:
    """Return what a run came to, as people read it."""
    from k2quant.ground.units import counted, duration

    if done.already_done:
        return f"{done.folder}: already finished, nothing to do"
    measured, judging = done.samples.train, done.samples.validation
    return (
        f"{done.folder}: {measured.count:,} tokens of {counted(len(measured.hashes), 'document')}, and "
        f"{judging.count:,} that judge, in {duration(done.seconds)}"
    )


def _dry_run(source: Path, stats: Path, *, as_json: bool, options: dict[str, Any]) -> None:
    import json
    from dataclasses import asdict

    from k2quant.calib import plan_calibration
    from k2quant.cli.parts.screen import working

    asked = {name: options[name] for name in ("samples", "length", "hessians", "memory", "device", "follow_links")}
    with working(f"planning {source.name}"):
        plan = plan_calibration(source, stats, **asked)
    if as_json:
        click.echo(json.dumps(asdict(plan) | {"fits": plan.fits}))
    else:
        for line in _lines(plan):
            click.echo(paragraph(line, hang=" " * 17))
    if not plan.fits:
        raise SystemExit(1)


def _lines(plan: CalibrationPlan) -> list[str]:
    """Return a plan as people read it."""
    from k2quant.ground.units import counted, duration, size

    passes = plan.passes
    short = "" if plan.fits else ", TOO SMALL"
    often = "once" if passes.chunk >= plan.experts else counted(passes.waves, "time")
    chunk = f"{counted(passes.chunk, 'expert')} at a time, each read {often} a layer"
    kept = "all kept in memory" if passes.budget >= passes.hidden else f"{size(passes.budget)} of it kept in memory"
    facts = {
        "tokens": f"{plan.tokens:,} to measure, {plan.judging:,} that judge, if the data has as many",
        "an expert": f"sees {plan.mean:,.0f} tokens in the mean, and one with {plan.thin / plan.mean:.0%} of the mean "
        f"{plan.thin:,.0f}; its inputs have {plan.hidden:,} columns, {plan.inner:,} of down_proj",
        "statistics": size(plan.stats_bytes),
        "hidden states": f"{size(passes.hidden)}, {kept}; on the disk twice, of two layers, while it runs",
        "disk needed": size(plan.disk_needed) + short,
        "disk free": size(plan.disk_free),
        "memory": f"at most {size(passes.memory)}; {size(passes.least)} is the least that works; {chunk}",
        "read": size(plan.bytes_read),
        "time": f"about {duration(plan.seconds)} here: {plan.rate / 1e9:,.3g} billion multiplications a second and "
        f"{size(plan.reading)}/s of the checkpoint, measured just now",
    }
    return [f"{name:<16} {text}" for name, text in facts.items()]
