"""Pictures of many rows, one below the other: a name, marks on a common scale, numbers at the end.

A wide screen has the name left of the row and the numbers right of it, a narrow one both above it. There, lines that
run down the picture leave out the words: each row has its own piece of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.report.drawing import WIDE, Canvas, colour
from k2quant.report.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE_NAME, _NARROW_NAME = 34, 24  # letters
_LIFT = -0.4
"""Of a narrow screen's words, above their row."""
_PIECE = (-0.24, 0.44)
"""Of a row on a narrow screen, what is free of words: its own stand above, the next row's below."""
_MINUS = "\N{MINUS SIGN}"


class Row(NamedTuple):
    """What stands beside the marks of a row."""

    name: str
    numbers: str
    strong: bool = False
    """Whether it is the one that counts."""


def heights(rows: int) -> tuple[int, int]:
    """Return the heights of the wide and of the narrow picture."""
    return 76 + 34 * rows, 64 + 52 * rows


def lay_rows(axes: Axes, canvas: Canvas, rows: Sequence[Row], limits: tuple[float, float], label: str) -> None:
    """Lay out rows, the first on top, row number n at y = n.

    Args:
        axes: where the marks are drawn.
        canvas: for which screen.
        rows: their words.
        limits: of the scale.
        label: of the scale.
    """
    from matplotlib.ticker import MaxNLocator

    wide = canvas is WIDE
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.4, -0.6 if wide else -0.75)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10 if wide else 5, steps=[1, 2, 2.5, 5, 10]))
    if wide:
        axes.grid(axis="x", linewidth=0.8)
    else:
        low, high = limits
        for tick in axes.get_xticks():
            if low <= tick <= high:
                draw_upright(axes, canvas, tick, len(rows), color=colour("line"), linewidth=0.8, zorder=0)
    axes.set_xlabel(label)
    for place, row in enumerate(rows):
        weight = "bold" if row.strong else "normal"
        name = shortened(row.name, _WIDE_NAME if wide else _NARROW_NAME)
        left, right, lift = (-0.012, 1.012, 0.0) if wide else (0.0, 1.0, _LIFT)
        for x, words, side in (
            (left, name, "right" if wide else "left"),
            (right, row.numbers, "left" if wide else "right"),
        ):
            axes.text(
                x,
                place + lift,
                words.replace("-", _MINUS) if words is row.numbers else words,
                ha=side,
                va="center",
                weight=weight,
                transform=axes.get_yaxis_transform(),
            )


def draw_upright(axes: Axes, canvas: Canvas, x: float, rows: int, **style: Any) -> None:
    """Draw a line down the picture at x; on a narrow screen it is broken where the words of each row stand.

    Args:
        axes: where.
        canvas: for which screen.
        x: on the scale.
        rows: how many there are.
        style: of a matplotlib line.
    """
    if canvas is WIDE:
        axes.axvline(x, **style)
        return
    for place in range(rows):
        axes.plot([x, x], [place + _PIECE[0], place + _PIECE[1]], **style)


def shortened(name: str, letters: int) -> str:
    """Return a name that fits; what is left out is left out of its middle, since the ends tell names apart."""
    shown = plain(name)
    if len(shown) <= letters:
        return shown
    head = (letters - 1) * 2 // 3
    return f"{shown[:head]}\N{HORIZONTAL ELLIPSIS}{shown[head + 1 - letters :]}"


def draw_interval(
    axes: Axes, canvas: Canvas, y: float, span: tuple[float, float, float], paint: str, mark: str
) -> None:
    """Draw a value in its interval.

    Args:
        axes: where.
        canvas: for which screen.
        y: height.
        span: low end, value, high end.
        paint: a CSS variable.
        mark: as matplotlib names it.
    """
    low, value, high = span
    axes.plot([low, high], [y, y], color=colour(paint), linewidth=2.2, solid_capstyle="butt")
    axes.plot([value], [y], color=colour(paint), marker=mark, markersize=canvas.font / (1.4 if mark == "D" else 1.7))


def room(values: Iterable[float], least: float) -> tuple[float, float]:
    """Return limits around values, at least so far apart."""
    found = list(values)
    low, high = min(found), max(found)
    more = max(least - (high - low), 0) / 2 + 0.04 * max(high - low, least)
    return low - more, high + more
