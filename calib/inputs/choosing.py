"""Which document belongs to which part, and which of more than are needed are read: its hash alone decides."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from k2quant.errors import MalformedFile, UsageError

if TYPE_CHECKING:
    from k2quant.calib.inputs.documents import Raw

SHARE = 0.1
"""Of the documents that validate, and of those that test, where no files are given for it."""


def check_rows(samples: int, length: int, *, longest: int | None = None) -> None:
    """Refuse numbers of rows and of their tokens that make no sense.

    Args:
        samples: rows.
        length: tokens of a row.
        longest: that the model reads, where that is known.

    Raises:
        UsageError: so it is.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2)):
        if type(value) is not int or value < least:
            raise UsageError(f"`{name}=`: expected at least {least}, found {value!r}")
    if longest is not None and length > longest:
        raise UsageError(f"`length=`: expected at most the {longest:,} tokens that the model reads, found {length:,}")


def held_out_rows(samples: int) -> int:
    """Return the rows of a part that gets `SHARE` of the documents, beside those that are measured.

    Args:
        samples: rows that are measured.
    """
    return max(round(samples * SHARE / (1 - 2 * SHARE)), 1)


def part_of(document: Raw, given: frozenset[str]) -> str:
    """Return the part of a document of the data: by its hash, whatever stands beside it and in whatever order.

    Args:
        document: the document.
        given: parts that have data of their own, to which none of this goes.
    """
    place = int(document.hash[:16], 16) / 2**64
    part = "validation" if place < SHARE else "test" if place < 2 * SHARE else "train"
    return "train" if part in given else part


@dataclass(slots=True, kw_only=True)
class Pool:
    """The documents of a part that may be read: those of the smallest hashes, as many as can be needed."""

    letters: int
    """Characters that are enough."""
    _heap: list[int] = field(default_factory=list)
    """The negative hash of each, as a number: the largest hash first."""
    _kept: dict[int, Raw] = field(default_factory=dict)
    _size: int = 0

    def add(self, document: Raw) -> None:
        """Take a document; those of the largest hashes go while the others are enough."""
        rank = int(document.hash, 16)
        heapq.heappush(self._heap, -rank)
        self._kept[rank] = document
        self._size += document.letters
        while self._size - (last := self._kept[-self._heap[0]]).letters >= self.letters:
            del self._kept[-heapq.heappop(self._heap)]
            self._size -= last.letters

    def documents(self) -> list[Raw]:
        """Return what was kept, by hash."""
        return [self._kept[rank] for rank in sorted(self._kept)]


@dataclass(slots=True, kw_only=True)
class Parts:
    """The documents of all parts, of which no two are the same."""

    pools: Mapping[str, Pool]
    """By part."""
    given: frozenset[str]
    """Parts with data of their own, beside `train`."""
    duplicates: int = 0
    """Documents that were left out since they stand in the same data before."""
    found: dict[str, int] = field(default_factory=dict)
    """Documents of each part, those among them that will not be read."""
    _seen: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each document, and of each passage of a text: the part whose data it stands in, and where."""

    def add(self, document: Raw, data: str) -> None:
        """Take a document.

        Args:
            document: the document.
            data: the part that its file was given for; what was given for `train` goes to all that have none.

        Raises:
            MalformedFile: it stands in the data of another part too.
        """
        for mark in (document.hash, *document.passages):
            other, where = self._seen.setdefault(mark, (data, document.where))
            if other != data:
                raise MalformedFile(
                    f"stands in the data of two parts, {other} and {data}: the other place is {where}",
                    file=document.where,
                    remedy="take it out of one of them; what is measured on text that was calibrated on proves nothing",
                )
        if self._seen[document.hash][1] != document.where:
            self.duplicates += 1
            return
        part = part_of(document, self.given) if data == "train" else data
        self.found[part] = self.found.get(part, 0) + 1
        self.pools[part].add(document)
