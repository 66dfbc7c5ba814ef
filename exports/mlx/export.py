"""Export a checkpoint for mlx-lm: plan, folder, stream of shards, then what makes the folder usable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.cards import CARD, LIMIT, is_ours, placed
from k2quant.checkpoint.files.paths import check_inside
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.writing import destination as writing
from k2quant.checkpoint.writing.destination import Destination
from k2quant.checkpoint.writing.target import Room
from k2quant.conversion.places import pinned
from k2quant.conversion.resume import clear, refuse_nested
from k2quant.conversion.stream import Progress, Record
from k2quant.errors import DestinationStale, UsageError
from k2quant.exports.exporting import (
    MARK,
    check_room,
    disk_errors,
    facts_of,
    fill,
    refuse_changed,
    report_of,
    standing,
)
from k2quant.exports.mlx.card import card_of
from k2quant.exports.mlx.plan import SHARD_SIZE, MlxPlan, Options, make_mlx_plan
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief

_HINTS = {
    "mlx_path": "the folder to write is the second argument, `destination`",
    "output": "the folder to write is the second argument, `destination`",
    "quantize": "the mode of each layer follows from its codes; `k2quant.convert` makes some of a checkpoint without",
    "q_bits": "the mode of each layer follows from its codes; `k2quant.convert` makes some of a checkpoint without",
    "to": "the mode of each layer follows from its codes; `k2quant.convert` makes some of a checkpoint without",
    "overwrite": "to throw away what an earlier run left is `restart=True`",
}
"""What other commands and tools have."""


class MlxExport(NamedTuple):
    """What an export for mlx-lm came to."""

    folder: Path
    """The folder that mlx-lm is given."""
    report: dict[str, Any]
    """The content of k2quant_report.json."""
    resumed: int
    """Shards that an earlier, interrupted run had finished."""
    already_done: bool
    """Whether the output was finished before, so that nothing was written."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        done = facts_of(self.report, resumed=self.resumed, already_done=self.already_done)
        return {"folder": str(self.folder), **done}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


@hinting(_HINTS)
@barred("export")
def export_mlx(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    shard_size: int | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    progress: Asked = None,
) -> MlxExport:
    """Write a checkpoint as mlx-lm loads it without a transform. Codes of INT4, MXFP4 and NVFP4 go over as they are.

    The same call after a kill resumes; on a finished destination it does nothing.

    Args:
        source: folder of the checkpoint, in any of the formats, or its address, see `k2quant.convert`. What has no
            codes of MLX's, such as FP8, becomes BF16, as mlx-lm itself makes it.
        destination: folder to write; empty, new, or of an earlier run of the same call.
        shard_size: largest shard in bytes; None: 5 GB. A stack of experts that is larger has its own.
        workers: threads; None takes one for each core that this process may use.
        follow_links: read files that links in the source lead to, wherever they lie.
        restart: throw away what an earlier run of other options or another source left.
        soft_lock: where the file system has no locks, lock by a file.
        low_disk: of a source at an address, keep at most two shards on the disk at a time.
        progress: called as the work goes on, with the bytes read and all bytes; True for a bar.

    Returns:
        the folder with its report.

    Raises:
        CheckpointError: the source cannot be exported; nothing that looks finished was written.
        OutputError: the output is not ours, in use, or the disk failed; the same call resumes.
        UsageError: the options make no sense.
    """
    there = _checked(destination)
    plan = _planned(source, there, shard_size=shard_size, restart=restart, follow_links=follow_links)
    return carry_out(
        plan,
        there,
        workers=workers,
        restart=restart,
        soft_lock=soft_lock,
        low_disk=low_disk,
        progress=told(progress),
    )


def look_ahead_mlx(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    shard_size: int | None = None,
    restart: bool = False,
    follow_links: bool = False,
) -> tuple[MlxPlan, dict[str, Record], Room]:
    """Return what an export would write, what of it stands, and what the disk must have free; write nothing.

    Args:
        source: as in `export_mlx`, as the others are.
        destination: the folder.
        shard_size: largest shard in bytes.
        restart: whether what stands there would be thrown away.
        follow_links: whether links of the source may lead out of it.

    Raises:
        CheckpointError: the source cannot be exported.
        OutputError: the output would be refused.
        UsageError: the options make no sense.
    """
    there = _checked(destination)
    plan = _planned(source, there, shard_size=shard_size, restart=restart, follow_links=follow_links)
    folder = Destination(there, report=REPORT, incomplete=INCOMPLETE)
    if not there.is_dir():
        return plan, {}, _room(plan, folder, {})
    folder.refuse_foreign(restart=restart)
    if not restart and (report := folder.finished_report()) is not None:
        check_finished(folder, report, plan)
        return plan, {shard.file: {} for shard in plan.export.shards}, folder.room({}, 0)
    done = {} if restart else _standing(plan, folder)
    return plan, done, _room(plan, folder, done)


