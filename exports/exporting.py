"""What all exports do alike: begin or go on, and have the converter's own stream fill the places.

An export is a stream of the converter with other places for the bytes: its shards are what the journal knows, files or
parts of one, and tensors of a weight may lie inside larger ones. What makes an output look finished comes last; that is
the business of whoever calls `fill`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import check_constants
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.writing.destination import Destination
from k2quant.checkpoint.writing.target import Room
from k2quant.conversion.convert import codecs_of
from k2quant.conversion.finishing.report import fetched
from k2quant.conversion.placing import Job, ShardPlan
from k2quant.conversion.stream import Filled, Progress, Record, Stream
from k2quant.errors import DestinationStale, OutputError
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted, duration, size
from k2quant.ground.version import __version__

_log = logging.getLogger(__name__)

_JOURNAL_VERSION = 1

MARK = (
    b"k2quant is writing an export here, or was stopped while it did. It cannot be used yet.\n"
    b"Run the same `k2quant export` again: it resumes where it stopped.\n"
)
"""What the file that marks an unfinished export says to whoever looks."""

_CHANGED = {
    "export": "another engine",
    "options": "other options",
    "source": "another source",
    "version": "another version of k2quant",
}
"""What a key of a journal's first line or a report stands for, where another value is a reason of its own."""


@dataclass(frozen=True, slots=True)
class Export:
    """What an export writes, computed from headers, small files and scales alone."""

    source: Checkpoint
    shards: tuple[ShardPlan, ...]
    """What is finished one by one; of a large file, parts of it."""
    identity: Mapping[str, Any]
    """What must be equal for a run to go on where another was stopped, as JSON has it: `export`, `options`, `source`,
    and whatever else decides what is written."""
    remarks: tuple[str, ...] = ()
    """What is worth saying of source and output, though it stops nothing."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def remarked(self, text: str) -> Export:
        """Return the export with one more remark; itself where there is nothing to say."""
        return replace(self, remarks=(*self.remarks, text)) if text else self

    def jobs(self) -> Iterator[Job]:
        """Yield every job, shard by shard."""
        return (job for shard in self.shards for job in shard.jobs)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that are read."""
        return sum(shard.bytes_read for shard in self.shards)

    @property
    def bytes_written(self) -> int:
        """Bytes of weights that are written."""
        return sum(shard.size for shard in self.shards)

    @property
    def head(self) -> dict[str, Any]:
        """What the first line of a journal says."""
        return {"journal": _JOURNAL_VERSION, "version": __version__, **self.identity}


def standing(export: Export, folder: Destination) -> dict[str, Record]:
    """Return the records of the shards that an earlier run of the same export finished, as its journal has them.

    Whether the bytes of a shard are there is the caller's to look at.

    Raises:
        DestinationStale: the journal is of another export.
    """
    journal = folder.journal()
    if not journal:
        return {}
    if "options" in journal[0] and "export" not in journal[0]:
        remedy = "go on with `k2quant convert`, write it anew with `restart=True`, or name another output"
        raise DestinationStale("holds a half-finished conversion", file=folder.spot, remedy=remedy)
    if "export" not in journal[0]:
        raise DestinationStale(
            "was being emptied by `restart=True`", file=folder.spot, remedy="run that again, or name another output"
        )
    refuse_changed(journal[0], export.head, folder.spot, "half-finished")
    planned = {shard.file: shard for shard in export.shards}
    return {record["shard"]: record for record in journal[1:] if _is_of(record, planned)}


def refuse_changed(found: Mapping[str, Any], wanted: Mapping[str, Any], spot: object, state: str) -> None:
    """Refuse what an earlier run wrote, or began, by what it says of itself.

    Args:
        found: what a journal's first line or a report says.
        wanted: what this run would say.
        spot: where that stands.
        state: `half-finished` or `finished`.

    Raises:
        DestinationStale: it is of another export.
    """
    changed = [key for key, value in wanted.items() if found.get(key) != value]
    if changed:
        own = [key for key in changed if key in _CHANGED]  # what follows from these need not be said
        what = " and ".join(_CHANGED[key] for key in own) or "another release of k2quant, which makes other files"
        raise DestinationStale(
            f"holds a {state} export of {what}",
            file=spot,
            remedy="write it anew with `restart=True`, or name another output",
        )


