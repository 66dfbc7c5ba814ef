"""A place that lies in memory, and pieces small enough for small files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.remote.place import RemoteFile
from k2quant.checkpoint.supply import ahead, blocks, choosing, order, supply

PIECE, BLOCK = 4096, 512


class MemoryPlace:
    """Files in memory, as a place; it notes what is read, and may lie."""

    def __init__(self, files: Mapping[str, bytes], *, known: bool = True) -> None:
        """Take the files; `known`: whether the place says what their sha256 is."""
        self.data = dict(files)
        self.address = Address("memory", "place")
        self.files = {
            name: RemoteFile(name, len(data), hashlib.sha256(data).hexdigest() if known else None, "1")
            for name, data in files.items()
        }
        self.read: list[tuple[str, int, int]] = []
        self.fetched: list[str] = []
        self.before: Callable[[str], None] = lambda _: None
        """Called with a file's name before it is fetched whole."""
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Give bytes of a file."""
        with self._lock:
            self.read.append((name, start, len(buffer)))
        buffer[:] = self.data[name][start : start + len(buffer)]

    def fetch(self, name: str, target: Path, *, add: Callable[[int], None]) -> None:
        """Write a file."""
        self.before(name)
        target.write_bytes(self.data[name])
        self.fetched.append(name)
        add(len(self.data[name]))


@pytest.fixture
def small() -> Iterator[None]:
    """Have pieces of 4 KiB and blocks of 512 bytes, and room for eight pieces."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (order, ahead, supply, choosing):
            patch.setattr(module, "PIECE_BYTES", PIECE)
        for module in (blocks, supply):
            patch.setattr(module, "BLOCK_BYTES", BLOCK)
        for module in (ahead, choosing):
            patch.setattr(module, "AHEAD_BYTES", 8 * PIECE)
        yield


@pytest.fixture
def memory_place() -> type[MemoryPlace]:
    """The class of places in memory."""
    return MemoryPlace
