"""What a place is: a checkpoint's files somewhere else, listed once, read by range, or fetched whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from k2quant.checkpoint.remote.address import Address
from k2quant.errors import CheckpointError, UnsafePath

MOST_FILES = 100_000
"""Files of a place; more are an attempt to keep the reader busy. K2 has some 90."""
_LONGEST = 1024  # characters of a name
_LARGEST = 2**50  # bytes of a file


class RemoteFile(NamedTuple):
    """A file of a place."""

    name: str
    """Path below the place, with `/` between folders."""
    size: int
    """Bytes."""
    sha256: str | None
    """Digest of the content, in hexadecimal, where the place knows it."""
    version: str
    """What changes when the content does: an object id, an ETag, a time of change."""
    blob: str | None = None
    """Git's id of the content, in hexadecimal, of a file that git holds itself and the place knows by that."""


class Place(Protocol):
    """A checkpoint's folder that is no local one."""

    @property
    def address(self) -> Address:
        """Where it is; on a hub with its commit as the revision, whatever was asked for."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """Its files, by their paths below it."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a file's bytes from `start` on, from any thread; tried again where that may help.

        Raises:
            CheckpointError: they cannot be read, or the file is not the one that was listed any more.
        """

    def fetch(self, name: str, target: Path, *, add: Callable[[int], None]) -> None:
        """Have a whole file at `target`, or nothing; it grows beside that, and an earlier call's part is taken up.

        Args:
            name: of the file.
            target: where it is to lie; its folder is there.
            add: called with counts of bytes as they come; what lay there is none of them.

        Raises:
            CheckpointError: it cannot be read, is not the file that was listed, or has another sha256.
            OutputError: it cannot be written.
        """


def check_names(address: Address, files: Mapping[str, RemoteFile]) -> None:
    """Refuse what a hostile listing says: names that lead elsewhere, sizes that no file has.

    Raises:
        UnsafePath: a name is no plain relative path.
        CheckpointError: there are too many, or a size is impossible.
    """
    if len(files) > MOST_FILES:
        raise CheckpointError(
            "too many files for a checkpoint", file=address, expected=f"at most {MOST_FILES:,}", found=f"{len(files):,}"
        )
    for name, file in files.items():
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or len(name) > _LONGEST or any(p in {"", ".", ".."} for p in parts):
            raise UnsafePath("a name that leads out of it", file=address, found=ascii(name)[:200])
        if not 0 <= file.size <= _LARGEST:
            raise CheckpointError("a size that no file has", file=address.child(name), found=f"{file.size:,} bytes")
