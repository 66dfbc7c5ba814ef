"""The folder in which GGUF files are made, and how they come to stand under their names.

It lies beside the output, `NAME.gguf.partial`, with lock and journal as any output of ours. A file is there at its full
size from the beginning; what is finished in it, and counts after a kill, are parts: a layer's share of a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import nearest_folder, read_limited, sync_folder, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.writing import destination
from k2quant.checkpoint.writing.destination import REPORT_LIMIT, Destination
from k2quant.checkpoint.writing.target import Room
from k2quant.checkpoint.writing.writer import OpenShard
from k2quant.conversion.stream import Record
from k2quant.errors import DestinationForeign, DestinationStale, MalformedFile, OutputError
from k2quant.exports.exporting import MARK, refuse_changed, standing
from k2quant.exports.gguf.files import FilePlan, is_of
from k2quant.exports.gguf.plan import GgufPlan

_MOVING = "moving"
"""Under which the journal notes the files that get their names: from then on one that is not here stands there."""


def work_folder(there: Path) -> Path:
    """Return the folder in which an output is made."""
    return there.with_name(f"{there.name}.partial")


def report_path(there: Path) -> Path:
    """Return the file that says what an output is, and that it is finished."""
    return there.with_name(f"{there.name}.json")


def finished(there: Path) -> dict[str, Any] | None:
    """Return the report of a finished export, or None while there is none of ours."""
    path = report_path(there)
    if not path.is_file():
        return None
    with contextlib.suppress(MalformedFile):
        report = parse_object(read_limited(path, REPORT_LIMIT), file=path)
        return report if report.get("tool") == "k2quant" and "export" in report else None
    return None


def check_finished(there: Path, report: Mapping[str, Any], plan: GgufPlan) -> None:
    """Refuse a finished output that is not what this call would make, or is not whole any more.

    Raises:
        DestinationStale: so it is.
    """
    refuse_changed(report, plan.export.identity, there, "finished")
    for file in plan.files:
        path = there.with_name(file.name)
        if _size(path) != file.size:
            raise DestinationStale(
                "was finished, but is not whole any more",
                file=path,
                expected=f"{file.size} bytes",
                found="nothing" if _size(path) is None else f"{_size(path)} bytes",
                remedy="write it anew with `restart=True`",
            )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextlib.contextmanager
def locked(there: Path, *, restart: bool, soft: bool) -> Iterator[Destination]:
    """Make the folder beside an output if need be and hold its lock.

    Raises:
        OutputError: another process holds it, or it is not ours.
    """
    work = work_folder(there)
    try:
        with destination.locked(
            work, report=REPORT, incomplete=INCOMPLETE, restart=restart, soft=soft, mark=MARK
        ) as folder:
            yield folder
    finally:
        with contextlib.suppress(OSError):  # it stays where anything is left in it
            work.rmdir()


def tidy(there: Path) -> None:
    """Take away what a run left that was killed when its output had just been finished."""
    if not work_folder(there).is_dir():
        return
    with contextlib.suppress(OutputError), locked(there, restart=False, soft=False) as folder:
        folder.finish()


class Part(OpenShard):
    """A part of a file that is filled."""

    def __init__(self, path: Path, plan: FilePlan) -> None:
        """Open the file, or create it at its full size, and write its header.

        Raises:
            OSError: it cannot be written, or is a link.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            super().__init__(os.open(path, flags, 0o666), plan.header, plan.size)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise

    def finish(self) -> None:
        """Flush what was written. Nothing may be written afterwards."""
        os.fsync(self._file)
        self.close()


