"""matplotlib's drawings as elements of the page.

Colours are CSS variables, so that a picture follows the reader's light or dark mode, and text stays text. Each picture
is drawn twice, for wide and for narrow screens, because an SVG that shrinks to a phone's width takes its text with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.formats.known import FORMATS
from k2quant.ground.names import TENSOR_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CODED = tuple(FORMATS)
"""Formats whose bytes have a colour of their own, in their order."""

PARTS = (
    *(f"{name.upper()} {'codes' if FORMATS[name].quantised else 'weights'}" for name in CODED),
    "scales and the rest",
)
"""What a checkpoint's bytes are: what each of these formats has for weights, and all else."""

VARIABLES = (
    *("ink", "muted", "line", "on"),
    *(f"class-{number}" for number in range(len(TENSOR_CLASSES))),
    *(f"part-{number}" for number in range(len(PARTS))),
    *("good", "bad", "unsure", "base", "candidate"),
)
"""CSS variables of the pictures. Number n is drawn in colour #0000nn, counted from 1, and renamed in the SVG."""


class Canvas(NamedTuple):
    """A size to draw for, in CSS pixels."""

    css: str
    """Class of the SVG; the style sheet shows one of the two."""
    width: int
    font: float


WIDE, NARROW = Canvas("wide", 1040, 14), Canvas("narrow", 360, 12)
Draw = Callable[["Axes", Canvas], None]


def colour(variable: str) -> str:
    """Return the colour that stands for a CSS variable while matplotlib draws."""
    return f"#0000{VARIABLES.index(variable) + 1:02x}"


def figure(title: str, note: str, draw: Draw, heights: tuple[int, int], *, legend: str = "", table: str = "") -> str:
    """Return a figure: title, a sentence, the picture for both kinds of screens, and the same as a table.

    Args:
        title: what is shown, with its unit, as HTML.
        note: what to see in it, as HTML.
        draw: draws it.
        heights: of the wide and of the narrow picture.
        legend: from `legend`.
        table: what the picture shows, for those who want the numbers.
    """
    label = spoken(title, note)
    drawings = (_svg(draw, canvas, height, label) for canvas, height in zip((WIDE, NARROW), heights, strict=True))
    return frame(title, note, "".join(drawings), legend=legend, table=table)


def spoken(title: str, note: str) -> str:
    """Return what a picture is, for those who hear the page: its title and its sentence without markup."""
    return re.sub(r"<[^>]*>", "", f"{title}. {note}")


def frame(title: str, note: str, pictures: str, *, legend: str = "", table: str = "") -> str:
    """Return a figure of pictures that are drawn already; the arguments are those of `figure`."""
    caption = f"<figcaption><h2>{title}</h2><p class=note>{note}</p></figcaption>"
    numbers = f"<details><summary>As a table</summary>{table}</details>" if table else ""
    return f"<figure class=card>{caption}{legend}{pictures}{numbers}</figure>"


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a legend of (mark, CSS variable, words)."""
    items = (
        f'<li><span style="color:var(--{variable})" aria-hidden="true">{mark}</span> {words}</li>'
        for mark, variable, words in entries
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def _svg(draw: Draw, canvas: Canvas, height: int, label: str) -> str:
    """Draw for one size of screen."""
    import warnings

    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", _style(canvas, label)]), warnings.catch_warnings():  # not as the user's matplotlib
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the reader's fonts draw it
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # words too long for the picture
        picture = Figure(figsize=(canvas.width / 72, height / 72), layout="constrained", facecolor="none")
        FigureCanvasSVG(picture)
        draw(picture.add_subplot(facecolor="none"), canvas)
        file = StringIO()
        picture.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    head = f'<svg class="{canvas.css}" viewBox="0 0 {canvas.width} {height}" role="img" aria-label="{label}">'
    return head + _inlined(file.getvalue())


def _style(canvas: Canvas, label: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{canvas.css} {label}",  # ids must not meet those of the page's other pictures
        "font.size": canvas.font,
        "text.color": colour("ink"),
        "text.parse_math": False,
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("line"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": colour("line"),
        "xtick.color": colour("line"),
        "ytick.color": colour("line"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
    }


def _inlined(svg: str) -> str:
    """Turn matplotlib's SVG file, from its first definitions on, into the content of an element."""
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # every picture has an "axes_1"
    body = body.replace("xlink:href", "href")
    # The page's font instead of matplotlib's; its older versions write "font: 14px 'DejaVu Sans', ...".
    body = re.sub(r"font: (?:[^;\"]* )?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub(r"#0000([0-9a-f]{2})", lambda hit: f"var(--{VARIABLES[int(hit[1], 16) - 1]})", body)
    return re.sub(r"\s*\n\s*", "\n", body)
