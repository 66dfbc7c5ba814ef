"""An object store as an output needs it: a prefix below which objects are written whole, listed and deleted.

A store has no rename and no locks. What it has: an object appears when all of it was taken, never before, and one can
ask that it be written only where none stands. `Objects` is that little, by fsspec; `s3` does more where S3 can.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.remote.bucket import filesystem_of, root_of
from k2quant.checkpoint.remote.retrying import code_of, retried, status_of, transient
from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import CheckpointError, K2QuantError, OutputError

T = TypeVar("T")

_REFUSED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired"}
"""Errors of S3 that speak of credentials with a status that others have too (AWS, Error responses)."""
_AGAIN = "when that is mended, run the same command again: it resumes"


class Upload(NamedTuple):
    """An upload in parts that was begun and neither completed nor aborted; its parts are stored, and paid for."""

    name: str
    """Of the object that it would make, below the prefix."""
    id: str
    begun: str
    """When, as the store says it."""


class Objects:
    """What lies below an address, by fsspec alone."""

    def __init__(self, address: Address) -> None:
        """Find the store's library and its credentials.

        Raises:
            MissingExtra: the library is not installed.
        """
        self.address = address
        self._filesystem = self._opened()
        self._root = root_of(self._filesystem, address)

    def _opened(self) -> Any:
        return filesystem_of(self.address)

    def listed(self, under: str = "") -> dict[str, int]:
        """Return the sizes in bytes of all objects below the prefix, or below a folder of it, by name."""

        def ask() -> dict[str, int]:
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.find(self._path(under), detail=True)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return {}
            files = {path: facts for path, facts in found.items() if facts.get("type") == "file"}
            return {
                path.removeprefix(self._root).removeprefix("/"): int(facts["size"]) for path, facts in files.items()
            }

        return self._asked(under, ask)

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; None where there is none."""

        def ask() -> int | None:
            self._filesystem.invalidate_cache()
            try:
                facts = self._filesystem.info(self._path(name))
            except FileNotFoundError:
                return None
            return int(facts["size"]) if facts.get("type") == "file" else None

        return self._asked(name, ask)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return an object's bytes; None where there is none.

        Raises:
            OutputError: it is larger than `limit` bytes.
        """

        def ask() -> bytes | None:
            try:
                return bytes(self._filesystem.cat_file(self._path(name), start=0, end=limit + 1))
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return None
            except OSError as error:
                if status_of(error) == 416:  # an empty object has no first byte
                    return b""
                raise

        data = self._asked(name, ask)
        if data is not None and len(data) > limit:
            raise OutputError("too large", file=self.named(name), expected=f"at most {limit:,} bytes")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small object."""
        self._asked(name, lambda: self._filesystem.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object if none stands there; tell whether it was written, as far as the answer came."""

        def ask() -> bool:
            try:
                self._filesystem.pipe_file(self._path(name), data, mode="create")
            except OSError as error:
                if isinstance(error, FileExistsError) or status_of(error) == 412:
                    return False
                raise
            return True

        return self._asked(name, ask)

    def upload(self, name: str, descriptor: int, size: int) -> None:
        """Write an object of any size from an open file, and see that all of it stands there.

        Args:
            name: below the prefix.
            descriptor: of the file.
            size: its bytes.
        """
        self._asked(name, lambda: self._filesystem.put_file(f"/proc/self/fd/{descriptor}", self._path(name)))
        self._check(name, size)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are passed over."""
        for name in names:

            def ask(name: str = name) -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._path(name))

            self._asked(name, ask)

    def uploads(self) -> list[Upload]:
        """Return the uploads below the prefix that are not over; none where the store ends them by itself."""
        return []

    def abort(self, uploads: Iterable[Upload]) -> None:
        """End uploads, so that the store forgets their parts."""

    def named(self, name: str) -> str:
        """Return an object's address, for messages."""
        return self.address.child(name) if name else str(self.address)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _check(self, name: str, size: int) -> None:
        """Refuse an object that is not as long as what was sent."""
        found = self.size(name)
        if found != size:
            is_there = "nothing" if found is None else f"{found:,} bytes"
            raise OutputError("came to the store otherwise than it was sent", file=self.named(name),
                              expected=f"{size:,} bytes", found=is_there, remedy=_AGAIN)  # fmt: skip

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        """Return what a store answers, asked again while it cannot for a moment.

        Raises:
            OutputError: it cannot, or says no.
        """
        what = self.named(name)
        with explained(what):
            return retried(what, ask)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Have what a store's library raises come as an error of ours, without anything that is secret.

    Raises:
        OutputError: in place of it.
    """
    try:
        yield
    except OutputError:
        raise
    except CheckpointError as error:  # what `retried` ends with
        raise OutputError(error.message, file=error.file, found=error.found, remedy=_AGAIN) from None
    except K2QuantError:
        raise
    except Exception as error:  # noqa: BLE001  libraries of stores raise what they like
        raise _explained(error, what) from None


def _explained(error: Exception, what: str) -> OutputError:
    said = clean(" ".join(str(error).split()))[:300] or type(error).__name__
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and "bucket" in said.lower()):
        return OutputError(
            "there is no such bucket", file=what, found=said, remedy="make it first, or look at its name"
        )
    if code in _REFUSED or status in {401, 403} or isinstance(error, PermissionError) or "credentials" in said.lower():
        remedy = (
            "credentials come from where the store's own tools have them: environment, profile, instance; with better "
            "ones the same command resumes"
        )
        return OutputError("may not be written or read", file=what, found=said, remedy=remedy)
    if isinstance(error, OSError) and transient(error) is None and status is None and error.errno is not None:
        said = clean(error.strerror or said)
    return OutputError("cannot be written or read", file=what, found=said, remedy=_AGAIN)


def pieces_of(size: int, piece: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, from 1, first byte and length of the pieces of a file."""
    for number, start in enumerate(range(0, size, piece), 1):
        yield number, start, min(piece, size - start)


def read_piece(descriptor: int, start: int, length: int) -> bytes:
    """Return bytes of an open file.

    Raises:
        OSError: it cannot be read, or is shorter.
    """
    data = bytearray()
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), start + len(data))
        if not more:
            raise OSError("the spool file is shorter than it was")
        data += more
    return bytes(data)
