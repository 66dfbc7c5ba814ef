"""A picture with a cell for each expert: K2's 60 x 384 at a glance, drawn as runs of equal cells.

A path for each level holds its runs, so the picture is as sharp as the screen and has a few bytes a run. It is drawn
once and shown in two frames, for wide and for narrow screens; only words are set for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from k2quant.calib.coverage import LayerLoad
from k2quant.report.drawing import NARROW, WIDE, Canvas

MOST_LAYERS = 128
"""Rows of the picture; K2 has 60."""
_MOST_EXPERTS = 2048  # columns; more are finer than a screen
_RINGS = 300  # rings around experts without a token; more are a crowd that the cells show by themselves


class Level(NamedTuple):
    """Experts of a like number of tokens."""

    words: str
    """Of n/d, tokens over the width of the input, as HTML."""
    paint: str
    """CSS variable."""
    strength: float
    """Opacity; few tokens stand out from the page, and many are close to it."""
    below: float
    """n/d under which it ends."""


LEVELS = (
    Level("no token", "ink", 1.0, 0.0),
    Level("below d/64", "bad", 1.0, 1 / 64),
    Level("d/64 to d/16", "bad", 0.78, 1 / 16),
    Level("d/16 to d/4", "bad", 0.55, 1 / 4),
    Level("d/4 to d/2", "unsure", 0.8, 1 / 2),
    Level("d/2 to d", "unsure", 0.4, 1.0),
    Level("d to 2d", "candidate", 0.36, 2.0),
    Level("2d to 4d", "candidate", 0.2, 4.0),
    Level("4d to 16d", "base", 0.2, 16.0),
    Level("16d and more", "base", 0.09, float("inf")),
)
"""A logarithmic scale whose marks are the tiers: no token, d/4, d and 4d."""


def levels(load: LayerLoad, width: int) -> NDArray[np.intp]:
    """Return the number of each expert's level [E]; the inputs are so wide."""
    marks = np.array([level.below * width for level in LEVELS[1:-1]])
    found = np.searchsorted(marks, load.tokens, side="right") + 1
    found[load.tokens == 0] = 0
    return found


def cells(name: str, rows: Sequence[NDArray[np.intp]]) -> str:
    """Return the cells, a unit wide and high each, as an element that `place` shows.

    Args:
        name: the element's id.
        rows: of each layer the levels of its experts, from left to right.
    """
    columns = min(max(map(len, rows)), _MOST_EXPERTS)
    paths: list[list[str]] = [[] for _ in LEVELS]
    for row, found in enumerate(rows):
        ends = [-1] * len(LEVELS)
        for level, start, stop in _runs(found[:columns]):
            moved = f"M{start} {row}" if ends[level] < 0 else f"m{start - ends[level]} 0"
            paths[level].append(f"{moved}h{stop - start}")
            ends[level] = stop
    drawn = "".join(
        f'<path d="{"".join(path)}" {_paint(LEVELS[level])}/>\n' for level, path in enumerate(paths) if path
    )
    group = f'<g id="{name}" transform="translate(0 .5)" fill="none" shape-rendering="crispEdges">'
    return f'<svg class=cells width=0 height=0 aria-hidden="true"><defs>\n{group}\n{drawn}</g></defs></svg>\n'


def _paint(level: Level) -> str:
    return f'style="stroke:var(--{level.paint});stroke-opacity:{level.strength:g}"'


