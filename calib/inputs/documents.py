"""Documents as they stand in files and datasets, each with the hash by which it is known."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.calib.inputs import texts
from k2quant.checkpoint.files.paths import check_inside
from k2quant.data.examples import KEYS, TOOLS
from k2quant.data.places import ENDING
from k2quant.data.sources import DataSource, rows_of
from k2quant.errors import MalformedFile, UsageError

Progress = Callable[[int, int], None]
"""Called with the bytes that are read and all bytes, or with the rows of a dataset."""

_BLANK = re.compile(r"\n\s*\n")
_PASSAGE = 100
"""Characters from which a paragraph of a text tells where it comes from; shorter ones, such as headings, may recur."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A document that is not read yet."""

    where: str
    """File and line."""
    row: dict[str, Any]
    """What `data.examples` takes."""
    hash: str
    """See `hash_of`."""
    letters: int
    """Characters, about."""
    passages: tuple[str, ...] = ()
    """Hashes of the paragraphs of a plain text, whose cuts into documents say little of what is the same."""


def hash_of(row: dict[str, Any]) -> str:
    """Return SHA-256 of what a row says, in hexadecimal digits; blanks and line breaks count as one blank.

    Of a text or a prompt with its completion that is the text, of a chat its messages and tools as JSON. So a prompt
    and completion are the document that their text is.
    """
    if isinstance(row.get("messages"), list):
        talk = {key: _plain(row[key]) for key in ("messages", TOOLS) if row.get(key)}
        return _digest(json.dumps(talk, sort_keys=True, ensure_ascii=False))
    return _digest(_plain("".join(str(row[key]) for key in KEYS if row.get(key))))


def documents(source: DataSource, progress: Progress) -> Iterator[Raw]:
    """Yield the documents of a file, a folder or a dataset.

    Args:
        source: a file in JSON Lines or of plain text, a folder of such, or a dataset.
        progress: called while reading.

    Raises:
        UsageError: there is no such file, folder or dataset, or a file whose ending says neither.
        UnsafePath: a file of the folder is a link out of it.
        MalformedFile: a file, a line or a dataset is not what it should be.
        MissingExtra: the source is a dataset, and `datasets` is not installed.
    """
    if not os.path.lexists(source.path):
        for where, row in rows_of(source, progress=progress):
            yield _of_row(where, row)
        return
    place = Path(source.path)
    files = _files(place)
    done, total = 0, sum(size for _, size in files)
    for file, size in files:

        def tell(part: int, _: int, before: int = done) -> None:
            progress(before + part, total)

        if file.suffix.lower() == ENDING:
            for where, row in rows_of(DataSource(path=str(file)), progress=tell):
                yield _of_row(where, row)
        else:
            yield from _of_text(file, whole=place.is_dir())
        done += size
        progress(done, total)


def _files(place: Path) -> list[tuple[Path, int]]:
    """Return the files to be read, each with its bytes."""
    try:
        if not place.is_dir():
            if place.suffix.lower() not in {ENDING, *texts.ENDINGS}:
                raise UsageError(
                    f"{place}: expected a file of rows, *{ENDING}, or of plain text, *{', *'.join(texts.ENDINGS)}; "
                    "name it so, or give a folder of such or a dataset"
                )
            return [(place, place.stat().st_size)]
        known = {ENDING, *texts.ENDINGS}
        found = sorted(
            path for path in place.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")
        )
        for file in found:
            check_inside(place, file)
        sizes = [file.stat().st_size for file in found]
    except OSError as error:
        raise MalformedFile("cannot be read", file=place, found=error.strerror) from error
    if not found:
        raise UsageError(f"{place}: expected files *{ENDING} or *{', *'.join(texts.ENDINGS)} in the folder, found none")
    return list(zip(found, sizes, strict=True))


def _of_row(where: str, row: dict[str, Any]) -> Raw:
    try:
        letters = sum(len(str(row[key])) for key in (*KEYS, TOOLS) if row.get(key))
        return Raw(where=where, row=row, hash=hash_of(row), letters=letters)
    except RecursionError as error:  # JSON is read somewhat deeper than it is walked through here
        found = "brackets within brackets, deeper than any conversation goes"
        raise MalformedFile("not one example", file=where, found=found) from error


def _of_text(file: Path, *, whole: bool) -> Iterator[Raw]:
    found = [(1, texts.whole(file))] if whole else texts.cut(file)
    for line, text in found:
        if not text.strip():
            continue
        paragraphs = (" ".join(part.split()) for part in _BLANK.split(text))
        passages = tuple(_digest(part) for part in paragraphs if len(part) >= _PASSAGE)
        row = {"text": text.strip()}
        where = f"{file}, line {line}"
        yield Raw(where=where, row=row, hash=hash_of(row), letters=len(text), passages=passages)


def _plain(value: Any) -> Any:
    """Return a value with every blank and line break of its texts as one blank, none at their ends, and no nulls."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
