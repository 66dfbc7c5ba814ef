"""Open only what lies inside the folder that was named, and write files that are whole or not there."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from k2quant.checkpoint.files.pointers import POINTER_LIMIT, refuse_pointer
from k2quant.errors import CheckpointError, DestinationForeign, MalformedFile, OutputError, UnsafePath

PARTIAL = ".partial"
"""Suffix of a file that is being written; it is renamed when it is whole and on the disk."""


def boundary(folder: Path) -> Path:
    """Return the folder that links may not leave.

    That is the checkpoint's own folder, or, for a snapshot in a Hugging Face cache (`models--x/snapshots/REV`, whose
    files are links to `models--x/blobs`), the repository's folder in that cache.
    """
    real = folder.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real


def inside(folder: Path, name: str, *, follow_links: bool | None = None) -> Path:
    """Return the path of a file of the folder, refusing names and links that lead out of it.

    Args:
        folder: the checkpoint's folder.
        name: a plain file name, as an index holds it.
        follow_links: whether a link may lead anywhere; a name never may. None: no, and nobody can allow it.

    Raises:
        UnsafePath: the name has a separator, is `.` or `..`, or the file is a link out of the folder.
    """
    if name in {"", ".", ".."} or "/" in name or "\\" in name or not name.isprintable():
        raise UnsafePath(
            "not a plain file name", file=repr(name), remedy="a checkpoint's files lie directly in its folder"
        )
    path = folder / name
    check_inside(folder, path, follow_links=follow_links)
    return path


def check_inside(folder: Path, path: Path, *, follow_links: bool | None = None) -> None:
    """Refuse a path whose links lead out of the folder, or nowhere but to themselves.

    Args:
        folder: the folder.
        path: of a file in it.
        follow_links: whether links may lead anywhere; None: no, and nobody can allow it.

    Raises:
        UnsafePath: it does.
        CheckpointError: it is a link to nothing.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        found = error.strerror if isinstance(error, OSError) else "links that lead back to themselves"
        raise UnsafePath("cannot be resolved", file=path, found=found, remedy="remove or mend the link") from error
    if not follow_links and not real.is_relative_to(boundary(folder)):
        switch = ", or, if all its links are your own, say `follow_links=True`"
        remedy = "copy the file into the folder" + ("" if follow_links is None else switch)
        raise UnsafePath("a link that leaves the folder", file=path, found=real, remedy=remedy)
    if path.is_symlink() and not real.exists():  # else whoever looks finds nothing, and goes on without it
        raise CheckpointError(
            "a link to a file that is not there", file=path, found=real, remedy="fetch that file, or remove the link"
        )


def nearest_folder(path: Path) -> Path:
    """Return a folder, or the nearest above it that is there: the disk on which it will lie."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))  # noqa: PTH112  it never raises


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        MalformedFile: it is a folder, pipe, socket or device, or a pointer that only says where the content is.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
    try:
        with _named(path):
            _check_content(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of an error of reading or writing which file it was: of an open one the kernel does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _check_content(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise MalformedFile("not a regular file", file=path)
    if status.st_size <= POINTER_LIMIT:
        refuse_pointer(path, os.pread(descriptor, POINTER_LIMIT, 0))


def read_limited(path: Path, limit: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        MalformedFile: it is larger than `limit` bytes, or no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file, _named(path):
        data = file.read(limit + 1)
    if len(data) > limit:
        raise MalformedFile("too large", file=path, expected=f"at most {limit:,} bytes")
    return data


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path, attempt: str = "") -> Path:
    """Return where a file is written until it is whole; where several may write it, each says its own `attempt`."""
    return path.with_name(f"{path.name}.{attempt}{PARTIAL}" if attempt else path.name + PARTIAL)


def partials(path: Path) -> list[Path]:
    """Return what was left of a file, or is being written of it, by whatever attempt."""
    return [
        *([whole] if os.path.lexists(whole := partial_of(path)) else []),
        *sorted(path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}")),
    ]


@contextlib.contextmanager
def replacing(path: Path, attempt: str = "") -> Iterator[int]:
    """Give a descriptor of `partial_of` a path; flush and rename it to `path` when the block ends well."""
    partial = partial_of(path, attempt)
    partial.unlink(missing_ok=True)  # never write through a link that stands there
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        with _named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.rename(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def as_output_error(folder: Path) -> Iterator[None]:
    """Have what the system says against writing come as an error of ours, which names the file or else the folder.

    Raises:
        OutputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise OutputError("cannot be written", file=error.filename or folder, found=found) from error


def write_whole(path: Path, data: bytes, attempt: str = "") -> None:
    """Write a small file so that it is whole or not there; see `partial_of` for `attempt`."""
    with replacing(path, attempt) as descriptor, _named(path):
        write_all(descriptor, data, 0)


_AT_ONCE = 2**19
"""Bytes of one write. Linux takes larger pages for larger writes, up to those that a virtual machine gives back to its
host as soon as they are free and has to ask for again (seen with 6.18, ext4 and free page reporting); and a thread that
waits for the file gets it sooner."""


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset; the kernel may take fewer at once."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view[:_AT_ONCE], offset)
        view, offset = view[written:], offset + written


def refuse_foreign(
    folder: Path, marks: Iterable[str], message: str, *, remedy: str | None = None, listed: bool = False
) -> None:
    """Refuse a folder that holds anything, unless a file of ours marks it; one that is not there is nobody's.

    Args:
        folder: where something is to be written.
        marks: names of files, any of which says that the folder is ours.
        message: what to say of a folder that is not.
        remedy: what to do then.
        listed: whether the message names what lies there.

    Raises:
        DestinationForeign: so it is.
    """
    if not folder.is_dir() or any((folder / name).is_file() for name in marks):
        return
    foreign = sorted(path.name for path in folder.iterdir())
    if foreign:
        raise DestinationForeign(message, file=folder, found=", ".join(foreign[:5]) if listed else None, remedy=remedy)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file so that the copy is whole or not there; folders on the way to it are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        os.fdopen(open_regular(source), "rb") as reader,
        replacing(target) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as writer,
    ):
        shutil.copyfileobj(reader, writer)
