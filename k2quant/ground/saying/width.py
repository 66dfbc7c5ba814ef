"""How many columns a terminal has, and how many a text takes."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from typing import TextIO

_NARROWEST = 20
"""Columns of the narrowest terminal that anything is folded for."""

_USUAL = 80
"""Columns of a terminal that does not say how many it has."""


def terminal_width(stream: TextIO) -> int | None:
    """Return how many columns a stream has: COLUMNS, where that is set, or those of its terminal; None: it is none."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return max(int(given), _NARROWEST)
    if not stream.isatty():
        return None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no size
        return max(os.get_terminal_size(stream.fileno()).columns or _USUAL, _NARROWEST)
    return _USUAL


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which a line can be drawn over; one that is closed or none is not."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def cells_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: a wide character takes two, an accent none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def shortened(text: str, room: int) -> str:
    """Return a text in at most `room` columns: the middle of a long one gives way."""
    if cells_of(text) <= room:
        return text
    head = list(text)
    tail: list[str] = []
    for _ in range(len(text) // 2):
        tail.insert(0, head.pop())
    while cells_of("".join(head + tail)) > room - 1:
        tail.pop(0) if len(tail) >= len(head) else head.pop()
    return "".join(head) + "…" + "".join(tail)
