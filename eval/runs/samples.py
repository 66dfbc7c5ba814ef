"""One file of samples: a JSON object a line, one for each document, filter and repeat.

A file is read once, line by line, and of each answer its columns are kept; the texts that people see are read again
from their place in the file.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from k2quant.checkpoint.files.paths import open_regular
from k2quant.errors import CheckpointError, MalformedResults
from k2quant.eval.runs.answers import Item
from k2quant.eval.runs.columns import Columns, Growing, Stored, digests
from k2quant.eval.runs.rows import answer_of, is_binary, parse_row
from k2quant.ground.saying.showing import brief

_LINE_LIMIT = 2**26  # bytes; a prompt of 128k tokens, five shots and all, is below 1 MB
_NAMED = 10  # metrics in a message


class Samples(NamedTuple):
    """What a file of samples holds, by one metric behind one filter."""

    metric: str
    filter: str
    items: Stored
    """In the order of `doc_id`, then of `repeat`."""
    digest: str
    """SHA-256 of the file."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def read_samples(path: Path) -> Samples:
    """Read a file of samples by its first filter and the first metric that is 0 or 1 for every item.

    Raises:
        MalformedResults: a line is cut, is no sample, stands twice, or scores what is neither right nor wrong; or some
            items were asked more often than others.
    """
    digest = hashlib.sha256()
    growing, offsets = Growing(), array("q")
    first: str | None = None
    scores = _Scores([])
    with _opened(path) as (file, stamp):
        for number, (offset, line) in enumerate(_lines(file, path, digest), start=1):
            row = parse_row(line, f"{path}, line {number}")
            if first is None:
                first, scores = row["filter"], _Scores(row["metrics"])
            if row["filter"] != first:
                continue
            growing.add(_answer(row, None, path))
            offsets.append(offset)
            scores.add(row)
    if first is None:
        raise MalformedResults("holds no sample", file=path, remedy="run the evaluation again")
    order = growing.order()
    repeats = _repeats(growing, order, offsets, path)
    metric, right = scores.chosen(path)
    columns = growing.columns(order, right, repeats)
    _check_words(columns, path)
    places = np.frombuffer(offsets, np.int64)[order]
    return Samples(metric, first, _InFile(path, stamp, metric, columns, places), digest.hexdigest())


class _Scores:
    """For each metric whether it has said right or wrong of every answer so far, and which."""

    def __init__(self, names: list[str]) -> None:
        self._right = {name: bytearray() for name in names}
        self._graded: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Take a row's scores in; an answer that never left its reasoning is wrong, whatever they are."""
        cut = row.get("cut_in_thought")
        for name, right in list(self._right.items()):
            value = 0 if cut else row.get(name)
            if is_binary(value):
                right.append(bool(value))
            else:
                self._graded[name] = value
                del self._right[name]

    def chosen(self, path: Path) -> tuple[str, bytearray]:
        """Return the first metric that says right or wrong of every answer, and what it says.

        Raises:
            MalformedResults: there is none.
        """
        for chosen in self._right.items():
            return chosen
        found = ", ".join(f"{name:.100} {value!r:.60}" for name, value in islice(self._graded.items(), _NAMED))
        raise MalformedResults(
            "no metric says right or wrong of every item",
            file=path,
            expected="0 or 1",
            found=found,
            remedy="gate tasks whose answers are right or wrong, such as exact_match, acc or pass@1",
        )


Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and time of change: of a file that is still the one that was read."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Stamp]]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            found = os.fstat(file.fileno())
            yield file, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise MalformedResults("cannot be read", file=path, found=error.strerror or str(error)) from error
    except MalformedResults:
        raise
    except CheckpointError as error:  # a pipe, a device
        raise MalformedResults(str(error)) from error


