"""`k2quant inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.places import PLACE, bandwidth, rate_said
from k2quant.cli.parts.terminal.tables import Column, paragraph, table

if TYPE_CHECKING:
    from k2quant.calib.stats.inspection import Reach, StatsInspection
    from k2quant.checking.inspection import Inspection
    from k2quant.checkpoint.remote.address import Address

_LONGEST = 200  # characters of what a config says
_SHOWN = 10  # problems that a person reads before looking for the cause


@click.command(name="inspect")
@click.argument("source", type=PLACE)
@options.follow_links()
@bandwidth()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(source: Path | Address, *, follow_links: bool, bandwidth: float | None, as_json: bool) -> None:
    """Describe the checkpoint in SOURCE: formats, counts, bytes, layers, experts, and what does not fit together.

    Exits 1 when something would stop a conversion. What is worth saying and stops none is said on stderr.

    Of the statistics of a calibration: model, data, settings, how the tokens came to the experts. All of it is read
    and checked. Exits 1 when it is not finished.

    \b
    Example:
        k2quant inspect Kimi-K2-Instruct
        k2quant inspect hf://moonshotai/Kimi-K2-Instruct
    """
    import json

    from k2quant.calib.stats.inspection import is_stats
    from k2quant.checking.inspection import inspect
    from k2quant.cli.parts.screen import warn, working

    if isinstance(source, Path) and is_stats(source):
        _of_statistics(source, as_json=as_json)
        return
    with working(f"reading the headers of {source.name}"):
        found = inspect(source, follow_links=follow_links)
    for text in found.remarks:
        warn(f"note: {text}")
    if as_json:
        click.echo(json.dumps({**_facts(found), "rows": [row._asdict() for row in found.rows]}, indent=1))
    else:
        _show(found)
        _show_traffic(found, bandwidth)
    if found.problems:
        raise SystemExit(1)


def _facts(found: Inspection) -> dict[str, Any]:
    """Return what was found, as JSON has it; of a network only where there is one."""
    facts = found._asdict()
    return {key: value for key, value in facts.items() if key not in {"traffic", "rate"} or value is not None}


def _show_traffic(found: Inspection, bandwidth: float | None) -> None:
    """Say what reading all of a checkpoint takes that is at an address; `bandwidth`: bytes a second, if named."""
    from k2quant.ground.units import duration, size

    rate = bandwidth or found.rate
    if found.traffic is None or rate is None:
        return
    said = f"to read it all: {size(found.traffic)} of traffic, about {duration(found.traffic / rate)} at "
    click.echo(paragraph(said + rate_said(rate, asked=bandwidth is not None), hang="  "))


def _of_statistics(folder: Path, *, as_json: bool) -> None:
    import json

    from k2quant.calib.stats.inspection import inspect_stats
    from k2quant.cli.parts.screen import working

    with working(f"reading the statistics in {folder.name}"):
        found = inspect_stats(folder)
    if as_json:
        parts = {"data": [row._asdict() for row in found.data]}
        reach = {"reach": {part: reach._asdict() for part, reach in found.reach.items()}}
        click.echo(json.dumps({**found._asdict(), **parts, **reach}, indent=1))
    else:
        _show_statistics(found)
    if not found.finished:
        raise SystemExit(1)


def _show_statistics(found: StatsInspection) -> None:
    from k2quant.errors import printable
    from k2quant.ground.units import counted, size

    sizes = found.sizes
    state = counted(found.layers, "layer")
    if not found.finished:
        state = f"not finished, {found.layers_done} of {state} done"
    experts = f"{counted(sizes['n_routed_experts'], 'expert')} a layer, {sizes['num_experts_per_tok']} of them a token"
    hessians = "with Hessians" if found.hessians else "without Hessians"
    said = f"{found.folder}: statistics of a calibration, {state}, {experts}, {size(found.nbytes)}, {hessians}"
    click.echo(paragraph(said) + "\n")
    rows = [(row.part, f"{row.documents:,}", f"{row.rows:,}", f"{row.tokens:,}") for row in found.data]
    click.echo(table(_DATA, rows) + "\n")
    settings = ", ".join(f"{key} {value}" for key, value in found.settings.items())
    click.echo(
        paragraph(f"settings: {printable(settings) or 'none'}; measured by {printable(found.version)}", hang="  ")
    )
    for part, reach in found.reach.items():
        click.echo(paragraph(f"{part}: {_reached(reach)}", hang="  "))
    if found.fingerprint is None:
        click.echo("run the same `k2quant calibrate` again: it resumes")
    else:
        click.echo(f"fingerprint: {found.fingerprint}")


def _reached(reach: Reach) -> str:
    from k2quant.ground.units import counted

    return (
        f"an expert has {reach.mean:,.0f} tokens on average; the thinnest, {reach.thinnest}, has {reach.least:,}; "
        f"{counted(reach.empty, 'expert') if reach.empty else 'none'} of {reach.experts:,} "
        f"{'has' if reach.empty <= 1 else 'have'} no token"
    )


_DATA = (Column(head="part", left=True), *(Column(head=head) for head in ("documents", "rows", "tokens")))


def _show(found: Inspection) -> None:
    from k2quant.ground.units import counted, size

    said = (
        f"{found.folder}: {found.model_type or 'no config'}, {size(found.nbytes)} in "
        f"{counted(found.tensors, 'tensor')} and {counted(found.shards, 'shard')}, "
        f"{counted(found.layers, 'layer')}, {counted(found.experts, 'expert')} a layer"
    )
    click.echo(paragraph(said) + "\n")
    rows = [
        (row.tensor_class, row.format, f"{row.tensors:,}", f"{row.weights:,}", size(row.nbytes)) for row in found.rows
    ]
    click.echo(table(_COLUMNS, rows) + "\n")
    block = found.quantization
    click.echo(paragraph(f"quantization_config: {_summary(block) if block else 'none'}", hang="  "))
    if found.unlisted:
        click.echo(
            f"in shards but not in the index: {counted(len(found.unlisted), 'tensor')}, such as {found.unlisted[0]}"
        )
    if found.stale:
        copies = counted(len(found.stale), "old copy", "old copies")
        click.echo(f"in shards where the index does not look for them: {copies}, such as {found.stale[0]}")
    for problem in found.problems[:_SHOWN]:
        click.echo(paragraph(f"problem: {problem}", hang="  "))
    if len(found.problems) > _SHOWN:
        click.echo(f"... and {len(found.problems) - _SHOWN} more problems")


_COLUMNS = (
    Column(head="class", left=True),
    Column(head="format", left=True),
    *(Column(head=head) for head in ("tensors", "weights", "bytes")),
)


def _summary(block: dict[str, object]) -> str:
    from k2quant.errors import printable

    parts = [str(block.get("quant_method"))]
    parts += [f"{key} {block[key]}" for key in ("quant_algo", "format", "weight_block_size") if key in block]
    parts += ["kv_cache_scheme"] if block.get("kv_cache_scheme") else []
    ignore = block.get("ignore")
    said = printable(", ".join(parts))[:_LONGEST]
    return said + (f", {len(ignore)} ignored" if isinstance(ignore, list) else "")
