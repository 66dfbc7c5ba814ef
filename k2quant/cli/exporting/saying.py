"""What the exports print: of a plan, as a dry run, and when they are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.tables import Column, paragraph

if TYPE_CHECKING:
    from pathlib import Path

    from k2quant.checkpoint.writing.target import Room
    from k2quant.conversion.stream import Record
    from k2quant.exports import GgufExport, GgufPlan, MlxExport, MlxPlan

_MOST_SHOWN = 8  # tensors that fell back; the report has all

_COLUMNS = (
    Column(head="class", left=True),
    Column(head="is", left=True),
    Column(head="becomes", left=True),
    Column(head="tensors"),
    Column(head="bytes"),
)


class Terms(NamedTuple):
    """What an export calls things."""

    becomes: str
    """What it says of each tensor, such as its `type`; the report has `types`."""
    unit: str
    """What is finished one by one, such as `part`."""
    named: bool
    """Whether tensors that are not in the type of their codes are named one by one, and not in a remark."""


def say_done(done: GgufExport | MlxExport, where: Path, terms: Terms, *, files: int, as_json: bool) -> None:
    """Print what an export came to.

    Args:
        done: that.
        where: what the engine is given.
        terms: of the export.
        files: how many there are, where there may be several; else 1.
        as_json: for a machine.
    """
    from k2quant.cli.parts.screen import remark, warn
    from k2quant.ground.units import counted, duration, size

    report = done.report
    if not done.already_done:
        for each in report["remarks"]:
            warn(f"note: {each}")
    if done.resumed:
        remark(f"resumed: {counted(done.resumed, terms.unit)} finished before")
    if as_json:
        said = {key: value for key, value in report.items() if key not in {"tensors", "source"}}
        click.echo(json.dumps({"destination": str(where), "already_done": done.already_done, **said}))
        return
    if done.already_done:
        click.echo(f"{where}: already finished, nothing to do")
        return
    _say_rows(report[f"{terms.becomes}s"], report["fallback"] if terms.named else {}, terms)
    ratio = report["bytes_written"] / max(report["bytes_read"], 1)
    rate = "" if done.resumed else f", {size(report['bytes_read'] / max(report['seconds'], 1e-6))}/s"
    several = "" if files == 1 else f" in {counted(files, 'file')}"
    click.echo(
        f"{where}: {size(report['bytes_read'])} -> {size(report['bytes_written'])}{several} ({ratio:.2f}x) "
        f"in {duration(report['seconds'])}{rate}"
    )


def say_plan(
    plan: GgufPlan | MlxPlan,
    done: Mapping[str, Record],
    room: Room,
    terms: Terms,
    *,
    files: Mapping[str, int] | None,
    bandwidth: float | None,
    as_json: bool,
) -> None:
    """Print what an export would write, and what the disk must have free; exit 1 if it is too small.

    Args:
        plan: what would be written.
        done: records of what of it stands.
        room: what the disk must have, and has.
        terms: of the export.
        files: sizes by name, where parts lie in files.
        bandwidth: bytes a second of a source at an address, as was asked for.
        as_json: for a machine.
    """
    from k2quant.cli.parts import places
    from k2quant.cli.parts.screen import warn
    from k2quant.conversion.places import coming
    from k2quant.ground.units import counted, size

    export, fits = plan.export, room.needed <= room.free
    remote = coming(export, done, bandwidth=bandwidth)
    rows = [row._asdict() for row in plan.rows]
    for each in export.remarks:
        warn(f"note: {each}")
    if as_json:
        facts = {
            "bytes_read": export.bytes_read,
            "bytes_written": plan.size,
            "disk_needed": room.needed,
            "disk_free": room.free,
            "fits": fits,
            f"{terms.becomes}s": rows,
            "fallback": dict(plan.fallback),
            **({} if files is None else {"files": {name: {"size": each} for name, each in files.items()}}),
            f"{terms.unit}s": len(export.shards),
            f"{terms.unit}s_done": len(done),
            "remarks": list(export.remarks),
            **({} if remote is None else {"source": remote._asdict()}),
        }
        click.echo(json.dumps(facts))
    else:
        _say_rows(rows, plan.fallback if terms.named else {}, terms)
        within = "" if files is None else f"{counted(len(files), 'file')}, "
        parts = f"{within}{counted(len(export.shards), terms.unit)}, {len(done)} of them done"
        lines = {
            "read": size(export.bytes_read),
            "written": f"{size(plan.size)} in {parts}",
            **({} if remote is None else places.lines(remote, asked=bandwidth is not None)),
            "disk needed": size(room.needed) + ("" if fits else ", TOO SMALL"),
            "disk free": size(room.free),
        }
        for name, text in lines.items():
            click.echo(paragraph(f"{name:<16} {text}", hang=" " * 17))
    if not fits:
        raise SystemExit(1)


def _say_rows(rows: Iterable[Mapping[str, Any]], fallback: Mapping[str, str], terms: Terms) -> None:
    """Print what becomes of what, a line for each class of tensors, and which are not in the type of their codes."""
    from k2quant.ground.units import counted, size

    found = [
        (row["kind"], row["source"], row[terms.becomes], f"{row['tensors']:,}", size(row["nbytes"])) for row in rows
    ]
    click.echo(tables.table(_COLUMNS, found))
    for name, reason in list(fallback.items())[:_MOST_SHOWN]:
        click.echo(paragraph(f"{name}: {reason}", hang="  "))
    if len(fallback) > _MOST_SHOWN:
        click.echo(f"and {counted(len(fallback) - _MOST_SHOWN, 'tensor')} more, which the report names")
