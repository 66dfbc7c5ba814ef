"""A prefix of an object store, or of whatever else fsspec knows: `s3://`, `gs://`, `memory://` and the like.

Credentials are found by the store's own library, where its tools have them. An object that was replaced since it was
listed is never read: S3 is asked for its ETag, Google for its generation, and others are looked at again afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.caches import user_cache
from k2quant.checkpoint.files.kinds import REPORT
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.remote import fetching
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.remote.pages import objects_below
from k2quant.checkpoint.remote.place import RemoteFile, check_names
from k2quant.checkpoint.remote.ranges import changed
from k2quant.checkpoint.remote.retrying import Pace, Transient, code_of, retried, status_of, transient
from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import CheckpointError, K2QuantError, MissingExtra, UsageError
from k2quant.ground import pool
from k2quant.ground.extras import Extra, need

_EXTRAS: Mapping[str, Extra] = {"s3": "s3", "gs": "gs"}
_PIECE = 2**24  # bytes of a request; they come as one object of Python before they are where they belong
_CHUNK = 2**20  # bytes of it, at most, that are taken at a time
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "checksum", "mtime", "LastModified", "created")
_REPORT_LIMIT = 1_000_000_000
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class BucketPlace:
    """A folder that fsspec knows."""

    def __init__(self, address: Address, files: Mapping[str, RemoteFile], filesystem: Any) -> None:
        """Keep what was listed; see `open_bucket`."""
        self.address, self.files, self._filesystem = address, files, filesystem
        self._kept: list[tempfile.TemporaryDirectory[str]] = []

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a file's bytes from `start` on; see `Place.read_into`."""
        what = self.address.child(name)
        for begin in range(0, len(buffer), _PIECE):
            pool.check()
            piece = buffer[begin : begin + _PIECE]
            first = start + begin
            piece[:] = retried(what, lambda: self._piece(name, first, first + len(piece)))  # noqa: B023  called at once

    def fetch(self, name: str, target: Path, *, add: Callable[[int], None]) -> None:
        """Have a whole file at `target`, or nothing; see `Place.fetch`."""
        fetching.fetch(self, name, target, add=add)

    def local(self, name: str) -> Path | None:  # noqa: ARG002
        """Return None: nothing of a store lies here."""
        return None

    def folder(self, names: Iterable[str]) -> Path:
        """Return a folder in the user's cache with these files, as they were listed.

        Raises:
            CheckpointError: one cannot be read.
            OutputError: one cannot be written.
        """
        wanted = [self.files[name] for name in names]
        said = "\n".join(f"{file.name} {file.size} {file.version}" for file in sorted(wanted))
        mark = hashlib.sha256(f"{self.address}\n{said}".encode()).hexdigest()[:40]
        folder = self._cache() / mark
        fetching.fetch_all(self, [file.name for file in wanted], folder, aside=folder.parent, mode=0o700)
        self._note_digests(folder)
        return folder

    def _cache(self) -> Path:
        cache = user_cache()
        if cache is not None:
            return cache / "places"
        self._kept.append(tempfile.TemporaryDirectory(prefix="k2quant-"))
        return Path(self._kept[-1].name)

    def _note_digests(self, folder: Path) -> None:
        """Take digests of files from the report of a conversion, where it has some: a store has none of its own."""
        report = folder / REPORT
        if not report.is_file():
            return
        try:
            known = parse_object(read_limited(report, _REPORT_LIMIT), file=report).get("files")
        except CheckpointError:  # whoever reads the report will say so
            return
        for name, facts in known.items() if isinstance(known, dict) else ():
            file, digest = self.files.get(name), facts.get("sha256") if isinstance(facts, dict) else None
            if file is None or not isinstance(digest, str) or facts.get("size") != file.size:
                continue
            if _SHA256.fullmatch(digest):  # what is none says nothing of the file
                self.files = {**self.files, name: file._replace(sha256=digest.lower())}

    def _piece(self, name: str, start: int, stop: int) -> bytes:
        """Return a file's bytes, if it is the one that was listed.

        Raises:
            Transient: fewer came.
            CheckpointError: it is another, or cannot be read.
        """
        what = self.address.child(name)
        try:
            data = self._bytes(self.files[name], f"{self._root()}/{name}", start, stop)
        except Exception as error:  # noqa: BLE001  libraries of stores raise what they like
            if status_of(error) == 412 or isinstance(error, FileExistsError):
                raise changed(what, "the object that was listed", "another one under its name") from None
            raise _explained(error, what) from None
        if len(data) < stop - start:
            raise Transient(f"{len(data):,} bytes where {stop - start:,} were asked for")
        if len(data) > stop - start:
            raise CheckpointError("gives more bytes than were asked for", file=what)
        return data

    def _bytes(self, file: RemoteFile, path: str, start: int, stop: int) -> bytes:
        filesystem = self._filesystem
        if self.address.scheme == "s3":
            from fsspec.asyn import sync

            found: bytes = sync(filesystem.loop, _of_s3, filesystem, path, file.version, start, stop)
            return found
        if self.address.scheme == "gs":
            return bytes(filesystem.cat_file(path, start=start, end=stop, generation=file.version))
        data = bytes(filesystem.cat_file(path, start=start, end=stop))
        now = _listed(file.name, filesystem.info(path))
        if (now.size, now.version) != (file.size, file.version):
            raise changed(self.address.child(file.name), f"{file.size:,} bytes", f"{now.size:,} bytes, changed since")
        return data

    def _root(self) -> str:
        return root_of(self._filesystem, self.address)


