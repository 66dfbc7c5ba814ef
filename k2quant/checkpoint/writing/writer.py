"""Write one shard from any thread, in any order, so that it is whole or not there."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from k2quant.checkpoint.files.paths import partial_of, sync_folder, write_all

FLUSH_BYTES = 2**28
"""Bytes after which a writer asks to be flushed, so that the disk works while the codecs do."""


class OpenShard:
    """An open file that is filled with a shard; subclasses say where it lies and what becomes of it."""

    def __init__(self, descriptor: int, header: bytes, size: int) -> None:
        """Give a file its full size and write the header.

        Args:
            descriptor: of the file, open for reading and writing; it is this one's to close.
            header: its first bytes.
            size: bytes of the whole file.

        Raises:
            OSError: it cannot be written.
        """
        self._file = descriptor
        self._lock = threading.Lock()
        self._unflushed = 0
        try:
            os.ftruncate(self._file, size)
            write_all(self._file, header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> bool:
        """Write bytes at an offset; tell whether it is time for `flush`.

        Raises:
            OSError: the disk is full or fails.
        """
        with self._lock:  # the system takes one write of a file at a time, too, but lets the others spin
            write_all(self._file, data, offset)
            self._unflushed += len(data)
            due = self._unflushed >= FLUSH_BYTES
            if due:
                self._unflushed = 0
        return due

    def flush(self) -> None:
        """Push what was written to the disk."""
        os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)

    def sha256(self) -> str:
        """Return the digest of the whole file as it stands."""
        digest, position, piece = hashlib.sha256(), 0, 2**22
        while data := os.pread(self._file, piece, position):
            digest.update(data)
            position += len(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file without giving it its name; harmless after `finish`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ShardWriter(OpenShard):
    """A shard whose header is known beforehand; tensors are written to their offsets as they are ready."""

    def __init__(self, path: Path, header: bytes, size: int, attempt: str = "") -> None:
        """Create the partial file at its full size and write the header.

        Args:
            path: the file's final path.
            header: its first bytes.
            size: bytes of the whole file.
            attempt: as in `partial_of`, where others may write the same shard at the same time.

        Raises:
            OSError: it cannot be created.
        """
        self.path = path
        self._partial = partial_of(path, attempt)
        self._partial.unlink(missing_ok=True)  # never write through a link that stands there
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        super().__init__(descriptor, header, size)

    def finish(self) -> None:
        """Flush the file and give it its name. Nothing may be written afterwards."""
        os.fsync(self._file)
        self.close()
        self._partial.rename(self.path)
        sync_folder(self.path.parent)
