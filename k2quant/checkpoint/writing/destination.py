"""The folder that a conversion or a calibration writes: whose it is, who works in it, and how far it has come.

While a conversion runs, the folder holds `.k2quant/lock` (locked by the process, and free when it dies),
`.k2quant/journal.jsonl` (one line that says what is being made, then one for each finished shard) and a file
`INCOMPLETE`. Where several processes write the shards, each notes its own in `.k2quant/shards`. All of it goes when the
conversion is done; what remains is the checkpoint and its report.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from k2quant.checkpoint.cards import CARD
from k2quant.checkpoint.files import digests
from k2quant.checkpoint.files.locks import Lock, take
from k2quant.checkpoint.files.paths import (
    PARTIAL,
    copy_file,
    nearest_folder,
    partial_of,
    partials,
    read_limited,
    sync_folder,
    write_whole,
)
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.writing.sharing import LOCK, Sharing, refuse_shares
from k2quant.checkpoint.writing.target import Room, Target
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.errors import DestinationForeign, DestinationInUse, DestinationStale, MalformedFile, OutputError

WORK = ".k2quant"
"""Folder, below an output, of what a run keeps there while it is at work."""
_JOURNAL = "journal.jsonl"
_SHARDS = "shards"
_NOTE = ".json"
REPORT_LIMIT = 2_000_000_000
"""Largest report or journal in bytes, far above what a whole K2 needs: some 300 bytes for each of 140,000 tensors."""

# Linux lets one thread at a time write to a file: two threads wrote 1.6 GB/s to one file, 3.1 to two (tmpfs, 2 cores).
SHARDS_ABREAST = 8
"""Output shards that are written to a folder at a time, at most."""

CONVERTING = (
    b"k2quant is writing this checkpoint, or was stopped while it did. It cannot be used yet.\n"
    b"Run the same `k2quant convert` again: it resumes where it stopped.\n"
)


class Destination:
    """An output folder, locked by this process."""

    abreast = SHARDS_ABREAST

    def __init__(
        self, folder: Path, *, report: str, incomplete: str, mark: bytes = CONVERTING, attempt: str = ""
    ) -> None:
        """Take what `locked` prepared.

        Args:
            folder: the folder.
            report: name of the report's file, which marks a finished folder as ours.
            incomplete: name of the file that marks an unfinished one.
            mark: what that file says to whoever looks.
            attempt: where several processes write the shards, letters that are this one's alone: no partial file is
                then another's, and each finished shard is noted in a file of its own.
        """
        self.folder = folder
        self._attempt = attempt
        self._share = ""
        self._sharing: Sharing | None = None
        self._mark = mark
        self._report = folder / report
        self._incomplete = folder / incomplete
        self.work = folder / WORK
        """Where a run keeps what is nobody's when it is done: folders of its own beside lock and journal."""
        self._journal = self.work / _JOURNAL
        self._shards = self.work / _SHARDS

    @property
    def spot(self) -> Path:
        """The folder, as messages name it."""
        return self.folder

    @property
    def stage(self) -> Path:
        """Where shards of a source lie while they are read; each of several processes has a folder of its own."""
        own = self._share or self._attempt  # a part goes on with what an earlier attempt at it fetched
        return self.work / (f"source-{own}" if own else "source")

    def named(self, name: str) -> Path:
        """Return the path of a file, as messages name it."""
        return self.folder / name

    def size(self, name: str, *, links: bool = True) -> int | None:
        """Return the bytes of a file that stands there; None for what is no regular file.

        Args:
            name: of the file.
            links: whether a link to a file will do.
        """
        path = self.folder / name
        return path.stat().st_size if path.is_file() and (links or not path.is_symlink()) else None

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file that stands there; None where no regular file does, or one of more bytes than `limit`."""
        path = self.folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size > limit:
            return None
        return path.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file so that it is whole or not there."""
        write_whole(self.folder / name, data)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file so that the copy is whole or not there."""
        copy_file(source, self.folder / name)

    def facts(self, name: str, *, sha256: bool) -> dict[str, Any]:
        """Return what a report says of a file that was copied here: its size and, where asked for, its SHA-256."""
        path = self.folder / name
        facts: dict[str, Any] = {"size": path.stat().st_size}
        if sha256:
            with path.open("rb") as file:
                facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return facts

    def writer(self, file: str, header: bytes, size: int) -> ShardWriter:
        """Begin a shard; see `ShardWriter`."""
        return ShardWriter(self.folder / file, header, size, self._attempt)

    def keep_digest(self, file: str, sha256: str) -> None:
        """Note the digest of a shard that has just been written, for whoever asks for it later."""
        digests.note((self.folder / file).stat(), sha256)

    def room(self, shards: Mapping[str, int], more: int) -> Room:
        """Return what the disk must have free for an output; see `room_of`."""
        return room_of(self.folder, shards, more)

    def finished_report(self) -> dict[str, Any] | None:
        """Return the report of a finished conversion, or None while there is none of ours."""
        if self._journal.exists() or not self._report.is_file():
            return None
        try:
            report = parse_object(read_limited(self._report, REPORT_LIMIT), file=self._report)
        except MalformedFile:
            return None
        return report if report.get("tool") == "k2quant" else None

    def journal(self) -> list[dict[str, Any]]:
        """Return the journal's records, the first of which says what is being made; empty when nothing was begun.

        A last line that a kill cut short is left out.
        """
        try:
            data = read_limited(self._journal, REPORT_LIMIT)
        except FileNotFoundError:  # nothing was begun, or another run has just finished
            return []
        records: list[dict[str, Any]] = []
        for line in data.split(b"\n"):
            if not line:
                continue
            try:
                records.append(parse_object(line, file=self._journal))
            except MalformedFile:
                break
        return [*records, *self._noted()] if records else []

    def _noted(self) -> Iterator[dict[str, Any]]:
        """Yield the records of shards that one of several processes wrote; a damaged one is passed over."""
        for path in sorted(self._shards.glob(f"*{_NOTE}")):
            with contextlib.suppress(MalformedFile, FileNotFoundError):
                yield parse_object(read_limited(path, REPORT_LIMIT), file=path)

    def begin(self, records: list[dict[str, Any]]) -> None:
        """Write the journal anew with these records and mark the folder as unfinished."""
        write_whole(self._incomplete, self._mark)
        write_whole(self._journal, b"".join(map(line, records)))
        for note in self._shards.glob(f"*{_NOTE}"):  # which the journal holds now
            note.unlink()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Do what one process may do at a time, where several write shares; they wait for one another.

        Raises:
            DestinationInUse: the first time, as `locked` says; later, another waits too long for something.
        """
        if self._sharing is None:
            yield
            return
        first = not self._sharing.held
        with self._sharing.alone():
            if not first:
                self._look_again()
            yield

    def _look_again(self) -> None:
        """Have what others have just written be seen.

        What NFS shows of a folder is up to a minute old (acdirmax, see nfs(5)), unless this machine changes it.
        """
        for folder in (self.folder, self._shards):
            probe = partial_of(folder / self._incomplete.name, f"{self._attempt}.probe")
            with contextlib.suppress(FileNotFoundError):
                probe.touch()
                probe.unlink()

    def refuse_others(self) -> None:
        """Refuse to throw away what other processes are writing.

        Raises:
            DestinationInUse: they are.
        """
        if self._sharing is not None and not self._sharing.is_last():
            raise others_at_work(self.folder)

    def spread(self) -> None:
        """Have room for the notes of several processes; who finds none knows that the folder was finished meanwhile."""
        self._shards.mkdir(exist_ok=True)

    def record(self, record: dict[str, Any]) -> None:
        """Note a finished shard and flush that: in the journal or, of one of several processes, in a file of its own.

        Raises:
            DestinationStale: the folder was finished or emptied meanwhile.
        """
        if self._attempt:
            try:
                write_whole(self._shards / f"{record['shard']}{_NOTE}", line(record), self._attempt)
            except FileNotFoundError as error:
                raise ended_by_another(self.folder) from error
            return
        with self._journal.open("ab") as file:
            file.write(line(record))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Take away every mark of an unfinished conversion, the journal last."""
        self._incomplete.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)
        sync_folder(self.folder)

    def clear(self, files: list[str]) -> None:
        """Delete these files of an earlier conversion, finished or not, and what it kept to go on from.

        The journal notes them first, so that a kill in between leaves a folder that is still ours. It stays.
        """
        self.begin([{"files": files}])
        self.forget()
        self.delete(files)

    def forget(self) -> None:
        """Delete what a run kept to go on from."""
        for path in self.work.iterdir():
            if path.is_symlink():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)

    def sweep(self, files: Iterable[str]) -> None:
        """Delete what killed attempts left of these files; none of them is being written."""
        for path in (path for name in files for path in partials(self.folder / name)):
            path.unlink(missing_ok=True)

    def delete(self, files: Sequence[str]) -> None:
        """Delete those of these files that are there; names that leave the folder are passed over."""
        for name in files:
            path = self.folder / name
            if not is_below(self.folder, name):
                continue
            for victim in (path, *partials(path)):
                if victim.is_file() or victim.is_symlink():
                    victim.unlink(missing_ok=True)
        sync_folder(self.folder)

    @contextlib.contextmanager
    def shared(self, share: str, *, restart: bool, soft: bool) -> Iterator[None]:
        """Have one of several processes write its share as long as the block runs; see `locked`."""

        def check() -> None:
            self.refuse_foreign(restart=restart)
            if not self.journal():
                self.forget()  # left by a run that was killed after its very end
            for path in self.folder.glob(f"*.{glob.escape(share)}-*{PARTIAL}"):  # of an earlier attempt at this share
                path.unlink(missing_ok=True)

        _refuse_link(self.work)
        with contextlib.suppress(DestinationStale):  # another may be beginning just now; behind the gate it is sure
            self.refuse_foreign(restart=restart)
        self._share = share
        self._sharing = Sharing(self.work, folder=self.folder, name=share, soft=soft, check=check)
        try:
            yield
        finally:
            if self._sharing.held:
                with contextlib.suppress(OSError, DestinationInUse):
                    if not self.journal():
                        self._go_home(self._sharing)
                self._sharing.release()

    def _go_home(self, sharing: Sharing) -> None:
        """Take away what processes keep here, if this is the last."""
        with sharing.alone():
            if not self.journal() and sharing.is_last():
                shutil.rmtree(self.work)

    def refuse_foreign(self, *, restart: bool = False) -> None:
        """Refuse a folder that holds anything, unless it is ours.

        Args:
            restart: whether what is damaged may be thrown away.

        Raises:
            DestinationForeign: it holds files that no journal or report of ours explains.
            DestinationStale: the journal is damaged, so that nobody knows what the folder holds.
        """
        own = {WORK, self._incomplete.name, self._incomplete.name + PARTIAL, CARD}  # a card may be there first
        try:
            refuse_what_is_not_ours(
                self,
                foreign=sorted(path.name for path in self.folder.iterdir() if path.name not in own),
                begun=self._begun(),
                keeps=self._keeps(),
                journal=self._journal,
                restart=restart,
            )
        except DestinationStale:
            if self._begun():  # else another run has just finished, and took its journal away: all is well
                raise

    def _begun(self) -> bool:
        return self._journal.exists() or self._incomplete.exists()

    def _keeps(self) -> bool:
        """Tell whether a run kept something to go on from; without a journal nobody knows which."""
        with contextlib.suppress(FileNotFoundError):  # nothing was begun, or another run has just finished
            return any(path.is_dir() for path in self.work.iterdir())
        return False


def others_at_work(spot: object) -> DestinationInUse:
    """Return the refusal to throw away what other processes are writing."""
    message = "other parts of another conversion are being written here"
    return DestinationInUse(message, file=spot, remedy="wait for them, or name another place")


def ended_by_another(spot: object) -> DestinationStale:
    """Return what is said to a process that wrote shares while another finished or emptied the output."""
    message = "was finished or emptied by another k2quant while this one wrote"
    return DestinationStale(message, file=spot, remedy="run the same command again: it says how things stand")


def attempt_at(share: str) -> str:
    """Return letters that no other process has, where this one writes a share; else none."""
    return f"{share}-{os.urandom(4).hex()}" if share else ""


def refuse_what_is_not_ours(
    target: Target, *, foreign: Sequence[str], begun: bool, keeps: bool, journal: object, restart: bool
) -> None:
    """Refuse a place that holds anything, unless it is ours.

    Args:
        target: the place.
        foreign: names there that are not those of a run at work.
        begun: whether a journal or the mark of an unfinished output stands there.
        keeps: whether a run kept something there to go on from.
        journal: where the journal is, for messages.
        restart: whether what is damaged may be thrown away.

    Raises:
        DestinationForeign: it holds files that no journal or report of ours explains.
        DestinationStale: the journal is damaged, so that nobody knows what the place holds.
    """
    if target.journal() or not (foreign or keeps):
        return
    if begun and not restart:
        raise DestinationStale(
            "the journal of an earlier run is damaged",
            file=journal,
            remedy="write it anew with `restart=True`",
        )
    if foreign and not begun and target.finished_report() is None:
        ours = any(name.startswith("k2quant_") and name.endswith(".json") for name in foreign)
        raise DestinationForeign(
            f"not empty, and not written by {'this command' if ours else 'k2quant'}",
            file=target.spot,
            found=", ".join(foreign[:5]),
            remedy="name another folder",
        )


def _refuse_link(work: Path) -> None:
    if work.is_symlink():
        raise DestinationForeign("a link where k2quant keeps its journal", file=work)


def room_of(folder: Path, shards: Mapping[str, int], more: int) -> Room:
    """Return what an output needs in a folder that need not be there yet, and what is free.

    Args:
        folder: where it will lie.
        shards: sizes in bytes of the shards that are missing, by name; what stands in their place gives its room.
        more: bytes of the files beside them.
    """
    replaced = [path for name in shards for path in (folder / name, *partials(folder / name))]
    present = sum(_taken(path.stat()) for path in replaced if path.is_file())
    where = nearest_folder(folder)
    needed, remedy = sum(shards.values()) + more - present, "free some space, or name a folder on another disk"
    return Room(where, needed, shutil.disk_usage(where).free, remedy)


def _taken(status: os.stat_result) -> int:
    """Return the bytes of a file that lie on the disk: one that was begun has its full size and is mostly holes."""
    return min(status.st_size, status.st_blocks * 512)


def line(record: dict[str, Any]) -> bytes:
    """Return a record as a journal has it."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def is_below(folder: Path, name: str) -> bool:
    """Tell whether a name of a journal or report is one of a file below the folder, also by way of its links."""
    if not name or not name.isprintable() or ".." in Path(name).parts or Path(name).is_absolute():
        return False
    return Path(os.path.realpath((folder / name).parent)).is_relative_to(os.path.realpath(folder))


