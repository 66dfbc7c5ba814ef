"""Two answers held against each other: which characters of each are not in the other, as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

_ROOM = 240  # letters shown of an answer
_BEFORE = 60  # letters shown before the first difference, where the beginning has no room
_LINES = 8
_LETTERWISE = 40  # longer answers are compared word by word
_ALIKE = 0.5  # stretches with less in common are two different ones: their few common letters are chance

_VISIBLE = {
    " ": "\N{OPEN BOX}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n",
    "\t": "\N{RIGHTWARDS ARROW TO BAR}",
}
"""How blanks are shown where they make the difference."""


class _Piece(NamedTuple):
    """A stretch of an answer."""

    words: str
    marked: bool
    """Whether the other answer has something else in its place."""


def differences(one: str, other: str) -> tuple[str, str]:
    """Return two answers as HTML, their lines kept, with what differs in `<mark>`.

    Blanks and letters that do not print are made visible where they differ. Of long answers the part around their first
    difference is shown.

    Args:
        one: any text; it may be hostile.
        other: the same.
    """
    one, other = (words.replace("\r\n", "\n") for words in (one, other))
    first = _common(one, other)
    start = first - _BEFORE if first > _BEFORE and max(len(one), len(other)) > _ROOM else 0
    shown = [words[start : start + _ROOM] for words in (one, other)]
    return tuple(  # type: ignore[return-value]  # of two
        _html(pieces, cut=(start > 0, start + _ROOM < len(words)))
        for pieces, words in zip(_compared(*shown), (one, other), strict=True)
    )


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many letters or words both begin with."""
    return next(
        (place for place, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other))
    )


_Pieces = tuple[list[_Piece], list[_Piece]]


def _compared(one: str, other: str) -> _Pieces:
    """Cut both into what they share and what they do not."""
    letterwise = max(len(one), len(other)) <= _LETTERWISE
    ours, theirs = (list(words) if letterwise else re.findall(r"\w+|\s|[^\w\s]", words) for words in (one, other))
    head = _common(ours, theirs)
    tail = min(_common(ours[::-1], theirs[::-1]), len(ours) - head, len(theirs) - head)
    middles = [parts[head : len(parts) - tail] for parts in (ours, theirs)]
    inner = (_placewise if letterwise and len(ours) == len(theirs) else _matched)(*middles)
    return tuple(  # type: ignore[return-value]  # of two
        [_piece(parts[:head]), *pieces, _piece(parts[len(parts) - tail :])]
        for pieces, parts in zip(inner, (ours, theirs), strict=True)
    )


def _piece(parts: Iterable[str], *, marked: bool = False) -> _Piece:
    return _Piece("".join(parts), marked)


def _matched(one: list[str], other: list[str]) -> _Pieces:
    """Compare what stands between a common beginning and a common end."""
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return [_piece(one, marked=True)], [_piece(other, marked=True)]
    found: _Pieces = ([], [])
    for kind, begin, end, low, high in matcher.get_opcodes():
        found[0].append(_piece(one[begin:end], marked=kind != "equal"))
        found[1].append(_piece(other[low:high], marked=kind != "equal"))
    return found


def _placewise(one: list[str], other: list[str]) -> _Pieces:
    """Compare letter by letter: in a font of one width, those of one place stand one below the other."""
    differ = [x != y for x, y in zip(one, other, strict=True)]
    if sum(differ) > _ALIKE * len(differ):
        differ = [True] * len(differ)
    return tuple(  # type: ignore[return-value]  # of two
        [
            _piece((letter for _, letter in run), marked=marked)
            for marked, run in groupby(zip(differ, letters, strict=True), key=itemgetter(0))
        ]
        for letters in (one, other)
    )


def _html(pieces: Iterable[_Piece], *, cut: tuple[bool, bool]) -> str:
    shown = "".join(_shown(pieces))
    if not shown:
        return "<i>empty</i>"
    return f"{'&hellip;' if cut[0] else ''}{shown}{'&hellip;' if cut[1] else ''}"


def _shown(pieces: Iterable[_Piece]) -> Iterator[str]:
    for piece in pieces:
        if piece.words:
            letters = html.escape("".join(map(_letter if piece.marked else _plain, piece.words)))
            yield f"<mark>{letters}</mark>" if piece.marked else letters


def _plain(letter: str) -> str:
    """Return a letter that both answers have; what does not print becomes a replacement mark."""
    return letter if letter.isprintable() or letter == "\n" else " " if letter == "\t" else "\N{REPLACEMENT CHARACTER}"


def _letter(letter: str) -> str:
    """Return a letter that only one answer has; two that do not print are told apart by their numbers."""
    return _VISIBLE.get(letter) or (letter if letter.isprintable() else f"[U+{ord(letter):04X}]")
