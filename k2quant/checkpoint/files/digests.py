"""Digests of files that were read once, noted with what the file system said of them, and taken while it says so.

A terabyte is an hour of reading. As git's index does, a note holds a file's size, its inode, and its times of content
and of change: whoever writes to a file, replaces it, copies it or sets its times back changes the last of these, which
no program can set. Notes lie with the user's other caches, in files of the user's own, and not beside a checkpoint,
where whoever may write the weights could write the note too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from k2quant.checkpoint.files.caches import user_cache
from k2quant.checkpoint.files.paths import open_regular, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError

SETTLED = 2_000_000_000
"""Nanoseconds that a file must have stood unchanged: within the coarsest tick of a file system, FAT's two seconds, a
second change would leave its times as they are."""

_BLOCK = 2**24  # bytes read at once
_LIMIT = 4096  # bytes of a note


def file_digest(path: Path, *, reread: bool = False, add: Callable[[int], None] = lambda _: None) -> tuple[str, bool]:
    """Return the SHA-256 of a file, in hex, and whether it was noted before; else every byte is read, and it is noted.

    Args:
        path: of the file.
        reread: whether to read it whatever was noted.
        add: called with counts of bytes that are done.

    Raises:
        MalformedFile: it is no regular file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not reread and (known := noted(status)):
            add(status.st_size)
            return known, True
        begun, found = time.time_ns(), hashlib.sha256()
        while block := file.read(_BLOCK):
            found.update(block)
            add(len(block))
        after = os.fstat(file.fileno())
    if _signature(status) == _signature(after) and begun - max(status.st_mtime_ns, status.st_ctime_ns) >= SETTLED:
        note(status, found.hexdigest())
    return found.hexdigest(), False


def note(status: os.stat_result, digest: str) -> None:
    """Note the digest of a file, if notes can be kept at all; where they cannot, it is read again another time.

    Args:
        status: of the file when it held what the digest is of.
        digest: its SHA-256, in hex.
    """
    text = json.dumps({"file": _signature(status), "sha256": digest})
    path = _place(status)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def noted(status: os.stat_result) -> str | None:
    """Return the digest that was noted of a file, if it is the same file, unchanged, and the note is the user's own."""
    path = _place(status)
    if path is None:
        return None
    try:
        mine = path.lstat()
        if mine.st_uid != os.geteuid() or mine.st_mode & 0o022:
            return None
        found = parse_object(read_limited(path, _LIMIT), file=path)
    except (OSError, CheckpointError):
        return None
    digest = found.get("sha256")
    whole = isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return str(digest) if whole and found.get("file") == _signature(status) else None


def _signature(status: os.stat_result) -> list[int]:
    """Return what changes with a file: its device, inode, size, and times in nanoseconds."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _place(status: os.stat_result) -> Path | None:
    """Return where a file's note lies: by its inode, so that it stays known when its folder is renamed.

    None where there is no cache.
    """
    caches = user_cache()
    return None if caches is None else caches / "digests" / f"{status.st_dev:x}-{status.st_ino:x}.json"
