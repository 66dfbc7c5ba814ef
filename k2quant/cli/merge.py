"""`k2quant merge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import conversion
from k2quant.cli.parts.results import suggest
from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.tables import Column

if TYPE_CHECKING:
    from k2quant.merge.figures import ClassSum

_MOST = 0.5  # a share above which a loss is worth a remark


@click.command(name="merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@conversion.format_options()
@conversion.run_options()
def command(
    base: Path,
    adapter: Path,
    destination: Path,
    *,
    dry_run: bool,
    as_json: bool,
    shard_size: str | None,
    **options: Any,
) -> None:
    """Merge a LoRA adapter of PEFT into the checkpoint in BASE and write the whole of it to DESTINATION.

    ADAPTER is the folder that save_pretrained of PEFT wrote; BASE may be in any format that inspect knows. Says at the
    end what rounding left of the update. The same command after a kill resumes.

    \b
    Example:
        k2quant merge Kimi-K2-Thinking my-adapter Kimi-K2-Mine --to int4
    """
    options["shard_size"] = conversion.shard_bytes(shard_size)
    options["recipe"] = conversion.read_once(options["recipe"])
    if dry_run:
        _dry_run(base, adapter, destination, as_json=as_json, **options)
    else:
        _merge(base, adapter, destination, as_json=as_json, **options)


def _merge(base: Path, adapter: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    import json

    from k2quant.cli.parts.screen import progress, warn
    from k2quant.merge import merge
    from k2quant.merge.figures import by_class

    with progress(f"{base.name} with {adapter.name} to {conversion.target(options)}") as show:
        done = merge(base, adapter, destination, progress=show, **options)
    conversion.announce(done)
    rows = by_class(done.report["tensors"])
    if as_json:
        merged = [row.summary() for row in rows]
        click.echo(json.dumps(conversion.summary(done, destination) | {"merged": merged}))
        return
    click.echo(table(rows))
    for row in rows:
        if row.figures.lost_share > _MOST:
            warn(_loss(row))
    click.echo(conversion.last_line(done, destination))
    suggest(("k2quant", "report", destination), ("k2quant", "verify", "--checksums", destination))


def _loss(row: ClassSum) -> str:
    """Say that most of an update is gone, and why if that was measured."""
    figures = row.figures
    why = ""
    if figures.groups_below_half_step > _MOST * figures.groups:
        share = figures.groups_below_half_step / figures.groups
        why = f"; in {share:.0%} of the groups it is smaller than half a step"
    return f"{row.kind}: {figures.lost_share:.0%} of the update's energy was lost to rounding{why}"


def table(rows: list[ClassSum]) -> str:
    """Return what became of the update: a line for each class of tensors."""
    return tables.table(_COLUMNS, map(_row, rows))


_COLUMNS = (
    Column(head="class", left=True),
    *(Column(head=head) for head in ("tensors", "|D|", "cosine", "|E|/|D|", "lost", "codes changed")),
)


def _row(row: ClassSum) -> tuple[str, ...]:
    figures = row.figures
    return (
        row.kind,
        f"{row.tensors:,}",
        f"{figures.norm:.4g}",
        f"{figures.cosine:.4f}",
        f"{figures.ratio:.3f}",
        f"{figures.lost_share:.1%}",
        f"{figures.changed_share:.1%}",
    )


def _dry_run(base: Path, adapter: Path, destination: Path, *, as_json: bool, **options: Any) -> None:
    from k2quant.cli.parts.screen import working
    from k2quant.conversion.resume import refuse_nested
    from k2quant.ground.pool import checked_workers
    from k2quant.merge import make_merge_plan

    refuse_nested(base, destination)
    refuse_nested(adapter, destination)
    choice = conversion.choice(options)
    with working(f"reading the headers of {base.name}"):
        prepared = make_merge_plan(base, adapter, choice, follow_links=options["follow_links"])
    workers = checked_workers(options["workers"])
    conversion.dry_run(
        prepared.plan,
        destination,
        restart=options["restart"],
        workers=workers,
        as_json=as_json,
        peak_memory=prepared.peak_memory(workers),
        more={"merged": len(prepared.changes), "merged_by_class": _counts(prepared.changes)},
        marks=dict.fromkeys(prepared.changes, "merged"),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Count tensors by their class, in the usual order."""
    from k2quant.ground.names import TENSOR_CLASSES, tensor_class

    found = Counter(map(tensor_class, names))
    return {kind: found[kind] for kind in TENSOR_CLASSES if kind in found}
