"""Plain text as documents: a file of a folder is one, a file by itself is cut at blank lines.

A document must be long enough that its tokens have something before them: every one begins anew, and a model's first
token is unlike all others. So a file is not cut at every blank line, but at the first one after `_LEAST` characters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.files.strict_json import without_mark
from k2quant.errors import MalformedFile

ENDINGS = (".txt", ".text", ".md", ".raw")
"""Of files of plain text."""

_LEAST = 4_000
"""Characters of a document after which a blank line ends it: about a thousand tokens."""
_MOST = 16_000
"""Characters after which the end of any line does."""
_LIMIT = 2**26
"""Bytes of a line, or of a file that is one document."""


def whole(file: Path) -> str:
    """Return a file as one document.

    Raises:
        MalformedFile: it cannot be read, is too long, or no text in UTF-8.
    """
    return "".join(_lines(file, _LIMIT))


def cut(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the documents of a file, each with the number of its first line, from 1.

    Raises:
        MalformedFile: it cannot be read, or is no text in UTF-8.
    """
    begun, size, lines = 1, 0, list[str]()
    for number, line in enumerate(_lines(file), 1):
        lines.append(line)
        size += len(line)
        if size >= _MOST or (size >= _LEAST and not line.strip()):
            yield begun, "".join(lines)
            begun, size, lines = number + 1, 0, []
    yield begun, "".join(lines)


def _lines(file: Path, limit: int | None = None) -> Iterator[str]:
    """Yield the lines of a text; one at a time is in memory."""
    try:
        with os.fdopen(open_regular(file), "rb") as stream:
            read = 0
            for number, line in enumerate(iter(lambda: stream.readline(_LIMIT + 1), b""), 1):
                read += len(line)
                if len(line) > _LIMIT or read > (limit or read):
                    remedy = None if limit is None else "give the file by itself, and it is cut at blank lines"
                    expected = f"at most {_LIMIT:,} bytes"
                    raise MalformedFile("too long", file=f"{file}, line {number}", expected=expected, remedy=remedy)
                yield _decoded(without_mark(line, file=file) if number == 1 else line, f"{file}, line {number}")
    except OSError as error:
        raise MalformedFile("cannot be read", file=file, found=error.strerror) from error


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}"
        raise MalformedFile("no plain text", file=where, expected="UTF-8", found=found) from error
    if "\0" in text:
        raise MalformedFile("no plain text", file=where, expected="UTF-8", found="a character of code 0")
    return text
