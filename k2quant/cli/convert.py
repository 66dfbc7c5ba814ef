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
@click.option("--shard-size", metavar="SIZE", help="Largest output shard, such as 5GB; default: the source's shards.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; default: one for each core.")
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
    r"""Convert the checkpoint in SOURCE and write it to DESTINATION.

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
    if done.resumed:
        remark(f"resumed: {done.resumed} shards were finished before")
    report = done.report
    if as_json:
        summary = {key: value for key, value in report.items() if key not in {"tensors", "source"}}
        click.echo(json.dumps({"destination": str(destination), "already_done": done.already_done, **summary}))
    elif done.already_done:
        click.echo(f"{destination}: already finished, nothing to do")
    else:
        ratio = report["bytes_written"] / max(report["bytes_read"], 1)
        click.echo(
            f"{destination}: {size(report['bytes_read'])} -> {size(report['bytes_written'])} ({ratio:.2f}x) "
            f"in {duration(report['seconds'])}, {size(report['bytes_read'] / report['seconds'])}/s"
        )


def _dry_run(source: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.convert import available_cores
    from k2quant.estimate import estimate
    from k2quant.plan import Options, describe, make_plan
    from k2quant.units import duration, size

    choice = Options(options["to"], options["scope"], tuple(options["ignore"]), options["grid"], options["shard_size"])
    plan = make_plan(open_checkpoint(source), choice)
    cost = estimate(plan, destination, workers=options["workers"] or available_cores())
    if as_json:
        click.echo(
            json.dumps({**cost._asdict(), "fits": cost.fits, "shards": len(plan.shards), "work": describe(plan)})
        )
    else:
        for kind, row in describe(plan).items():
            click.echo(f"{kind:<16} " + ", ".join(f"{count} {what}" for what, count in row.items()))
        click.echo(f"{'read':<16} {size(cost.bytes_read)}")
        click.echo(f"{'written':<16} {size(cost.bytes_written)} in {len(plan.shards)} shards")
        click.echo(f"{'free disk':<16} {size(cost.disk_free)}" + ("" if cost.fits else ", TOO SMALL"))
        click.echo(f"{'peak memory':<16} {size(cost.peak_memory)}")
        click.echo(f"{'time':<16} about {duration(cost.seconds)}")
    if not cost.fits:
        raise SystemExit(1)
