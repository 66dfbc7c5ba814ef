"""`k2quant qat export`."""

from __future__ import annotations

from pathlib import Path

import click

from k2quant.cli.parts import conversion
from k2quant.cli.parts.options import follow_links, soft_lock, words
from k2quant.cli.parts.results import suggest
from k2quant.cli.parts.screen import progress
from k2quant.formats.known import FORMATS


@click.command(name="export")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=words(name for name, kind in FORMATS.items() if kind.trained),
    help="Format; must be the one that was trained for.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Where the model lies now that the training began with.")
@click.option(
    "--shard-size", metavar="SIZE", help="Tensor bytes of a shard, such as 5GB and at least 1MB; default: as the base."
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one for each core.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left in DST.")
@follow_links()
@soft_lock()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    run: Path,
    destination: Path,
    *,
    to: str | None,
    model: Path | None,
    shard_size: str | None,
    workers: int | None,
    restart: bool,
    follow_links: bool,
    soft_lock: bool,
    as_json: bool,
) -> None:
    """Write the last checkpoint of the training in RUN to DST, in the format that it was trained for.

    RUN may also be a job's file: then its model is written as post-training rounding has it, to compare with.

    Each weight is read back from the disk and compared with what the training's forward pass uses. If one bit differs,
    DST is never finished.

    \b
    Example:
        k2quant qat export runs/int4 K2-QAT-INT4
    """
    import json

    from k2quant.ground.extras import need

    need("qat", "`k2quant qat export`")
    from k2quant.ground.units import duration, size
    from k2quant.qat.exporting.asked import asked_job

    size_of_shards = conversion.shard_bytes(shard_size)
    asked_job(run, to=to, base=model)
    from k2quant.qat.exporting.export import export_run  # only now: it loads torch

    with progress(f"{run.name} to {destination.name}") as show:
        done = export_run(
            run,
            destination,
            to=to,
            base=model,
            shard_size=size_of_shards,
            workers=workers,
            restart=restart,
            follow_links=follow_links,
            soft_lock=soft_lock,
            progress=show,
        )
    conversion.announce(done)
    report = done.report
    if as_json:
        facts = {"destination": str(destination), "already_done": done.already_done, "weights": len(report["tensors"])}
        click.echo(json.dumps(facts | {key: report[key] for key in ("bytes_written", "seconds", "values")}))
        return
    new = f"{size(report['bytes_written'])} in {duration(report['seconds'])}"
    click.echo(
        f"{destination}: {'already finished' if done.already_done else new}; every weight equals, bit for bit, what "
        "the training's forward pass uses"
    )
    suggest(("k2quant", "report", destination), ("k2quant", "verify", "--checksums", destination))
