"""`k2quant export mlx`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import conversion
from k2quant.cli.parts.places import PLACE, Place, remote_options
from k2quant.cli.parts.results import suggest
from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.tables import Column

if TYPE_CHECKING:
    from k2quant.exports import MlxExport


@click.command(name="mlx")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE)
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Most bytes of tensors in a shard, such as 5GB, which is the default; a larger stack of experts has its own.",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one for each core.")
@remote_options()
@conversion.begin_options()
def command(
    source: Place,
    destination: Place,
    *,
    dry_run: bool,
    as_json: bool,
    shard_size: str | None,
    bandwidth: float | None,
    **options: Any,
) -> None:
    """Write the checkpoint in SOURCE to DESTINATION as mlx-lm loads it without a transform.

    Codes of INT4, MXFP4 and NVFP4 go over as they are; FP8 becomes BF16. The vision tower of K2.5 is not written. The
    same command after a kill resumes; on a finished DESTINATION it says so and does nothing.

    \b
    Example:
        k2quant export mlx Kimi-K2-Thinking kimi-k2-thinking-mlx
    """
    options["shard_size"] = conversion.shard_bytes(shard_size)
    if dry_run:
        _dry_run(source, destination, as_json=as_json, bandwidth=bandwidth, **options)
    else:
        _export(source, destination, as_json=as_json, **options)


def _export(source: Place, destination: Place, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.cli.parts.screen import progress, remark, warn
    from k2quant.exports import export_mlx
    from k2quant.ground.units import counted

    with progress(f"{source.name} to {destination.name}") as show:
        done = export_mlx(source, destination, progress=show, **options)
    if not done.already_done:
        for each in done.report["remarks"]:
            warn(f"note: {each}")
    if done.resumed:
        remark(f"resumed: {counted(done.resumed, 'shard')} finished before")
    if as_json:
        report = {key: value for key, value in done.report.items() if key not in {"tensors", "source"}}
        click.echo(json.dumps({"destination": str(done.folder), "already_done": done.already_done, **report}))
        return
    if not done.already_done:
        click.echo(_table(done.report["modes"]))
    click.echo(_last_line(done))
    suggest(("mlx_lm.chat", "--model", done.folder, "--trust-remote-code"))


def _last_line(done: MlxExport) -> str:
    from k2quant.ground.units import duration, size

    report = done.report
    if done.already_done:
        return f"{done.folder}: already finished, nothing to do"
    ratio = report["bytes_written"] / max(report["bytes_read"], 1)
    rate = "" if done.resumed else f", {size(report['bytes_read'] / max(report['seconds'], 1e-6))}/s"
    return (
        f"{done.folder}: {size(report['bytes_read'])} -> {size(report['bytes_written'])} ({ratio:.2f}x) "
        f"in {duration(report['seconds'])}{rate}"
    )


_COLUMNS = (
    Column(head="class", left=True),
    Column(head="is", left=True),
    Column(head="becomes", left=True),
    Column(head="tensors"),
    Column(head="bytes"),
)


def _table(rows: list[dict[str, Any]]) -> str:
    """Return what becomes of what: a line for each class of tensors and mode."""
    from k2quant.ground.units import size

    return tables.table(
        _COLUMNS,
        [(row["kind"], row["source"], row["mode"], f"{row['tensors']:,}", size(row["nbytes"])) for row in rows],
    )


def _dry_run(
    source: Place,
    destination: Place,
    *,
    as_json: bool,
    bandwidth: float | None,
    restart: bool,
    shard_size: int | None,
    follow_links: bool,
    **_others: Any,
) -> None:
    """Print what an export would write, and what the disk must have free; exit 1 if it is too small."""
    import json

    from k2quant.cli.parts import places
    from k2quant.cli.parts.screen import warn, working
    from k2quant.cli.parts.terminal.tables import paragraph
    from k2quant.conversion.places import coming
    from k2quant.exports import look_ahead_mlx
    from k2quant.ground.units import counted, size

    with working(f"reading headers of {source.name}"):
        plan, done, room = look_ahead_mlx(
            source, destination, shard_size=shard_size, restart=restart, follow_links=follow_links
        )
    export, fits = plan.export, room.needed <= room.free
    remote = coming(export, done, bandwidth=bandwidth)
    for each in export.remarks:
        warn(f"note: {each}")
    if as_json:
        facts = {
            "bytes_read": export.bytes_read,
            "bytes_written": plan.size,
            "disk_needed": room.needed,
            "disk_free": room.free,
            "fits": fits,
            "modes": [row._asdict() for row in plan.rows],
            "fallback": dict(plan.fallback),
            "shards": len(export.shards),
            "shards_done": len(done),
            "remarks": list(export.remarks),
        }
        click.echo(json.dumps(facts | ({} if remote is None else {"source": remote._asdict()})))
    else:
        click.echo(_table([row._asdict() for row in plan.rows]))
        lines = {
            "read": size(export.bytes_read),
            "written": f"{size(plan.size)} in {counted(len(export.shards), 'shard')}, {len(done)} of them done",
            **({} if remote is None else places.lines(remote, asked=bandwidth is not None)),
            "disk needed": size(room.needed) + ("" if fits else ", TOO SMALL"),
            "disk free": size(room.free),
        }
        for name, text in lines.items():
            click.echo(paragraph(f"{name:<16} {text}", hang=" " * 17))
    if not fits:
        raise SystemExit(1)
