"""`k2quant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(name="convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["bf16", "fp8", "int4"]), required=True, help="Format to write.")
@click.option(
    "--scope",
    type=click.Choice(["experts", "linear"]),
    help="Which weights get it: the routed experts (default for int4) or every projection (default for fp8).",
)
@click.option("--ignore", multiple=True, metavar="REGEX", help="Keep weights in whose name this is found out of scope.")
@click.option(
    "--grid",
    type=click.Choice(["moonshot", "compressed-tensors"]),
    help="INT4 rounding rule: amax/7 on -7..7 (moonshot, default) or amax/7.5 on -8..7.",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Tensor bytes of a shard, such as 5GB (a larger weight gets its own); default: as the source.",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one for each core.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic runs: cpu or cuda.")
@click.option(
    "--dry-run", is_flag=True, help="Print what it would cost, write nothing; exit 1 if the disk is too small."
)
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left in DESTINATION.")
@click.option("--sha256", is_flag=True, help="Also note a sha256 of each file in the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: Path, destination: Path, *, dry_run: bool, as_json: bool, shard_size: str | None, **options: Any
) -> None:
    """Convert the checkpoint in SOURCE and write it to DESTINATION.

    The same command after a kill resumes; on a finished DESTINATION it says so and does nothing.

    \b
    Example:
        k2quant convert --to int4 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
    """
    from k2quant.units import parse_size

    options["shard_size"] = parse_size(shard_size) if shard_size else None
    if dry_run:
        _dry_run(source, destination, as_json=as_json, **options)
    else:
        _convert(source, destination, as_json=as_json, **options)


def _convert(source: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.cli.screen import progress, remark
    from k2quant.convert import convert
    from k2quant.units import duration, size

    with progress(f"{source.name} to {options['to']}") as show:
        done = convert(source, destination, progress=show, **options)
    report = done.report
    if done.resumed:
        remark(f"resumed: {done.resumed} shards were finished before")
    if report["left_out"] and not done.already_done:
        remark(f"left out, for the index does not name them: {', '.join(report['left_out'])}")
    if as_json:
        summary = {key: value for key, value in report.items() if key not in {"tensors", "source"}}
        click.echo(json.dumps({"destination": str(destination), "already_done": done.already_done, **summary}))
    elif done.already_done:
        click.echo(f"{destination}: already finished, nothing to do")
    else:
        ratio = report["bytes_written"] / max(report["bytes_read"], 1)
        rate = "" if done.resumed else f", {size(report['bytes_read'] / report['seconds'])}/s"
        click.echo(
            f"{destination}: {size(report['bytes_read'])} -> {size(report['bytes_written'])} ({ratio:.2f}x) "
            f"in {duration(report['seconds'])}{rate}"
        )


def _dry_run(source: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.convert import checked_workers, codecs_of
    from k2quant.estimate import estimate
    from k2quant.plan import Options, describe, make_plan
    from k2quant.resume import refuse_nested, standing_shards
    from k2quant.units import duration, size

    refuse_nested(source, destination)
    choice = Options(options["to"], options["scope"], options["ignore"], options["grid"], options["shard_size"])
    plan = make_plan(open_checkpoint(source), choice)
    codecs_of(options["device"])
    done = standing_shards(plan, destination, restart=options["restart"])
    cost = estimate(plan, destination, done=done, workers=checked_workers(options["workers"]))
    if as_json:
        work = {"shards": len(plan.shards), "shards_done": len(done), "work": describe(plan)}
        click.echo(json.dumps({**cost._asdict(), "fits": cost.fits, **work}))
    else:
        for kind, row in describe(plan).items():
            click.echo(f"{kind:<16} " + ", ".join(f"{count} {what}" for what, count in row.items()))
        click.echo(f"{'read':<16} {size(cost.bytes_read)}")
        click.echo(f"{'written':<16} {size(cost.bytes_written)} in {len(plan.shards)} shards, {len(done)} of them done")
        click.echo(f"{'disk needed':<16} {size(cost.disk_needed)}" + ("" if cost.fits else ", TOO SMALL"))
        click.echo(f"{'disk free':<16} {size(cost.disk_free)}")
        click.echo(f"{'peak memory':<16} {size(cost.peak_memory)}")
        click.echo(f"{'time':<16} about {duration(cost.seconds)} on the CPU")
    if not cost.fits:
        raise SystemExit(1)
