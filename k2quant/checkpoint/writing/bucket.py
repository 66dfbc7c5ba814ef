"""An output on an object store: whose prefix it is, who works in it, and how far it has come.

A store has no rename, so each shard is filled in a file of this machine's cache that has no name, and uploaded when it
is whole; a process that dies leaves nothing of it. While a conversion runs, there stand below the prefix `INCOMPLETE`,
`.k2quant/journal.json` (what is being made), `.k2quant/shards/FILE.json` for each finished shard, and
`.k2quant/lock.json`. All of it goes when the conversion is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from k2quant.checkpoint.cards import CARD
from k2quant.checkpoint.files.caches import user_cache
from k2quant.checkpoint.files.paths import nearest_folder, open_regular
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.writing.destination import (
    CONVERTING,
    REPORT_LIMIT,
    WORK,
    attempt_at,
    ended_by_another,
    line,
    others_at_work,
    refuse_what_is_not_ours,
)
from k2quant.checkpoint.writing.holding import Sharing, held
from k2quant.checkpoint.writing.objects import Objects, Upload
from k2quant.checkpoint.writing.stores import objects_of
from k2quant.checkpoint.writing.target import Room
from k2quant.checkpoint.writing.writer import OpenShard
from k2quant.errors import DestinationStale, MalformedFile, OutputError
from k2quant.ground import pool

_log = logging.getLogger(__name__)

_JOURNAL = f"{WORK}/journal.json"
_SHARDS = f"{WORK}/shards"
_NOTE = ".json"
_ABREAST = 2
"""Shards that are filled at a time: each takes its room in the cache, and two files take more than a network does."""
_WAITING = 3
"""Whole shards that may wait to be uploaded, with the one that is under way; see `stream`."""
_READERS = 8  # records that are read at a time


class SpooledShard(OpenShard):
    """A shard in a file without a name, uploaded when it is whole."""

    def __init__(self, objects: Objects, name: str, folder: Path, header: bytes, size: int) -> None:
        """Begin it.

        Args:
            objects: where it goes.
            name: under which it will stand there.
            folder: on the disk that takes it until then.
            header: its first bytes.
            size: bytes of the whole.

        Raises:
            OSError: it cannot be created.
        """
        self._objects, self._name, self._size, self._folder = objects, name, size, folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            descriptor = os.dup(file.fileno())
        with _naming(folder):
            super().__init__(descriptor, header, size)

    def write(self, offset: int, data: memoryview) -> bool:
        """Write bytes at an offset; there is never a need to flush them: a kill takes the file with it.

        Raises:
            OSError: the disk is full or fails.
        """
        with _naming(self._folder):
            super().write(offset, data)
        return False

    def finish(self) -> None:
        """Have it stand at the store. Nothing may be written afterwards."""
        self._objects.upload(self._name, self._file, self._size)
        self.close()


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say of an error of writing where it was: the file has no name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


class Bucket:
    """A prefix of an object store, locked by this process."""

    abreast = _ABREAST

    def __init__(
        self, objects: Objects, *, report: str, incomplete: str, mark: bytes = CONVERTING, attempt: str = ""
    ) -> None:
        """Take what `locked` prepared; see `Destination`."""
        self._objects, self._report, self._incomplete = objects, report, incomplete
        self._mark, self._attempt = mark, attempt
        self.work = work_of(objects.address)
        """A folder of this machine for what is nobody's when the run is done."""
        self._share = ""
        self._copied: dict[str, dict[str, Any]] = {}
        self._sharing: Sharing | None = None

    @property
    def spot(self) -> Address:
        """The address, as messages name it."""
        return self._objects.address

    @property
    def stage(self) -> Path:
        """A folder of this machine, there or not, for shards of a source that lie on the disk while they are read."""
        own = self._share or self._attempt  # as in a folder: a part goes on with what an earlier attempt fetched
        return self.work / (f"source-{own}" if own else "source")

    def named(self, name: str) -> str:
        """Return a file's address, as messages name it."""
        return self._objects.named(name)

    def size(self, name: str, *, links: bool = True) -> int | None:  # noqa: ARG002  a store has none
        """Return the bytes of an object; None where there is none."""
        return self._objects.size(name)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small object's bytes; None where there is none, or one of more bytes than `limit`."""
        size = self._objects.size(name)
        return None if size is None or size > limit else self._objects.read(name, limit)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; it is whole or not there."""
        self._objects.write(name, data)

    def copy(self, source: Path, name: str) -> None:
        """Copy a local file; the copy is whole or not there."""
        with os.fdopen(open_regular(source), "rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            self._objects.upload(name, file.fileno(), size)
        self._copied[name] = {"size": size, "sha256": digest}

    def facts(self, name: str, *, sha256: bool) -> dict[str, Any]:
        """Return what a report says of a file that was copied there: its size and, where asked for, its SHA-256."""
        known = self._copied[name]
        return known if sha256 else {"size": known["size"]}

    def writer(self, file: str, header: bytes, size: int) -> SpooledShard:
        """Begin a shard; see `SpooledShard`."""
        return SpooledShard(self._objects, file, self.work, header, size)

    def keep_digest(self, file: str, sha256: str) -> None:
        """Keep nothing: the report has it, and who reads from a store looks there."""

    def room(self, shards: Mapping[str, int], more: int) -> Room:  # noqa: ARG002  other files are uploaded as they lie
        """Return what the disk of the cache must have free, for the shards that are there at a time."""
        return room_of(self.spot, shards)

    def finished_report(self) -> dict[str, Any] | None:
        """Return the report of a finished conversion, or None while there is none of ours."""
        if self._objects.size(_JOURNAL) is not None:
            return None
        data = self._objects.read(self._report, REPORT_LIMIT)
        try:
            report = None if data is None else parse_object(data, file=self.named(self._report))
        except MalformedFile:
            return None
        return report if report is not None and report.get("tool") == "k2quant" else None

    def journal(self) -> list[dict[str, Any]]:
        """Return what is being made and the records of finished shards; empty when nothing was begun.

        A record that is damaged is left out.
        """
        head = self._parsed(_JOURNAL)
        if head is None:
            return []
        names = sorted(self._notes())
        found: dict[str, dict[str, Any]] = {}

        def read(name: str) -> None:
            record = self._parsed(name)
            if record is not None:
                found[name] = record

        pool.run(iter(names), read, workers=min(_READERS, max(len(names), 1)))
        return [head, *(found[name] for name in names if name in found)]

    def begin(self, records: list[dict[str, Any]]) -> None:
        """Mark the prefix as unfinished and say what is being made; keep of the shards' records those that are given.

        Uploads of our own files that a killed run left are aborted.
        """
        self._objects.write(self._incomplete, self._mark)
        self._objects.write(_JOURNAL, line(records[0]))
        kept = {_note(record["shard"]) for record in records[1:] if isinstance(record.get("shard"), str)}
        self._objects.delete(sorted(self._notes() - kept))
        self._abort(records[0].get("files"))

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Do what one process may do at a time, where several write shares; see `Destination.alone`."""
        return contextlib.nullcontext() if self._sharing is None else self._sharing.alone()

    def refuse_others(self) -> None:
        """Refuse to throw away what other processes are writing; see `Destination.refuse_others`."""
        if self._sharing is not None and not self._sharing.is_last():
            raise others_at_work(self.spot)

    def sweep(self, files: Iterable[str]) -> None:
        """Abort uploads of these files that killed attempts left; none of them is being written."""
        self._abort(list(files), sure=True)

    @contextlib.contextmanager
    def shared(self, share: str, *, restart: bool) -> Iterator[None]:
        """Have one of several processes write its share as long as the block runs; see `Destination.shared`."""
        self._share = share
        self._sharing = Sharing(self._objects, share=share, check=lambda: self.refuse_foreign(restart=restart))
        with contextlib.suppress(DestinationStale):  # another may be beginning just now; behind the gate it is sure
            self.refuse_foreign(restart=restart)
        try:
            yield
        finally:
            self._sharing.release()

    def spread(self) -> None:
        """Do nothing: records of several processes never stand in each other's way here."""

    def record(self, record: dict[str, Any]) -> None:
        """Note a finished shard.

        Raises:
            DestinationStale: the output was finished or emptied meanwhile, by the process that holds it.
        """
        if self._attempt and self._objects.size(_JOURNAL) is None:
            raise ended_by_another(self.spot)
        self._objects.write(_note(record["shard"]), line(record))

    def finish(self) -> None:
        """Take away every mark of an unfinished conversion, what says what was being made last."""
        head = self._parsed(_JOURNAL) or {}
        self._abort(head.get("files"))
        self._objects.delete([self._incomplete])
        self._objects.delete(sorted(self._notes()))
        self._objects.delete([_JOURNAL])

    def clear(self, files: list[str]) -> None:
        """Delete these files of an earlier conversion, finished or not, and what it kept to go on from.

        The journal notes them first, so that a kill in between leaves a prefix that is still ours. It stays.
        """
        self.begin([{"files": files}])
        self.forget()
        self.delete(files)

    def forget(self) -> None:
        """Delete what a run kept on this machine to go on from."""
        shutil.rmtree(self.work, ignore_errors=True)

    def delete(self, files: Sequence[str]) -> None:
        """Delete those of these files that are there; names that leave the prefix are passed over."""
        there = self._objects.listed()
        self._objects.delete([name for name in files if name in there and _is_inside(name)])

    def refuse_foreign(self, *, restart: bool = False) -> None:
        """Refuse a prefix that holds anything, unless it is ours; see `Destination.refuse_foreign`."""
        names = {name.partition("/")[0] for name in self._objects.listed()}
        refuse_what_is_not_ours(
            self,
            foreign=sorted(names - {WORK, self._incomplete, CARD}),
            begun=self._objects.size(_JOURNAL) is not None or self._incomplete in names,
            keeps=False,
            journal=self.named(_JOURNAL),
            restart=restart,
        )

    def unfinished(self) -> list[Upload]:
        """Return the uploads of our own files that were begun and are not over."""
        head = self._parsed(_JOURNAL) or self.finished_report() or {}
        files = head.get("files")
        own = {name for name in files if isinstance(name, str)} if isinstance(files, list | dict) else set()
        return [upload for upload in self._objects.uploads() if upload.name in own]

    def _notes(self) -> set[str]:
        return {name for name in self._objects.listed(_SHARDS) if name.endswith(_NOTE)}

    def _parsed(self, name: str) -> dict[str, Any] | None:
        data = self._objects.read(name, REPORT_LIMIT)
        try:
            return None if data is None else parse_object(data, file=self.named(name))
        except MalformedFile:
            return None

    def _abort(self, files: object, *, sure: bool = False) -> None:
        """Abort uploads of our own files; of several processes none does, unless it is `sure` that none is at work."""
        own = {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
        if self._attempt and not sure:
            return
        try:
            left = [upload for upload in self._objects.uploads() if upload.name in own]
        except OutputError as error:  # the right to list them is one of its own
            _log.warning("%s: uploads that a killed run left cannot be looked for: %s", self.spot, error)
            return
        self._objects.abort(left)


def _note(shard: str) -> str:
    return f"{_SHARDS}/{shard}{_NOTE}"


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and parts[0] != WORK


def work_of(address: Address) -> Path:
    """Return a folder of this machine for what a run to an address needs on a disk: in the user's cache.

    XDG_CACHE_HOME names another disk; where there is no home, it lies where temporary files do.
    """
    mark = hashlib.sha256(str(address).encode()).hexdigest()[:32]
    return (user_cache() or Path(tempfile.gettempdir()) / "k2quant") / "outputs" / mark


def room_of(address: Address, shards: Mapping[str, int]) -> Room:
    """Return what the disk of the cache must have free for an output to an address, and what it has.

    Args:
        address: where the output goes.
        shards: sizes in bytes of the shards that are missing, by name.
    """
    where = nearest_folder(work_of(address))
    needed = sum(sorted(shards.values())[-(_ABREAST + _WAITING) :])
    remedy = "free some space, or name a folder on another disk by the environment's XDG_CACHE_HOME"
    return Room(where, needed, shutil.disk_usage(where).free, remedy)


@contextlib.contextmanager
def locked(
    address: Address, *, report: str, incomplete: str, restart: bool = False, mark: bytes = CONVERTING, share: str = ""
) -> Iterator[Bucket]:
    """Hold the lock of a prefix.

    Args:
        address: where.
        report: name of the report's file, which marks a finished output as ours.
        incomplete: name of the file that marks an unfinished one.
        restart: whether what an earlier run left may be thrown away, damaged or not.
        mark: what the file that marks an unfinished one says.
        share: as in `destination.locked`.

    Raises:
        DestinationInUse: another process holds it, or may hold it.
        DestinationForeign: the prefix holds something that is not ours.
        OutputError: the store cannot be written to.
    """
    objects = objects_of(address)
    bucket = Bucket(objects, report=report, incomplete=incomplete, mark=mark, attempt=attempt_at(share))
    if share:
        with bucket.shared(share, restart=restart):
            yield bucket
        return
    bucket.refuse_foreign(restart=restart)
    with held(objects):
        try:
            bucket.refuse_foreign(restart=restart)
            yield bucket
        finally:
            with contextlib.suppress(OSError, OutputError):
                if not bucket.journal():
                    bucket.forget()