@contextlib.contextmanager
def locked(
    folder: Path,
    *,
    report: str,
    incomplete: str,
    restart: bool = False,
    soft: bool = False,
    mark: bytes = CONVERTING,
    share: str = "",
) -> Iterator[Destination]:
    """Make the folder if need be and hold its lock.

    Args:
        folder: the destination.
        report: name of the report's file, which marks a finished folder as ours.
        incomplete: name of the file that marks an unfinished one.
        restart: whether what an earlier run left may be thrown away, damaged or not.
        soft: whether a file may be the lock where the file system has no others.
        mark: what the file that marks an unfinished one says.
        share: where several processes write shares, the name of this one's, such as `2-of-8`. The locks are then taken
            at the first `alone`, and whatever several do at a time may be done outside of it.

    Raises:
        DestinationInUse: another process holds it.
        OutputError: the file system has no locks, and `soft` is not asked for.
        DestinationForeign: the path is no folder, or the folder holds something that is not ours.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise DestinationForeign("not a folder", file=folder, remedy="name another one")
    destination = Destination(folder, report=report, incomplete=incomplete, mark=mark, attempt=attempt_at(share))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if share:
        try:
            with destination.shared(share, restart=restart, soft=soft):
                yield destination
        except OutputError:
            _take_away(folder, made=made)
            raise
        return
    destination.refuse_foreign(restart=restart)
    try:
        lock = _take_lock(folder, soft=soft)
    except OutputError:
        _take_away(folder, made=made)
        raise
    try:
        destination.refuse_foreign(restart=restart)
        if not destination.journal():
            destination.forget()  # left by a run that was killed after its very end
        yield destination
    finally:
        with contextlib.suppress(OSError):
            if not destination.journal():
                shutil.rmtree(folder / WORK)
        lock.release()


def _take_away(folder: Path, *, made: bool) -> None:
    """Remove the folders that a refused run made; one that is not empty, or not ours alone, stays."""
    with contextlib.suppress(OSError):
        (folder / WORK).rmdir()
        if made:
            folder.rmdir()


def _take_lock(folder: Path, *, soft: bool) -> Lock:
    work = folder / WORK
    _refuse_link(work)
    while True:
        try:
            work.mkdir(exist_ok=True)
            lock = take(work / LOCK, folder=folder, soft=soft)
        except FileNotFoundError:  # the holder has just finished and removed the folder
            continue
        except FileExistsError:  # the same, between the two steps of mkdir; or a file stands there
            if work.exists() and not work.is_dir():
                raise
            continue
        try:
            refuse_shares(work, folder=folder)
        except OutputError:
            lock.release()
            raise
        if lock.stands():
            return lock
        lock.release()
