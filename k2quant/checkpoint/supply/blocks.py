"""Checksums of a source's blocks: bytes that come twice must be the same bytes.

What is read by range was checked by nobody. So every block of a file has its crc32 noted when it first comes, from
whatever request, and compared when it comes again: the last time when the whole file goes by and its sha256 is taken.
crc32 finds what lines and servers do wrong; whoever wants to deceive is held off by the sha256 of the whole.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from k2quant.checkpoint.files.checksum import crc32
from k2quant.checkpoint.files.paths import open_regular
from k2quant.errors import CheckpointError

BLOCK_BYTES = 2**18
"""Bytes of a block: 16 MB of checksums for a terabyte, and little is read in vain for a scale of 30 KB."""

_READ = 2**22  # bytes of a file that are read at once


class Blocks:
    """The crc32 of each block of some files, as far as it came; any thread may call it."""

    def __init__(self, sizes: Mapping[str, int], shown: Callable[[str], str]) -> None:
        """Know nothing yet.

        Args:
            sizes: bytes of each file.
            shown: what messages call a file.
        """
        self._sizes, self._shown = sizes, shown
        self._lock = threading.Lock()
        self._known: dict[str, dict[int, int]] = {}
        self._heads: dict[tuple[str, int], tuple[int, str]] = {}
        """By file and block, how many bytes of it came as the file's header, and their sha256."""

    def expect(self, file: str, head: bytes) -> None:
        """Note the first bytes of a file, its header, by which it is read: all that comes of them later is the same.

        By sha256, for a header has room for whatever gives it the crc32 of another.
        """
        for number, start in enumerate(range(0, len(head), BLOCK_BYTES)):
            piece = head[start : start + BLOCK_BYTES]
            self._heads[file, number] = len(piece), hashlib.sha256(piece).hexdigest()

    def span(self, file: str, start: int, stop: int) -> tuple[int, int]:
        """Return the whole blocks that a range touches: first byte, one past the last."""
        last = -(-stop // BLOCK_BYTES) * BLOCK_BYTES
        return start // BLOCK_BYTES * BLOCK_BYTES, min(last, self._sizes[file])

    def note(self, file: str, start: int, data: memoryview) -> None:
        """Note bytes that came, whole blocks.

        Raises:
            CheckpointError: a block came before, with other bytes, or is not what the header is that was read.
        """
        first = start // BLOCK_BYTES
        for number, offset in enumerate(range(0, len(data), BLOCK_BYTES), first):
            self._check_head(file, number, data[offset : offset + BLOCK_BYTES])
            self.claim(file, number, crc32(data[offset : offset + BLOCK_BYTES]))

    def _check_head(self, file: str, number: int, block: memoryview) -> None:
        length, expected = self._heads.get((file, number), (0, ""))
        if length and (found := hashlib.sha256(block[:length]).hexdigest()) != expected:
            raise CheckpointError(
                "begins with another header than the one that was read",
                file=self._shown(file),
                expected=f"sha256 {expected} of {length:,} bytes from byte {number * BLOCK_BYTES:,} on",
                found=found,
                remedy="nothing that was made of it looks finished; run the same command again, with `restart=True` "
                "where that is refused",
            )

    def note_file(self, file: str, path: Path) -> None:
        """Note a whole file that lies on the disk.

        Raises:
            CheckpointError: a block came before, with other bytes; or the file cannot be read.
        """
        with os.fdopen(open_regular(path), "rb", buffering=0) as whole:
            memory, start = memoryview(bytearray(_READ)), 0
            while count := whole.readinto(memory):
                while count % BLOCK_BYTES and (more := whole.readinto(memory[count:])):
                    count += more
                self.note(file, start, memory[:count])
                start += count

    def claim(self, file: str, number: int, found: int) -> None:
        """Note a block's crc32.

        Raises:
            CheckpointError: it came before, with another.
        """
        with self._lock:
            known = self._known.setdefault(file, {}).setdefault(number, found)
        if known != found:
            raise CheckpointError(
                "gave other bytes than before at the same place",
                file=self._shown(file),
                expected=f"crc32 {known:08x} from byte {number * BLOCK_BYTES:,} on",
                found=f"{found:08x}",
                remedy="if it has not changed, a server or a line is at fault: write it anew with `restart=True`",
            )

    def of(self, file: str, start: int, stop: int) -> list[list[int]]:
        """Return number and crc32 of each block that a range touches, as far as they came."""
        first, last = self.span(file, start, stop)
        with self._lock:
            known = self._known.get(file, {})
            numbers = range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
            return [[number, known[number]] for number in numbers if number in known]
