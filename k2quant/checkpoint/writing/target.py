"""What a conversion asks of the place that it writes to, be it a folder or a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from k2quant.checkpoint.remote.address import Address


class Room(NamedTuple):
    """What a disk must have free for what is missing of an output."""

    where: Path
    """A folder on that disk."""
    needed: int
    """Bytes; negative where what will be replaced is larger."""
    free: int
    """Bytes."""
    remedy: str
    """What to do where that is less than what is needed."""


class Writer(Protocol):
    """A shard in the making, filled from any thread and in any order; whole or not there."""

    def write(self, offset: int, data: memoryview) -> bool:
        """Write bytes at an offset; tell whether it is time for `flush`."""

    def flush(self) -> None:
        """Push what was written to the disk."""

    def sha256(self) -> str:
        """Return the digest of the whole shard as it stands."""

    def finish(self) -> None:
        """Have the shard stand at the target under its name. Nothing may be written afterwards."""

    def close(self) -> None:
        """Let go of it without giving it its name; harmless after `finish`."""


class Target(Protocol):
    """A place that this process holds locked; files are named by their paths below it.

    What it says goes wrong is an OutputError or an OSError.
    """

    abreast: int
    """How many shards are written at a time, at most."""

    @property
    def spot(self) -> Path | Address:
        """Where it is, as messages name it."""

    @property
    def stage(self) -> Path:
        """A folder of this machine, there or not, for shards of a source that lie on the disk while they are read."""

    def named(self, name: str) -> Path | str:
        """Return where a file is, as messages name it."""

    def size(self, name: str, *, links: bool = True) -> int | None:
        """Return the bytes of a file that stands there; None where none does, or a link that will not do."""

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file that stands there; None where none does, or one of more bytes than `limit`."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file so that it is whole or not there."""

    def copy(self, source: Path, name: str) -> None:
        """Copy a local file so that the copy is whole or not there."""

    def facts(self, name: str, *, sha256: bool) -> dict[str, Any]:
        """Return what a report says of a file that was copied there: its size and, where asked for, its SHA-256."""

    def writer(self, file: str, header: bytes, size: int) -> Writer:
        """Begin a shard.

        Args:
            file: its name.
            header: its first bytes.
            size: bytes of the whole.
        """

    def keep_digest(self, file: str, sha256: str) -> None:
        """Note the digest of a shard that has just been written, for whoever asks for it later."""

    def room(self, shards: Mapping[str, int], more: int) -> Room:
        """Return what a disk must have free for an output, and what it has.

        Args:
            shards: sizes in bytes of the shards that are missing, by name.
            more: bytes of the files beside them.
        """

    def sweep(self, files: Iterable[str]) -> None:
        """Delete what killed attempts left of these files; none of them is being written."""

    def delete(self, files: Sequence[str]) -> None:
        """Delete those of these files that are there."""

    def finished_report(self) -> dict[str, Any] | None:
        """Return the report of a finished conversion, or None while there is none of ours."""

    def journal(self) -> list[dict[str, Any]]:
        """Return the journal's records, the first of which says what is being made; empty when nothing was begun."""

    def begin(self, records: list[dict[str, Any]]) -> None:
        """Write the journal anew with these records and mark the target as unfinished."""

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the journal."""

    def alone(self) -> AbstractContextManager[None]:
        """Do what one process may do at a time, where several write shares; they wait for one another."""

    def refuse_others(self) -> None:
        """Refuse to throw away what other processes are writing."""

    def spread(self) -> None:
        """Have room for the notes of several processes, each of which notes the shards that it has finished."""

    def clear(self, files: list[str]) -> None:
        """Delete these files of an earlier conversion, finished or not, and what it kept to go on from."""

    def finish(self) -> None:
        """Take away every mark of an unfinished conversion, the journal last."""

    def refuse_foreign(self, *, restart: bool = False) -> None:
        """Refuse a place that holds anything, unless it is ours."""
