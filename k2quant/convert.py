"""Convert a checkpoint: plan, destination, stream of shards, then what makes the folder usable.

The order on disk is the promise: shards first, each whole before it has its name, then other files, the report, the
index, and config.json last. Until then the folder says that it is incomplete, and the same call resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from k2quant import names
from k2quant.checkpoint.destination import Destination, locked
from k2quant.checkpoint.paths import check_inside, open_regular, replacing, write_whole
from k2quant.checkpoint.reader import CONFIG, INDEX, open_checkpoint
from k2quant.checkpoint.reading import check_packed_shapes
from k2quant.errors import DestinationStale, OutputError, UsageError
from k2quant.formats.layouts import FormatName, Grid
from k2quant.plan import INCOMPLETE, REPORT, Options, Plan, make_plan
from k2quant.policy import Scope
from k2quant.stream import Progress, Record, Stream
from k2quant.version import __version__

_JOURNAL_VERSION = 1


class Conversion(NamedTuple):
    """What a conversion came to."""

    folder: Path
    report: dict[str, Any]
    """The content of k2quant_report.json."""
    resumed: int
    """Shards that an earlier, interrupted run had finished."""
    already_done: bool
    """Whether the destination was finished before, so that nothing was written."""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: FormatName,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
    restart: bool = False,
    sha256: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to BF16, block-FP8 or INT4.

    The same call after a kill resumes; on a finished destination it does nothing.

    Args:
        source: folder of the checkpoint, in any of the formats, mixed too.
        destination: folder to write; empty, new, or of an earlier run of the same call.
        to: `bf16`, `fp8` or `int4`.
        scope: `experts` (default for int4) or `linear` (default for fp8).
        ignore: regular expressions; a weight in whose name one is found stays out of scope.
        grid: INT4 rounding rule, `moonshot` (default) or `compressed-tensors`.
        shard_size: largest output shard in bytes; None keeps the source's shards.
        workers: threads; None takes one for each core that this process may use.
        device: where the arithmetic runs, `cpu` or `cuda`.
        restart: throw away what an earlier run of other options or another source left in the destination.
        sha256: also note a sha256 of each file, as hubs list them.
        progress: called as the work goes on.

    Returns:
        the destination with its report.

    Raises:
        CheckpointError: the source cannot be converted; nothing that looks finished was written.
        OutputError: the destination is not ours, in use, or the disk failed; the same call resumes.
        UsageError: the options make no sense.
    """
    begun = time.monotonic()
    here, there = Path(source), Path(destination)
    _refuse_nested(here, there)
    options = Options(to, scope, tuple(ignore), grid, shard_size)
    plan = make_plan(open_checkpoint(here), options)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot work")
    try:
        with locked(there, report=REPORT, incomplete=INCOMPLETE) as folder:
            if not restart and (report := folder.finished_report()) is not None:
                _check_finished(folder, report, plan)
                return Conversion(there, report, 0, already_done=True)
            check_packed_shapes(plan.source, (job.weight for job in plan.jobs()))
            if restart:
                _clear(folder)
            done = _begin(folder, plan, fresh=restart)
            stream = Stream(plan, folder, done=set(done), device=device, sha256=sha256, progress=progress)
            shards = done | stream.run(workers or available_cores())
            report = _report(plan, shards, seconds=time.monotonic() - begun)
            _complete(folder.folder, plan, report)
            folder.finish()
            return Conversion(there, report, len(done), already_done=False)
    except OSError as error:
        raise OutputError(
            "cannot be written",
            file=error.filename or there,
            found=error.strerror or str(error),
            remedy="when that is mended, run the same command again: it resumes",
        ) from error


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_nested(source: Path, destination: Path) -> None:
    try:
        here, there = source.resolve(), destination.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"{source} or {destination} cannot be resolved: {error}") from error
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"{source} and {destination} must be two folders, neither inside the other")


# --- whose folder is it, and how far has it come ---------------------------------------------------------------------


def _identity(plan: Plan) -> dict[str, Any]:
    """Return what must be equal for a run to continue another."""
    return {
        "options": {**plan.options._asdict(), "ignore": list(plan.options.ignore)},
        "source": plan.source.fingerprint(),
    }


def _output_files(plan: Plan) -> list[str]:
    """Return every file of the finished folder; those that make it look finished come first."""
    return [CONFIG, INDEX, REPORT, *(shard.file for shard in plan.shards), *plan.copies]


def _clear(folder: Destination) -> None:
    """Delete what an earlier conversion of ours left."""
    journal, report = folder.journal(), folder.finished_report()
    files = journal[0].get("files") if journal else list(_sizes(report)) if report is not None else None
    if isinstance(files, list):
        folder.clear([CONFIG, INDEX, REPORT, *(name for name in files if isinstance(name, str))])


