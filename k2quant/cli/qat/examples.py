"""Examples of training data on a terminal: what is learnt in green, or between marks where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from k2quant.qat.showing import Piece, ShownExample

_MARKS = ("«»", "⟦⟧", "⟪⟫")
"""Around what is learnt: the first pair of which no example holds a part."""
_LONGEST = 600
"""Characters of a piece that are shown; of a longer one its beginning and its end are."""


def lines_of(examples: Sequence[ShownExample], *, length: int, colour: bool) -> Iterator[str]:
    """Yield the lines that show examples.

    Args:
        examples: to be shown.
        length: tokens of a row.
        colour: whether colours are shown; without them marks stand around what is learnt.
    """
    from k2quant.ground.units import counted

    whole = "".join(piece.text for example in examples for piece in example.pieces)
    marks = next((pair for pair in _MARKS if not set(pair) & set(whole)), _MARKS[0])
    how = click.style("in green", fg="green") if colour else f"between {marks[0]} and {marks[1]}"
    first = "The first example" if len(examples) == 1 else f"The first {counted(len(examples), 'example')}"
    yield f"{first}; what is learnt stands {how}, ↵ is a line break."
    for number, example in enumerate(examples, 1):
        yield ""
        yield f"{number}. {example.where}: {counted(example.tokens, 'token')}, {example.learnt:,} learnt{_fit(example)}"
        yield from _text(example, length, "" if colour else marks).split("\n")
    yield ""


def _fit(example: ShownExample) -> str:
    if example.cut:
        return f", {example.cut:,} cut off"
    return ", longer than a row, goes on in the next" if example.divided else ""


def _text(example: ShownExample, length: int, marks: str) -> str:
    parts: list[str] = []
    cut = False
    for piece in example.pieces:
        if piece.cut and not cut:
            parts.append(f"\n--- a row of {length:,} tokens ends here; what follows is cut off ---\n")
            cut = True
        parts.append(_piece(piece, marks))
    return "".join(parts)


def _piece(piece: Piece, marks: str) -> str:
    """Return a piece as it is shown; its own marks of colour stand in each line, for pagers lose them at its end."""
    from k2quant.errors import printable

    text = piece.text
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
    lines = [printable(line) for line in text.split("\n")]
    if piece.learnt and not piece.cut:
        if marks:
            lines = [*lines[:-1], f"{lines[-1]}{marks[1]}"]
            lines[0] = f"{marks[0]}{lines[0]}"
            return "↵\n".join(lines)
        return "\n".join(click.style(f"{line}↵" if more else line, fg="green") for line, more in _ended(lines))
    return "↵\n".join(lines)


def _ended(lines: Sequence[str]) -> list[tuple[str, bool]]:
    """Return lines, each with whether another follows."""
    return [(line, number < len(lines)) for number, line in enumerate(lines, 1)]


def facts_of(examples: Sequence[ShownExample]) -> list[dict[str, Any]]:
    """Return examples for JSON, whole."""
    from dataclasses import asdict

    return [
        {"where": one.where, "tokens": one.tokens, "learnt": one.learnt, "cut": one.cut}
        | {"pieces": [asdict(piece) for piece in one.pieces]}
        for one in examples
    ]
