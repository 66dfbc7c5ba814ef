"""The order in which documents fill rows well.

`data.packing` puts documents into rows one after another, and begins a row where the next does not fit. In the order of
their hashes that leaves a quarter of the places empty where documents are of all sizes up to a row; in the order of
this file, one in sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from k2quant.data.packing import Document

_OPEN = 64
"""Rows that may still be filled; older ones are nearly full."""


def pieces(document: Document, length: int) -> list[Document]:
    """Return a document in pieces that fit into a row of `length` tokens; each but the last fills one.

    A piece of T tokens takes T - 1 places, for its last is not read: the next piece begins with it.
    """
    starts = range(0, len(document.tokens) - 1, length)
    spans = (slice(start, start + length + 1) for start in starts)
    return [replace(document, tokens=document.tokens[span], learnt=document.learnt[span]) for span in spans]


def arranged(sizes: Sequence[int], length: int) -> list[int]:
    """Return the order of documents in which rows are filled: each goes to the first row that has room for it.

    The first of a row did not fit into the row before. So packing them in this order makes these rows.

    Args:
        sizes: places that each takes, at most `length`.
        length: of a row.
    """
    rows: list[list[int]] = []
    free: dict[int, int] = {}
    for number, size in enumerate(sizes):
        row = next((row for row, room in free.items() if room >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free[row] = length
        rows[row].append(number)
        free[row] -= size
        if len(free) > _OPEN:
            del free[next(iter(free))]
    return [number for row in rows for number in row]