class Output:
    """GGUF files in the making."""

    abreast = 1
    """Parts that are written at a time: they lie in one file, which takes one thread's bytes at a time in any case."""

    def __init__(self, plan: GgufPlan, folder: Destination, there: Path) -> None:
        """Take what `locked` prepared.

        Args:
            plan: what is written.
            folder: where, meanwhile.
            there: the output's path.
        """
        self._plan, self._folder, self._there = plan, folder, there
        self.spot, self.stage = folder.spot, folder.stage

    def writer(self, file: str, header: bytes, size: int) -> Part:  # noqa: ARG002  the file's own are used
        """Begin a part."""
        plan = self._plan.sections[file]
        return Part(self._folder.folder / plan.name, plan)

    def keep_digest(self, file: str, sha256: str) -> None:
        """Not asked: a part has no digest."""
        raise AssertionError(f"{file} is a part of a file: {sha256}")

    def record(self, record: dict[str, Any]) -> None:
        """Note a finished part."""
        self._folder.record(record)

    def refuse_others(self, *, restart: bool) -> None:
        """Refuse to write over files that are not ours; those that a finished export of ours has are, for a restart.

        Raises:
            DestinationForeign: they are somebody's.
        """
        own = self._moved() | (self._reported() if restart else set())
        for name in (*(file.name for file in self._plan.files), report_path(self._there).name):
            if name not in own and os.path.lexists(self._there.with_name(name)):
                raise DestinationForeign(
                    "is there already, and was not written by this command",
                    file=self._there.with_name(name),
                    remedy="name another file, or remove it",
                )

    def clear(self) -> None:
        """Throw away what an earlier export left, finished or not."""
        reported = self._reported() - {report_path(self._there).name}
        self._remove(self._moved())  # before the journal, which says that they are ours
        self._folder.clear([])
        for path in self._folder.folder.iterdir():
            if path.is_file() and path.name != INCOMPLETE:
                path.unlink()
        self._remove(reported)
        report_path(self._there).unlink(missing_ok=True)  # last: it says that the others are ours
        sync_folder(self._there.parent)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._there.with_name(name).unlink(missing_ok=True)

    def _moved(self) -> set[str]:
        """Return the names of files of which some stand there, for a run was stopped when they got these."""
        return {name for record in self._folder.journal() for name in _own(self._there, record.get(_MOVING))}

    def _reported(self) -> set[str]:
        """Return the names of the files of a finished export, and of its report."""
        report = finished(self._there)
        return set() if report is None else {*_own(self._there, report.get("files")), report_path(self._there).name}

    def standing(self) -> dict[str, Record]:
        """Return the records of parts that are finished, and whose file is there.

        Raises:
            DestinationStale: the journal is of another export.
        """
        found = standing(self._plan.export, self._folder)
        moved = self._moved()
        whole = {file.name for file in self._plan.files if self._is_there(file, moved)}
        return {name: record for name, record in found.items() if self._plan.sections[name].name in whole}

    def _is_there(self, file: FilePlan, moved: Container[str]) -> bool:
        own = self._folder.folder / file.name
        if own.is_symlink():
            return False
        return file.size in (_size(own), _size(self._there.with_name(file.name)) if file.name in moved else None)

    def room(self, shards: Mapping[str, int], more: int) -> Room:
        """Return what the disk must have free for such parts, and what it has."""
        return room_of(self._there, sum(shards.values()) + more)

    def space(self) -> Room:
        """Return what the disk must have free for what is missing, and what it has."""
        own = (self._folder.folder / file.name for file in self._plan.files)
        blocks = sum(path.stat().st_blocks * 512 for path in own if path.is_file())
        moved = self._moved()
        standing = sum(file.size for file in self._plan.files if file.name in moved and not self._here(file))
        return room_of(self._there, self._plan.size - min(blocks, self._plan.size) - standing)

    def _here(self, file: FilePlan) -> bool:
        return (self._folder.folder / file.name).is_file()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Give the files their names, that which is loaded last, and say that they are whole."""
        if not self._moved():
            self._folder.record({_MOVING: [file.name for file in self._plan.files]})
        for file in reversed(self._plan.files):
            if self._here(file):
                (self._folder.folder / file.name).replace(self._there.with_name(file.name))
        sync_folder(self._there.parent)
        write_whole(report_path(self._there), json.dumps(report, indent=1).encode() + b"\n")
        self._folder.finish()


def _own(there: Path, names: object) -> Iterator[str]:
    """Yield what of the names in a journal or a report are an output's: one that was copied names another's files."""
    for name in names if isinstance(names, list | dict) else ():
        if isinstance(name, str) and is_of(there.name, name):
            yield name


def room_of(there: Path, needed: int) -> Room:
    """Return what the disk of an output must have free, and what it has."""
    where = nearest_folder(there.parent)
    remedy = "free some space, or name a file on another disk"
    return Room(where, max(needed, 0), shutil.disk_usage(where).free, remedy)
