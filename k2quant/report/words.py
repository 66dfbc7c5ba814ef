"""Names, numbers and tables as HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from k2quant.kernels.codecs.figures import Figures
from k2quant.report.content import NARROWED, Way
from k2quant.report.origins import Exported, Merged, Origin

_NAME_SHOWN = 200  # characters of a name; K2's longest has 63
DASH = "&ndash;"
TIMES = "code&nbsp;&times;&nbsp;scale"


def plain(value: object, limit: int = _NAME_SHOWN) -> str:
    """Return a value as one line; what does not print, or would turn the text around, becomes a replacement mark."""
    letters = str(value)
    cut = letters if len(letters) <= limit else f"{letters[: limit - 3]}..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in cut)


def text(value: object, limit: int = _NAME_SHOWN) -> str:
    """Return a value as one line of HTML text of at most so many letters, as `plain` makes it."""
    return html.escape(plain(value, limit))


def code(value: object) -> str:
    """Return a name as HTML that may break after its dots, slashes and underscores."""
    broken = re.sub(r"([._/])", r"\1<wbr>", text(value))
    return f"<code>{broken}</code>"


def decibels(ratio: float) -> str:
    """Return an SQNR."""
    if math.isinf(ratio):
        return "no error" if ratio > 0 else "no signal"
    return f"{ratio:.2f}&nbsp;dB"


def count(number: int) -> str:
    """Return a count as people read it: `69,120`, `44.0 billion`."""
    for step, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= step:
            return f"{number / step:,.{2 if number < 10 * step else 1}f}&nbsp;{word}"
    return f"{number:,}"


def tensors(number: int) -> str:
    """Return so many tensors."""
    return f"<b>{number:,}</b> tensor{'' if number == 1 else 's'}"


def share(part: float, whole: float) -> str:
    """Return a share in percent; `100%` and `0%` only where they are exact."""
    if part == 0 or whole <= 0:
        return "0%"
    return "100%" if part == whole else f"{max(100 * part / whole, 0.01):.2f}%".replace("100.00", "99.99")


def amount(value: float) -> str:
    """Return an error in three digits."""
    return f"{value:#.3g}".rstrip(".")


def done(origin: Origin) -> str:
    """Return what was done with a tensor whose values are not the source's, as a participle."""
    match origin:
        case Merged():
            return "merged"
        case Exported(run=str()):
            return "trained"
        case Exported():
            return "exported"
    return "replaced"


def formats(way: Way, origin: Origin = None) -> str:
    """Return the formats before and after."""
    source, target = (name.upper() if name else None for name in (way.source, way.target))
    apart = f", {done(origin)}" if way.substituted else ""
    if target is None:
        return f"{source or 'other'}{apart or ', copied'}"
    narrowed = way._replace(substituted=False) == NARROWED
    return f"{'F16/F32' if narrowed else source} &rarr; {target}{apart}"


def outcome(way: Way, figures: Figures | None, origin: Origin = None) -> str:
    """Say how good the values of a way came through."""
    if figures is not None and not figures.exact:
        return decibels(figures.sqnr_db)
    if not way.substituted:
        return "rounded once" if figures is None and way == NARROWED else "exact"
    match origin:
        case Merged():
            return "rounded once"
        case Exported(measured=True):
            return "unchanged"
    return "not measured"


def tile(label: str, value: str, note: str) -> str:
    """Return a number that matters."""
    return f"<li><span>{label}</span><strong>{value}</strong><small>{note}</small></li>"


def table(heads: list[str], rows: Iterable[list[str]], *, css: str = "", label: str) -> str:
    """Return a table in a box that scrolls sideways.

    Args:
        heads: the columns, as HTML.
        rows: their cells, as HTML.
        css: classes: `compact` for one that need not fill its box, `words` for one whose second column holds words,
            `reasons` for one whose last column holds a clause.
        label: what it is, for those who hear it.
    """
    columns = "".join(f"<th scope=col>{head}</th>" for head in heads)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>\n" for row in rows
    )
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{label}"><table class="{css}">'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