def _is_of(record: Record, planned: Mapping[str, ShardPlan]) -> bool:
    """Tell whether a record is that of a planned shard, with all its tensors."""
    shard, tensors = planned.get(str(record.get("shard"))), record.get("tensors")
    if shard is None or not isinstance(tensors, dict) or record.get("size") != shard.size:
        return False
    return tensors.keys() == {job.output_main.name for job in shard.jobs}


def fill(
    export: Export,
    folder: Destination,
    place: Filled,
    *,
    done: Mapping[str, Record],
    workers: int | None = None,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> dict[str, Record]:
    """Write all shards of an export that do not stand yet; return the records of all of them, in their order.

    Args:
        export: what to write.
        folder: the journal's, which this process holds locked.
        place: what is filled; it notes finished shards in that journal.
        done: records of the shards that stand, see `standing`.
        workers: threads; None: one for each core.
        low_disk: of a source at an address, keep at most two shards on the disk.
        progress: called as the work goes on.

    Raises:
        CheckpointError: a weight cannot be read, or not be written so.
        OSError: the disk is full or fails.
    """
    threads, codecs = checked_workers(workers), codecs_of("cpu")
    check_constants(export.source, (job.weight for job in export.jobs()))
    others = [record for record in folder.journal()[1:] if "shard" not in record]  # which say how far its end came
    folder.begin([export.head, *done.values(), *others])
    whole = counted(len(export.shards), "part")
    _log.info("%s: %s, %d of them there already; %s", folder.spot, whole, len(done), counted(threads, "thread"))
    stream = Stream(
        export,
        place,
        done=set(done),
        codecs=codecs,
        sha256=False,
        progress=progress,
        low_disk=low_disk,
        records=done.values(),
    )
    found = {**done, **stream.run(threads)}
    return {shard.file: found[shard.file] for shard in export.shards}


def report_of(
    export: Export, records: Mapping[str, Record], *, written: int, begun: float, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a report says.

    Args:
        export: what was written.
        records: of all its shards.
        written: bytes of all files.
        begun: when, as `time.monotonic` has it.
        own: what this kind of export says besides.
    """
    return {
        "tool": "k2quant",
        "version": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun, 3),
        **export.identity,
        **fetched(export.source, records.values()),
        "bytes_read": export.bytes_read,
        "bytes_written": written,
        "remarks": list(export.remarks),
        **own,
        "tensors": {name: facts for record in records.values() for name, facts in record["tensors"].items()},
    }


def facts_of(
    report: Mapping[str, Any], *, resumed: int, already_done: bool, files: int | None = None
) -> dict[str, object]:
    """Return what an export came to, in a few words.

    Args:
        report: what stands beside the output, or in it.
        resumed: what an earlier run had finished.
        already_done: whether all was, so that no time was taken.
        files: how many there are, where there may be several.
    """
    return {
        "read": size(report["bytes_read"]),
        "written": size(report["bytes_written"]),
        **({} if already_done else {"time": duration(report["seconds"])}),
        **({} if files is None else {"files": files}),
        "fallback": len(report["fallback"]),
        "remarks": len(report["remarks"]),
        "resumed": resumed,
        "already_done": already_done,
    }


def check_room(room: Room) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: so it is.
    """
    if room.free < room.needed:
        raise OutputError(
            "the disk is too small",
            file=room.where,
            expected=f"{room.needed} bytes free",
            found=f"{room.free} bytes",
            remedy=room.remedy,
        )


@contextlib.contextmanager
def disk_errors(there: Path | Address) -> Iterator[None]:
    """Turn what the system says of a disk into an error that names it.

    Raises:
        OutputError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            "cannot be written",
            file=error.filename or there,
            found=error.strerror or str(error),
            remedy="when that is mended, run the same command again: it resumes",
        ) from error
