"""Tables and sentences that fit the terminal, and lose nothing where they must be folded."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from k2quant.ground.saying.width import cells_of, terminal_width

_Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table."""

    head: str
    left: bool = False
    """Whether words stand at the left; figures stand at the right."""
    minor: bool = False
    """Whether it may be left out of a narrow terminal; a line below then says so."""
    style: Callable[[str], str] = str
    """Puts colour on a cell as it is printed, with its spaces."""


def width() -> int | None:
    """Return how many columns results have: those of the terminal, or of COLUMNS; None where nothing is folded."""
    return terminal_width(sys.stdout)


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as lines that fit the terminal.

    Too wide for it, it gets narrow gaps, heads of several lines, then loses minor columns and says so; then the first
    cell of a row stands on a line of its own, and at last each cell stands behind its head. Piped, it is never folded.

    Args:
        columns: from left to right; the first names the row.
        rows: a cell for each column; a last cell that is missing is empty.
    """
    cells = [_filled(row, len(columns)) for row in rows]
    return "\n".join(_lines(columns, cells, width()))


def paragraph(text: str, *, indent: str = "", hang: str = "") -> str:
    """Return a text as lines that fit the terminal, broken at spaces where it has some.

    Args:
        text: the text; its own line breaks stay where all its lines fit.
        indent: stands before the first line.
        hang: stands before each other.
    """
    room = width()
    lines = (indent + text).split("\n")
    if room is None or all(cells_of(line) <= room for line in lines):
        return f"\n{hang}".join(lines)
    return "\n".join(_folded(text, room, indent, hang))


def _filled(row: Sequence[str], count: int) -> _Row:
    from k2quant.errors import printable

    return tuple(printable(cell) for cell in row) + ("",) * (count - len(row))


def _lines(columns: Sequence[Column], rows: Sequence[_Row], room: int | None) -> list[str]:
    found = _aligned(columns, rows, heads=[[column.head] for column in columns], gap=2)
    if _fits(found, room):
        return found
    for kept in _fewer(columns):
        some = [columns[place] for place in kept]
        fewer = [tuple(row[place] for place in kept) for row in rows]
        for gap in (2, 1):
            found = _aligned(some, fewer, heads=[column.head.split() for column in some], gap=gap)
            if _fits(found, room):
                return found + _left_out(columns, kept, room)
    return _named(columns, rows, room) or _stacked(columns, rows, room)


def _fits(lines: Iterable[str], room: int | None) -> bool:
    import click

    return room is None or all(cells_of(click.unstyle(line)) <= room for line in lines)


def _fewer(columns: Sequence[Column]) -> Iterable[list[int]]:
    """Yield the places of all columns, then of fewer and fewer: minor ones go, the last first."""
    kept = list(range(len(columns)))
    yield kept
    for place in reversed(range(len(columns))):
        if columns[place].minor:
            kept = [each for each in kept if each != place]
            yield kept


def _left_out(columns: Sequence[Column], kept: Sequence[int], room: int | None) -> list[str]:
    names = ", ".join(column.head for place, column in enumerate(columns) if place not in kept)
    return _folded(f"(left out on this narrow terminal: {names})", room, "", " ") if names else []


def _aligned(
    columns: Sequence[Column], rows: Sequence[_Row], *, heads: Sequence[Sequence[str]], gap: int, indent: str = ""
) -> list[str]:
    """Return lines with each column as wide as its widest cell; heads of several lines stand on one ground."""
    tall = max((len(head) for head in heads), default=0)
    above = [("",) * (tall - len(head)) + tuple(head) for head in heads]
    titles: list[_Row] = list(zip(*above, strict=True))
    widths = [max(map(cells_of, column), default=0) for column in zip(*titles, *rows, strict=True)]
    lines = [(row, False) for row in titles] + [(row, True) for row in rows]
    return [
        (
            indent
            + (" " * gap).join(
                _cell(column, cell, size, styled=styled)
                for column, cell, size in zip(columns, row, widths, strict=True)
            )
        ).rstrip()
        for row, styled in lines
    ]


def _cell(column: Column, cell: str, size: int, *, styled: bool) -> str:
    space = " " * (size - cells_of(cell))
    shown = column.style(cell) if styled and cell else cell
    return shown + space if column.left else space + shown


def _named(columns: Sequence[Column], rows: Sequence[_Row], room: int | None) -> list[str]:
    """Return each row as its first cell, and the others aligned below it; nothing where that is too wide too."""
    rest = columns[1:]
    heads = [column.head.split() for column in rest]
    for gap in (2, 1):
        below = _aligned(rest, [row[1:] for row in rows], heads=heads, gap=gap, indent="  ")
        if rest and _fits(below, room):
            tall = max(map(len, heads))
            lines = [columns[0].head, *below[:tall]]
            for row, line in zip(rows, below[tall:], strict=True):
                lines += [*_folded(row[0], room, "", "  "), line]
            return lines
    return []


def _stacked(columns: Sequence[Column], rows: Sequence[_Row], room: int | None) -> list[str]:
    """Return each row as its first cell, and below it the others, each behind its head, as many a line as fit."""
    lines = []
    for row in rows:
        lines += _folded(f"{columns[0].head} {row[0]}".strip(), room, "", "  ")
        told = [(column, cell) for column, cell in zip(columns[1:], row[1:], strict=True) if cell]
        lines += _packed(told, room or 0)
    return lines


def _packed(told: Sequence[tuple[Column, str]], room: int) -> list[str]:
    """Return cells behind their heads with commas between them; one that is too long for a line gets several."""
    lines: list[str] = []
    free = 0
    for place, (column, cell) in enumerate(told):
        comma = "," * (place + 1 < len(told))
        plain = f"{column.head} {cell}{comma}".lstrip()
        size = 1 + cells_of(plain)
        if size < free:
            lines[-1] += f" {column.head} {column.style(cell)}{comma}"
            free -= size
        elif size < room:
            lines.append(f"  {column.head} {column.style(cell)}{comma}")
            free = room - size
        else:
            lines += _folded(plain, room, "  ", "    ")
            free = 0
    return lines


def _folded(text: str, room: int | None, indent: str, hang: str) -> list[str]:
    if room is None:
        return [indent + text]
    folded = textwrap.wrap(text, room, initial_indent=indent, subsequent_indent=hang, break_on_hyphens=False)
    return folded or [indent.rstrip()]