def _sizes(report: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of the files that a report lists."""
    files = report.get("files")
    return {
        name: facts.get("size") if isinstance(facts, dict) else None
        for name, facts in (files.items() if isinstance(files, dict) else ())
    }


def _check_finished(folder: Destination, report: dict[str, Any], plan: Plan) -> None:
    """Refuse a finished folder that is not what this call would make, or is not whole any more."""
    changed = [key for key, value in _identity(plan).items() if report.get(key) != value]
    if changed:
        raise _stale(folder, "finished", changed)
    last = {INDEX: len(plan.index)} | ({} if plan.config is None else {CONFIG: len(plan.config)})
    for name, size in (_sizes(report) | last).items():
        path = folder.folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DestinationStale(
                "was finished, but is not whole any more",
                file=path,
                expected=f"{size} bytes",
                found=f"{path.stat().st_size} bytes" if path.is_file() else "nothing",
                remedy="write it anew with --restart",
            )


def _stale(folder: Destination, state: str, changed: list[str]) -> DestinationStale:
    return DestinationStale(
        f"holds a {state} conversion of another {' and other '.join(changed)}".replace(
            "another options", "other options"
        ),
        file=folder.folder,
        remedy="write it anew with --restart, or name another folder",
    )


def _begin(folder: Destination, plan: Plan, *, fresh: bool) -> dict[str, dict[str, Any]]:
    """Start or continue the journal; return the records of the shards that are finished.

    Args:
        folder: the destination.
        plan: what will be written there.
        fresh: whether the journal is only that of a clearing, which is over.
    """
    head: dict[str, Any] = {"journal": _JOURNAL_VERSION, "version": __version__, **_identity(plan)}
    old = [] if fresh else folder.journal()
    if old:
        if "options" not in old[0]:
            raise DestinationStale(
                "was being emptied by --restart", file=folder.folder, remedy="run that again, or name another folder"
            )
        changed = [key for key, value in head.items() if old[0].get(key) != value]
        if changed:
            raise _stale(folder, "half-finished", changed)
    sizes = {shard.file: shard.size for shard in plan.shards}
    done = {record["shard"]: record for record in old[1:] if _stands(folder.folder, record, sizes)}
    _check_room(folder.folder, plan, done)
    folder.begin([{**head, "files": _output_files(plan)}, *done.values()])
    if len(done) < len(sizes):
        folder.unlink([CONFIG, INDEX, REPORT])  # a run that was stopped at its very end may have left them
    return done


def _stands(folder: Path, record: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Tell whether the shard of a journal's record is one of the plan's and stands there whole."""
    name = record.get("shard")
    if not isinstance(name, str) or name not in sizes or not isinstance(record.get("tensors"), dict):
        return False
    path = folder / name
    return path.is_file() and not path.is_symlink() and path.stat().st_size == record.get("size") == sizes[name]


def _check_room(folder: Path, plan: Plan, done: dict[str, Any]) -> None:
    needed = plan.bytes_written - sum(shard.size for shard in plan.shards if shard.file in done)
    present = sum(
        path.stat().st_size
        for shard in plan.shards
        if shard.file not in done
        for path in (folder / shard.file, folder / f"{shard.file}.partial")
        if path.is_file()
    )  # these are replaced
    free = shutil.disk_usage(folder).free
    if free + present < needed:
        raise OutputError(
            "the disk is too small",
            file=folder,
            expected=f"{needed} bytes free",
            found=f"{free} bytes",
            remedy="free some space, or name a folder on another disk",
        )


# --- what makes the folder usable ------------------------------------------------------------------------------------


def _report(plan: Plan, shards: dict[str, Record], *, seconds: float) -> dict[str, Any]:
    """Return the content of k2quant_report.json, the sizes of the other files aside."""
    records = [shards[shard.file] for shard in plan.shards]
    return {
        "tool": "k2quant",
        "version": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "source_name": plan.source.folder.resolve().name,
        **_identity(plan),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "files": {
            record["shard"]: {key: record[key] for key in ("size", "sha256") if key in record} for record in records
        },
        "tensors": {
            name: {"class": names.tensor_class(name), "layer": names.layer(name), **facts}
            for record in records
            for name, facts in record["tensors"].items()
        },
    }


def _complete(folder: Path, plan: Plan, report: dict[str, Any]) -> None:
    """Write everything but the shards, config.json last."""
    sha256 = any("sha256" in facts for facts in report["files"].values())
    for name in plan.copies:
        check_inside(plan.source.folder, plan.source.folder / name)
        _copy_file(plan.source.folder / name, folder / name)
        report["files"][name] = _file_facts(folder / name, sha256=sha256)
    write_whole(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    write_whole(folder / INDEX, plan.index)
    if plan.config is not None:
        write_whole(folder / CONFIG, plan.config)


def _file_facts(path: Path, *, sha256: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": path.stat().st_size}
    if sha256:
        with path.open("rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        os.fdopen(open_regular(source), "rb") as reader,
        replacing(target) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as writer,
    ):
        shutil.copyfileobj(reader, writer)
