"""What a killed evaluation keeps on the disk: answers, one chunk of requests a line.

lm-eval's own cache is not used: its key holds no identity of the model, so two models on one path score the same.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile

_LINE = 2**30  # bytes of a line: a chunk of answers


class Journal:
    """Answers on the disk, by the digest of what was asked.

    A line is a crc32 and a JSON object. The first that is torn or wrong ends the journal; what follows was never
    answered for certain. In memory is only where each line stands: the reasoning of a model fills gigabytes.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and cut off a torn end.

        Args:
            path: of the journal, which need not exist.
        """
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        for line in _lines(path):
            record = _record(line, path)
            if record is None:
                break
            self._note(record["chunk"], len(line))
        if path.exists():
            os.truncate(path, self._end)

    def __len__(self) -> int:
        """How many chunks are answered."""
        return len(self._places)

    def get(self, chunk: str) -> list[Any] | None:
        """Return the answers to a chunk, or None."""
        if chunk not in self._places:
            return None
        place, length = self._places[chunk]
        with self._path.open("rb") as file:
            file.seek(place)
            record = _record(file.read(length), self._path)
        return None if record is None else record["answers"]

    def add(self, chunk: str, answers: list[Any]) -> None:
        """Append the answers to a chunk and flush them to the disk."""
        body = json.dumps({"chunk": chunk, "answers": answers}, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._note(chunk, len(line))

    def _note(self, chunk: str, length: int) -> None:
        self._places[chunk] = (self._end, length)
        self._end += length


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with os.fdopen(open_regular(path), "rb") as file:
            while line := file.readline(_LINE):
                yield line


def _record(line: bytes, path: Path) -> dict[str, Any] | None:
    crc, _, body = line.partition(b" ")
    try:
        if not line.endswith(b"\n") or int(crc, 16) != zlib.crc32(body[:-1]):
            return None
        record = parse_object(body, file=path)
    except (ValueError, MalformedFile):
        return None
    return record if isinstance(record.get("chunk"), str) and isinstance(record.get("answers"), list) else None