def _checked(destination: str | os.PathLike[str] | Address) -> Path:
    """Return the path of an output.

    Raises:
        UsageError: it is an address.
    """
    there = spot(destination)
    if isinstance(there, Address):
        raise UsageError(f"{there} is no folder: export to a folder of this machine first, then upload it")
    return there


def _planned(
    source: str | os.PathLike[str] | Address, there: Path, *, shard_size: int | None, restart: bool, follow_links: bool
) -> MlxPlan:
    options = Options(SHARD_SIZE if shard_size is None else shard_size)
    begun = spot(source)
    refuse_nested(begun, there)
    here, remark = pinned(begun, there, restart=restart)
    return make_mlx_plan(open_checkpoint(here, follow_links=follow_links), options).remarked(remark)


def carry_out(
    plan: MlxPlan,
    there: Path,
    *,
    workers: int | None = None,
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> MlxExport:
    """Write what a plan says; see `export_mlx`."""
    begun = time.monotonic()
    how: dict[str, Any] = {"workers": workers, "low_disk": low_disk, "progress": progress}
    with (
        disk_errors(there),
        writing.locked(
            there, report=REPORT, incomplete=INCOMPLETE, restart=restart, soft=soft_lock, mark=MARK
        ) as folder,
    ):
        if not restart and (report := folder.finished_report()) is not None:
            check_finished(folder, report, plan)
            return MlxExport(there, report, 0, already_done=True)
        if restart:
            clear(folder)
        done = {} if restart else _standing(plan, folder)
        check_room(_room(plan, folder, done))
        if len(done) < len(plan.export.shards):
            folder.delete([CONFIG, INDEX, REPORT])  # a run that was stopped at its very end may have left them
        records = fill(plan.export, folder, folder, done=done, **how)
        own = {
            "resumed_shards": len(done),
            "modes": [row._asdict() for row in plan.rows],
            "fallback": dict(plan.fallback),
            "files": {shard.file: {"size": shard.size} for shard in plan.export.shards},
        }
        report = report_of(plan.export, records, written=plan.size, begun=begun, own=own)
        folder.sweep(records)
        _complete(folder, plan, report)
        folder.finish()
    return MlxExport(there, report, len(done), already_done=False)


def _standing(plan: MlxPlan, folder: Destination) -> dict[str, Record]:
    """Return the records of shards that stand there whole.

    Raises:
        DestinationStale: the journal is of another export.
    """
    found = standing(plan.export, folder)
    return {name: record for name, record in found.items() if folder.size(name, links=False) == record["size"]}


def _room(plan: MlxPlan, folder: Destination, done: Mapping[str, Record]) -> Room:
    missing = {shard.file: shard.size for shard in plan.export.shards if shard.file not in done}
    return folder.room(missing, plan.beside)


def check_finished(folder: Destination, report: Mapping[str, Any], plan: MlxPlan) -> None:
    """Refuse a finished folder that is not what this call would make, or is not whole any more.

    Raises:
        DestinationStale: so it is.
    """
    anew = "write it anew with `restart=True`"
    if "export" not in report:
        raise DestinationStale(
            "holds a finished conversion", file=folder.spot, remedy=f"{anew}, or name another folder"
        )
    refuse_changed(report, plan.export.identity, folder.spot, "finished")
    for name, wanted in _sizes(report["files"]):
        if name != CARD and folder.size(name) != wanted:  # whoever edits it, or throws it away, has done no harm
            found = folder.size(name)
            raise DestinationStale(
                "was finished, but is not whole any more",
                file=folder.named(name),
                expected=f"{wanted} bytes",
                found="nothing" if found is None else f"{found} bytes",
                remedy=anew,
            )


def _sizes(files: object) -> Iterable[tuple[str, object]]:
    found = files if isinstance(files, dict) else {}
    return ((name, facts.get("size") if isinstance(facts, dict) else None) for name, facts in found.items())


def _complete(folder: Destination, plan: MlxPlan, report: dict[str, Any]) -> None:
    """Write everything but the shards, config.json last."""
    source = plan.export.source
    for name, own in placed(plan.copies).items():
        check_inside(source.folder, source.folder / name, follow_links=source.follow_links)
        folder.copy(source.folder / name, own)
        report["files"][own] = folder.facts(own, sha256=False)
    found = folder.read(CARD, LIMIT)
    if folder.size(CARD) is None or (found is not None and is_ours(found)):
        card = card_of(plan)
        folder.write(CARD, card)
        report["files"][CARD] = {"size": len(card)}
    for name, data in plan.last.items():
        report["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    folder.write(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    for name, data in plan.last.items():
        folder.write(name, data)
