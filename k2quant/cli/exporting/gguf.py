"""`k2quant export gguf`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import conversion
from k2quant.cli.parts.options import words
from k2quant.cli.parts.places import PLACE, Place, remote_options
from k2quant.cli.parts.results import suggest
from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.tables import Column
from k2quant.formats.bf16 import Bf16

if TYPE_CHECKING:
    from collections.abc import Mapping

    from k2quant.exports import GgufExport

_MOST_SHOWN = 8  # tensors that fell back; the report has all


@click.command(name="gguf")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE, metavar="FILE.gguf")
@click.option(
    "--rest",
    type=words((Bf16.name, "f32", "q8_0")),
    help="Type of all that is no routed expert and has no codes of GGUF's; norms and routers are F32 in any case. "
    "Default: bf16.",
)
@click.option(
    "--experts",
    type=words((Bf16.name, "q8_0")),
    help="Type of routed experts in a format of which GGUF has no codes, such as FP8. Default: bf16.",
)
@click.option(
    "--fallback",
    type=words(("q8_0", Bf16.name)),
    help="Type of tensors whose codes cannot be kept, such as INT4 with a scale that is no value of FP16. Default: "
    "such a tensor is refused by name.",
)
@click.option(
    "--split-size",
    metavar="SIZE",
    help="Most bytes of tensors in a file, such as 48GB: NAME-00001-of-000NN.gguf and so on. Default: one file.",
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
    split_size: str | None,
    bandwidth: float | None,
    **options: Any,
) -> None:
    """Write the checkpoint in SOURCE as GGUF to FILE.gguf, for llama.cpp.

    Codes of INT4, MXFP4 and NVFP4 go over as they are, INT4 as Q4_0. The vision tower of K2.5 is not written. The same
    command after a kill resumes; on a finished FILE.gguf it says so and does nothing.

    \b
    Example:
        k2quant export gguf Kimi-K2-Thinking kimi-k2-thinking.gguf
        k2quant export gguf Kimi-K2-Instruct kimi-k2-instruct.gguf --experts q8_0 --rest q8_0 --split-size 48GB
    """
    from k2quant.ground.units import parse_size

    options["split_size"] = None if split_size is None else parse_size(split_size)
    if dry_run:
        _dry_run(source, destination, as_json=as_json, bandwidth=bandwidth, **options)
    else:
        _export(source, destination, as_json=as_json, **options)


def _export(source: Place, destination: Place, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.cli.parts.screen import progress, remark, warn
    from k2quant.exports import export_gguf
    from k2quant.ground.units import counted

    with progress(f"{source.name} to {destination.name}") as show:
        done = export_gguf(source, destination, progress=show, **options)
    if not done.already_done:
        for each in done.report["remarks"]:
            warn(f"note: {each}")
    if done.resumed:
        remark(f"resumed: {counted(done.resumed, 'part')} finished before")
    if as_json:
        report = {key: value for key, value in done.report.items() if key not in {"tensors", "source"}}
        click.echo(json.dumps({"destination": str(done.file), "already_done": done.already_done, **report}))
        return
    if not done.already_done:
        click.echo(_table(done.report["types"]))
        _say_fallback(done.report["fallback"])
    click.echo(_last_line(done, destination))
    suggest(("llama-server", "-m", done.file), ("llama-cli", "-m", done.file, "-p", "..."))


def _last_line(done: GgufExport, destination: Place) -> str:
    from k2quant.ground.units import counted, duration, size

    report = done.report
    if done.already_done:
        return f"{destination}: already finished, nothing to do"
    ratio = report["bytes_written"] / max(report["bytes_read"], 1)
    rate = "" if done.resumed else f", {size(report['bytes_read'] / max(report['seconds'], 1e-6))}/s"
    files = "" if len(done.files) == 1 else f" in {counted(len(done.files), 'file')}"
    return (
        f"{done.file}: {size(report['bytes_read'])} -> {size(report['bytes_written'])}{files} ({ratio:.2f}x) "
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
    """Return what becomes of what: a line for each class of tensors and type."""
    from k2quant.ground.units import size

    return tables.table(
        _COLUMNS,
        [(row["kind"], row["source"], row["type"], f"{row['tensors']:,}", size(row["nbytes"])) for row in rows],
    )


def _say_fallback(why: Mapping[str, str]) -> None:
    """Name the tensors that are not in the type of their codes, or that was asked for."""
    from k2quant.cli.parts.terminal.tables import paragraph
    from k2quant.ground.units import counted

    for name, reason in list(why.items())[:_MOST_SHOWN]:
        click.echo(paragraph(f"{name}: {reason}", hang="  "))
    if len(why) > _MOST_SHOWN:
        click.echo(f"and {counted(len(why) - _MOST_SHOWN, 'tensor')} more, which the report names")


def _dry_run(
    source: Place,
    destination: Place,
    *,
    as_json: bool,
    bandwidth: float | None,
    restart: bool,
    workers: int | None,
    follow_links: bool,
    **options: Any,
) -> None:
    """Print what an export would write, and what the disk must have free; exit 1 if it is too small."""
    import json

    from k2quant.cli.parts import places
    from k2quant.cli.parts.screen import warn, working
    from k2quant.cli.parts.terminal.tables import paragraph
    from k2quant.conversion.places import coming
    from k2quant.exports import look_ahead_gguf
    from k2quant.ground.units import counted, size

    asked = {name: options[name] for name in ("rest", "experts", "fallback", "split_size")}
    with working(f"reading headers and scales of {source.name}"):
        plan, done, room = look_ahead_gguf(
            source, destination, restart=restart, workers=workers, follow_links=follow_links, **asked
        )
    remote = coming(plan.export, done, bandwidth=bandwidth)
    fits = room.needed <= room.free
    for each in plan.export.remarks:
        warn(f"note: {each}")
    if as_json:
        facts = {
            "bytes_read": plan.export.bytes_read,
            "bytes_written": plan.size,
            "disk_needed": room.needed,
            "disk_free": room.free,
            "fits": fits,
            "types": [row._asdict() for row in plan.rows],
            "fallback": dict(plan.fallback),
            "files": {file.name: {"size": file.size} for file in plan.files},
            "parts": len(plan.export.shards),
            "parts_done": len(done),
            "remarks": list(plan.export.remarks),
        }
        click.echo(json.dumps(facts | ({} if remote is None else {"source": remote._asdict()})))
    else:
        click.echo(_table([row._asdict() for row in plan.rows]))
        _say_fallback(plan.fallback)
        files, parts = counted(len(plan.files), "file"), counted(len(plan.export.shards), "part")
        lines = {
            "read": size(plan.export.bytes_read),
            "written": f"{size(plan.size)} in {files}, {parts}, {len(done)} of them done",
            **({} if remote is None else places.lines(remote, asked=bandwidth is not None)),
            "disk needed": size(room.needed) + ("" if fits else ", TOO SMALL"),
            "disk free": size(room.free),
        }
        for name, text in lines.items():
            click.echo(paragraph(f"{name:<16} {text}", hang=" " * 17))
    if not fits:
        raise SystemExit(1)