def _runs(row: NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Yield level, first cell and the cell behind the last of each run."""
    edges = [0, *(int(edge) + 1 for edge in np.flatnonzero(np.diff(row))), len(row)]
    for start, stop in pairwise(edges):
        yield int(row[start]), start, stop


def place(
    name: str, loads: Sequence[LayerLoad], label: str, *, ring: bool, columns: Sequence[tuple[float, str]], foot: str
) -> str:
    """Return the frames that show cells, for both kinds of screens.

    Args:
        name: id of the cells.
        loads: the layers, for the words beside the rows.
        label: the picture in words.
        ring: whether experts without a token get a ring, at their place.
        columns: marks under the picture: place from 0 to 1, and words.
        foot: what the columns are.
    """
    return "".join(
        _frame(canvas, name, loads, label, ring=ring, columns=columns, foot=foot) for canvas in (WIDE, NARROW)
    )


def _frame(
    canvas: Canvas,
    name: str,
    loads: Sequence[LayerLoad],
    label: str,
    *,
    ring: bool,
    columns: Sequence[tuple[float, str]],
    foot: str,
) -> str:
    font = canvas.font
    left, right, top = 3.6 * font, 0.6 * font, 0.6 * font
    pitch = min(max((430 if canvas is WIDE else 300) / len(loads), 3.0), 22.0)
    wide, high = canvas.width - left - right, pitch * len(loads)
    under = top + high
    count = min(max(len(load.tokens) for load in loads), _MOST_EXPERTS)
    shown = f'x="{left:g}" y="{top:g}" width="{wide:g}" height="{high:g}"'
    box = f'viewBox="0 0 {count} {len(loads)}" preserveAspectRatio="none"'
    parts = [
        f'<svg {shown} {box}><use href="#{name}"/></svg>',
        f'<rect {shown} style="fill:none;stroke:var(--line)"/>',
    ]
    if ring:
        size = max(min(wide / count, pitch), 3) * 0.5 + 3
        parts.append(_rings(loads, size, (left, top), (wide / count, pitch)))
    step = max(1, round(1.6 * font / pitch))
    parts += [
        f'<text x="{left - 6:g}" y="{top + (row + 0.5) * pitch:g}" text-anchor="end" dominant-baseline="central">'
        f"{load.layer}</text>"
        for row, load in enumerate(loads)
        if row % step == 0
    ]
    parts += [
        f'<path d="M{left + at * wide:.1f} {under + 3:g}v4" style="stroke:var(--muted)"/>'
        f'<text x="{left + at * wide:.1f}" y="{under + 8 + font:g}" text-anchor="{_anchor(at)}">{words}</text>'
        for at, words in columns
    ]
    parts.append(
        f'<text x="{left + wide / 2:g}" y="{under + 12 + 2.2 * font:g}" text-anchor="middle">{foot}</text>'
        f'<text x="{font:g}" y="{top + high / 2:g}" text-anchor="middle" '
        f'transform="rotate(-90 {font:g} {top + high / 2:g})">layer</text>'
    )
    height = under + 16 + 2.6 * font
    return (
        f'<svg class="{canvas.css}" viewBox="0 0 {canvas.width} {height:.0f}" role="img" aria-label="{label}">'
        f'<g style="fill:var(--muted);font-size:{font:g}px">{"".join(parts)}</g></svg>\n'
    )


def _anchor(at: float) -> str:
    return "start" if at == 0 else "end" if at == 1 else "middle"


def _rings(loads: Sequence[LayerLoad], size: float, corner: tuple[float, float], pitch: tuple[float, float]) -> str:
    places = [(row, expert) for row, load in enumerate(loads) for expert in load.empty if expert < _MOST_EXPERTS]
    if len(places) > _RINGS:
        return ""
    ring = f"a{size:g} {size:g} 0 1 1 0 {2 * size:g}a{size:g} {size:g} 0 1 1 0 {-2 * size:g}"
    drawn = "".join(
        f"M{corner[0] + (expert + 0.5) * pitch[0]:.1f} {corner[1] + (row + 0.5) * pitch[1] - size:.1f}{ring}"
        for row, expert in places
    )
    return "".join(  # a halo first: a ring has to be seen on any cell
        f'<path d="{drawn}" style="fill:none;stroke:var(--{paint});stroke-width:{width:g}"/>'
        for paint, width in (("card", 5), ("ink", 2))
        if drawn
    )


def legend(counts: Sequence[int]) -> str:
    """Return the levels with the number of their experts; those without any are left out."""
    items = (
        f'<li><span class=swatch style="background:var(--{level.paint});opacity:{level.strength:g}" '
        f'aria-hidden="true"></span> {level.words}: {count:,}</li>'
        for level, count in zip(LEVELS, counts, strict=True)
        if count
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


CSS = """\
svg.cells{position:absolute}
.swatch{display:inline-block;width:.95em;height:.95em;border-radius:2px;vertical-align:-.1em;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
"""
"""Rules for the cells and their legend."""
