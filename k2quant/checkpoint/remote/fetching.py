"""Whole files of a place: pieces that are read several at a time, written in order, and hashed on the way."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from k2quant.checkpoint.files.paths import PARTIAL, sync_folder, write_all
from k2quant.checkpoint.remote.place import Place, RemoteFile
from k2quant.errors import CheckpointError, MalformedFile, OutputError
from k2quant.ground import pool

_PIECE = 2**24  # bytes of a request
_SYNCED = 2**28
"""Bytes after which a file whose digest nobody knows is pushed to the disk: what stands before that is what came, even
after a power cut, and is gone on from."""
_ABREAST = 4  # requests of one file at a time; with their pieces that is 64 MiB
_FILES_ABREAST = 8  # small files that are fetched at a time


def marked(target: Path, file: RemoteFile) -> Path:
    """Return the path of one version of a file, beside that of the file: so no two contents are ever mixed."""
    mark = "." + hashlib.sha256(f"{file.version} {file.size}".encode()).hexdigest()[:12]
    return target if target.name.endswith(mark) else target.with_name(target.name + mark)


def partial_path(target: Path, file: RemoteFile) -> Path:
    """Return where a file grows."""
    found = marked(target, file)
    return found.with_name(found.name + PARTIAL)


def fetch(place: Place, name: str, target: Path, *, add: Callable[[int], None]) -> None:
    """Have a whole file at `target`, or nothing; see `Place.fetch`."""
    file = place.files[name]
    partial = partial_path(target, file)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            digest = _fetched(place, file, descriptor, add)
            os.fsync(descriptor)
            blob = None if file.blob is None else _blob(descriptor, file.size)
        finally:
            os.close(descriptor)
        for kind, expected, found in (("sha256", file.sha256, digest), ("git's id", file.blob, blob)):
            if expected is not None and found != expected:
                partial.unlink()
                raise wrong_digest(place.address.child(name), expected, str(found), kind=kind)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        found, remedy = error.strerror or str(error), "when that is mended, run the same command again"
        raise OutputError("cannot be written", file=error.filename or target, found=found, remedy=remedy) from error


def fetch_all(place: Place, names: Sequence[str], folder: Path, *, aside: Path, mode: int = 0o777) -> None:
    """Have some small files in a folder of a cache.

    Args:
        place: where they are.
        names: their paths below it, and below the folder.
        folder: is made if need be, with `mode`.
        aside: a folder above it, where each comes first: another process may do the same.
        mode: of the folder.

    Raises:
        CheckpointError: one cannot be read, or is not the file that was listed.
        OutputError: one cannot be written.
    """

    def is_here(name: str) -> bool:
        target = folder / name
        return target.is_file() and target.stat().st_size == place.files[name].size

    def have(task: tuple[Path, str]) -> None:
        first, name = task
        first.mkdir()
        place.fetch(name, first / "file", add=lambda _: None)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (first / "file").replace(folder / name)

    try:
        missing = [name for name in names if not is_here(name)]
        if not missing and folder.is_dir():  # a cache may be one that nobody may write to
            return
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=aside) as own:
            tasks = ((Path(own) / str(number), name) for number, name in enumerate(missing))
            pool.run(tasks, have, workers=min(_FILES_ABREAST, max(len(missing), 1)))
    except OSError as error:
        found = error.strerror or str(error)
        raise OutputError("the cache cannot be written", file=error.filename, found=found) from error


def wrong_digest(what: str, expected: str, found: str, *, kind: str = "sha256") -> CheckpointError:
    """Return what is said of a file whose digest is not the one that its place names."""
    return MalformedFile(
        "the content is not what the place says that it is",
        file=what,
        expected=f"{kind} {expected}",
        found=found,
        remedy="run the same command again, which fetches it anew; if that says the same, the file is damaged there, "
        "or a proxy changes it",
    )


def _fetched(place: Place, file: RemoteFile, descriptor: int, add: Callable[[int], None]) -> str:
    """Write what a file lacks; return the sha256 of all of it."""
    found = hashlib.sha256()
    sure = _PIECE if file.sha256 is not None else _SYNCED  # what a power cut left may end in zeros
    begun = max(min(os.fstat(descriptor).st_size, file.size) - 1, 0) // sure * sure
    os.ftruncate(descriptor, begun)
    for start in range(0, begun, _PIECE):
        found.update(os.pread(descriptor, _PIECE, start))
    for start, piece in _pieces(place, file, begun):
        write_all(descriptor, memoryview(piece), start)
        found.update(piece)
        add(len(piece))
        if file.sha256 is None and (start + len(piece)) % _SYNCED == 0:
            os.fsync(descriptor)
    return found.hexdigest()


def _blob(descriptor: int, size: int) -> str:
    """Return git's id of a file's content."""
    found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for start in range(0, size, _PIECE):
        found.update(os.pread(descriptor, _PIECE, start))
    return found.hexdigest()


def _pieces(place: Place, file: RemoteFile, begun: int) -> Iterator[tuple[int, bytearray]]:
    """Yield pieces of a file in order, with where they begin."""

    def read(start: int) -> tuple[int, bytearray]:
        piece = bytearray(min(_PIECE, file.size - start))
        place.read_into(file.name, start, memoryview(piece))
        return start, piece

    waiting: deque[Future[tuple[int, bytearray]]] = deque()
    with ThreadPoolExecutor(_ABREAST, thread_name_prefix="k2quant-fetch") as threads:
        try:
            for start in range(begun, file.size, _PIECE):
                waiting.append(threads.submit(pool.handed(read), start))
                if len(waiting) == _ABREAST:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