def _lines(file: BinaryIO, path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, each whole, with the place where it begins."""
    offset = 0
    while line := file.readline(_LINE_LIMIT + 1):
        digest.update(line)
        if not line.endswith(b"\n"):
            what = "a line is too long" if len(line) > _LINE_LIMIT else "cut off in its last line"
            raise MalformedResults(what, file=path, remedy="run the evaluation again; it resumes")
        yield offset, line
        offset += len(line)


def _answer(row: dict[str, Any], metric: str | None, path: Path) -> Item:
    try:
        return answer_of(row, metric)
    except RecursionError as error:
        raise MalformedResults("lists nested too deep", file=path) from error


def _repeats(growing: Growing, order: NDArray[np.int64], offsets: Any, path: Path) -> int:
    """Return how often each item was asked.

    Raises:
        MalformedResults: an answer stands twice, or items were not asked equally often.
    """
    documents, repeats = (np.frombuffer(column, np.int64)[order] for column in (growing.doc_ids, growing.repeats))
    twice = np.flatnonzero((documents[1:] == documents[:-1]) & (repeats[1:] == repeats[:-1])) + 1
    if len(twice):
        place = min(twice, key=lambda place: offsets[order[place]])
        again = f", repeat {repeats[place]}," if repeats.any() else ""
        raise MalformedResults(
            f"document {documents[place]}{again} stands twice",
            file=f"{path}, line {_line_at(path, offsets[order[place]])}",
            remedy="two runs mixed in one file? run the evaluation again into an empty folder",
        )
    asked = int(repeats.max()) + 1
    ids, counts = np.unique(documents, return_counts=True)
    if len(short := np.flatnonzero(counts != asked)):
        raise MalformedResults(
            "not every item was asked equally often",
            file=path,
            expected=f"{asked} answers to each",
            found=f"{counts[short[0]]} to document {ids[short[0]]}",
            remedy="run the evaluation again; it resumes",
        )
    return asked


def _line_at(path: Path, offset: int) -> int:
    """Return the number of the line that begins at a place."""
    with _opened(path) as (file, _):
        number, left = 1, offset
        while left and (block := file.read(min(left, 2**20))):
            number, left = number + block.count(b"\n"), left - len(block)
        return number


def _check_words(columns: Columns, path: Path) -> None:
    """Refuse an item whose repeats were asked in other words.

    Raises:
        MalformedResults: see above.
    """
    keys = columns.key.reshape(-1, columns.repeats)
    if len(other := np.flatnonzero((keys != keys[:, :1]).any(axis=1))):
        raise MalformedResults(
            f"the repeats of document {columns.of_items(columns.doc_id)[other[0]]} were asked in other words",
            file=path,
            remedy="two runs mixed in one file? run the evaluation again into an empty folder",
        )


class _InFile(Stored):
    """Answers that are read from their file when they are asked for."""

    def __init__(self, path: Path, stamp: Stamp, metric: str, columns: Columns, places: NDArray[np.int64]) -> None:
        self._path, self._stamp, self._metric, self._places = path, stamp, metric, places
        self.columns = columns

    def __repr__(self) -> str:
        """Return it in one line."""
        return f"<{len(self):,} answers in {self._path}>"

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, place: int | slice) -> Item | tuple[Item, ...]:
        """Read an answer, or several.

        Raises:
            MalformedResults: the file is no longer the one that was read.
        """
        found = tuple(self._read(range(len(self))[place] if isinstance(place, slice) else [range(len(self))[place]]))
        return found if isinstance(place, slice) else found[0]

    def __iter__(self) -> Iterator[Item]:
        """Read all answers, one after another."""
        return self._read(range(len(self)))

    def _read(self, places: Any) -> Iterator[Item]:
        with _opened(self._path) as (file, stamp):
            if stamp != self._stamp:
                raise self._changed()
            for place in places:
                file.seek(int(self._places[place]))
                yield self._checked(file.readline(_LINE_LIMIT + 1), place)

    def _checked(self, line: bytes, place: int) -> Item:
        """Return the answer of a line after comparing it with what is known of it."""
        try:
            item = _answer(parse_row(line, f"{self._path}"), self._metric, self._path)
        except MalformedResults as error:
            raise self._changed() from error
        known = self.columns
        words = tuple(bytes(column[place]).ljust(16, b"\0") for column in (known.document, known.key, known.output))
        if (item.doc_id, digests(item)) != (known.doc_id[place], words):
            raise self._changed()
        return item

    def _changed(self) -> MalformedResults:
        return MalformedResults(
            "changed since it was read", file=self._path, remedy="leave the run alone and gate it again"
        )