async def _of_s3(filesystem: Any, path: str, version: str, start: int, stop: int) -> bytes:
    """Return bytes of an object as long as its ETag is the one that was listed (RFC 9110, 13.1.1)."""
    bucket, key, _ = filesystem.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", "IfMatch": version}
    answer = await filesystem._call_s3("get_object", **asked)  # noqa: SLF001  its own cat_file knows no IfMatch
    data, pace = bytearray(), Pace()
    async with answer["Body"] as body:
        while len(data) <= stop - start and (chunk := await body.read(_CHUNK)):
            data += chunk
            if pace.is_slow(len(chunk)):
                raise Transient("an answer that comes too slowly")
    return bytes(data)


def open_bucket(address: Address) -> BucketPlace:
    """List what lies below an address.

    Raises:
        CheckpointError: nothing does, or it may not be read.
        MissingExtra: the store's library is not installed.
    """
    filesystem = filesystem_of(address)
    root, what = root_of(filesystem, address), str(address)
    try:
        found = _s3_listing(filesystem, root, what) if address.scheme == "s3" else _listing(filesystem, root, what)
    except FileNotFoundError as error:
        if code_of(error) == "NoSuchBucket":
            raise CheckpointError("there is no such bucket", file=address, remedy="look at its name") from None
        found = {}
    except Exception as error:  # noqa: BLE001  libraries of stores raise what they like
        raise _explained(error, what) from None
    files = {name: _listed(name, facts) for name, facts in found.items()}
    if not files:
        raise CheckpointError("nothing is there", file=address, remedy="look at the bucket's name and at the prefix")
    check_names(address, files)
    return BucketPlace(address, files, filesystem)


def _listing(filesystem: Any, root: str, what: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        filesystem.invalidate_cache()
        found: dict[str, Any] = filesystem.find(root, detail=True)
        return found

    found = {path.removeprefix(root).removeprefix("/"): facts for path, facts in retried(what, ask).items()}
    return {name: facts for name, facts in found.items() if name and facts.get("type") == "file"}


def _s3_listing(filesystem: Any, root: str, what: str) -> Mapping[str, Mapping[str, Any]]:
    def ask(asked: dict[str, Any]) -> Mapping[str, Any]:
        page: Mapping[str, Any] = retried(what, lambda: filesystem.call_s3("list_objects_v2", **asked))
        return page

    return objects_below(ask, root, what)


def filesystem_of(address: Address) -> Any:
    """Return fsspec's file system of an address, which finds credentials by itself.

    Raises:
        MissingExtra: the library that it needs is not installed.
        UsageError: it cannot be used as it is, for lack of settings.
    """
    if extra := _EXTRAS.get(address.scheme):
        need(extra, f"{address.scheme}://")
    import fsspec

    if not (logger := logging.getLogger("gcsfs")).handlers:
        logger.addHandler(logging.NullHandler())  # else Python shows what it logs: a traceback of each try, uncleaned
    try:
        # A new one: one that another opening left knows endpoint and credentials as they were then.
        return fsspec.filesystem(address.scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise MissingExtra(f"{address.scheme}:// needs a package that is not installed", found=str(error)) from None
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{address.scheme}:// cannot be used: {clean(' '.join(str(error).split()))[:300]}") from None


def root_of(filesystem: Any, address: Address) -> str:
    """Return an address as its file system names it."""
    return str(filesystem._strip_protocol(str(address))).rstrip("/")  # noqa: SLF001  there is no other name for it


def _listed(name: str, facts: Mapping[str, Any]) -> RemoteFile:
    said = next((facts[key] for key in _VERSIONS if facts.get(key) is not None), "")
    version = said.timestamp() if hasattr(said, "timestamp") else said
    size = facts.get("size")
    return RemoteFile(name, size if isinstance(size, int) else -1, None, str(version))


def _explained(error: Exception, what: str) -> Exception:
    """Return what a library says as an error of ours; what may pass stays what it is, for `retried` to see."""
    if isinstance(error, K2QuantError) or transient(error) is not None:
        return error
    said = clean(" ".join(str(error).split()))[:300] or type(error).__name__
    if isinstance(error, FileNotFoundError) or status_of(error) == 404:
        return CheckpointError("is not there", file=what, found=said)
    if isinstance(error, PermissionError) or status_of(error) in {401, 403} or "credentials" in said.lower():
        remedy = "credentials come from where the store's own tools have them: environment, profile, instance"
        return CheckpointError("may not be read", file=what, found=said, remedy=remedy)
    return CheckpointError("cannot be read", file=what, found=said)
