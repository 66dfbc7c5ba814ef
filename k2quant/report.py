"""Draw the report of a finished conversion as one HTML page: no scripts, no network, pictures as inline SVG.

Everything on the page is computed from `k2quant_report.json`. The pictures are matplotlib's; their colours are CSS
variables, so that they follow the reader's light or dark mode. Each is drawn twice, for wide and for narrow screens,
because an SVG that shrinks to a phone's width takes its text with it.
"""

from __future__ import annotations

import html
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.paths import write_whole
from k2quant.errors import MalformedFile, OutputError, UsageError
from k2quant.formats.layouts import Bf16, Format, FormatName, Fp8, Int4
from k2quant.kernels.figures import Figures
from k2quant.names import TENSOR_CLASSES
from k2quant.plan import INCOMPLETE, REPORT
from k2quant.policy import DEFAULT_SCOPE
from k2quant.units import duration, size
from k2quant.verify import read_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "k2quant_report.html"

_FORMATS: dict[str, Format] = {"bf16": Bf16(), "fp8": Fp8(), "int4": Int4()}
_WORST_SHOWN = 20
_LIST_SHOWN = 200  # shards and patterns; K2 has 62 shards
_NAME_SHOWN = 200  # characters of a name; K2's longest has 63


def write_html(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a finished conversion as one HTML page.

    Args:
        folder: what `k2quant convert` wrote.
        output: the file to write, `.html`; None for `k2quant_report.html` in `folder`.

    Returns:
        the file written.

    Raises:
        MalformedFile: the folder holds no report, or one that does not parse, or its conversion is not finished.
        UsageError: `output` is no name of a page.
        OutputError: the page cannot be written.
    """
    target = folder / PAGE if output is None else output
    if target.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"{target} is no name for a page; end it in .html")
    if (folder / INCOMPLETE).exists():
        raise MalformedFile("the conversion is not finished", file=folder, remedy="run it again: it resumes")
    page = _page(_read(folder / REPORT), folder.resolve().name)
    try:
        write_whole(target, page.encode())
    except OSError as error:
        raise OutputError("cannot be written", file=target, found=error.strerror or str(error)) from error
    return target


# --- what the report says --------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """One tensor that was converted or copied."""

    name: str
    kind: str
    """One of `TENSOR_CLASSES`."""
    layer: int | None
    source: FormatName | None
    """None for a tensor that is no weight."""
    target: FormatName | None
    """None for one that was copied."""
    shape: tuple[int, ...]
    figures: Figures | None
    """What rounding did, where there was rounding."""


@dataclass(slots=True)
class _Sum:
    """What some tensors come to together."""

    tensors: int = 0
    weights: int = 0
    figures: Figures | None = None
    lowest: float = math.inf
    """SQNR of the worst tensor among them, dB."""
    highest: float = -math.inf

    def add(self, tensor: _Tensor) -> None:
        self.tensors += 1
        self.weights += prod(tensor.shape)
        if tensor.figures is not None:
            self.figures = (self.figures or Figures()) + tensor.figures
            self.lowest = min(self.lowest, tensor.figures.sqnr_db)
            self.highest = max(self.highest, tensor.figures.sqnr_db)


_Way = tuple[FormatName | None, FormatName | None]
"""Formats before and after."""


@dataclass(slots=True, kw_only=True)
class _Report:
    """A report, checked, and its sums."""

    source_name: str
    version: str
    finished: datetime
    seconds: float
    bytes_read: int
    bytes_written: int
    options: dict[str, Any]
    source: dict[str, Any]
    tensors: list[_Tensor]
    all: _Sum = field(default_factory=_Sum)
    ways: dict[_Way, _Sum] = field(default_factory=dict)
    rows: dict[tuple[str, _Way], _Sum] = field(default_factory=dict)
    """By class and way."""
    layers: dict[str, dict[int, _Sum]] = field(default_factory=dict)
    """By class and layer, the rounded tensors alone."""

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            way = (tensor.source, tensor.target)
            sums = [self.all, self.ways.setdefault(way, _Sum()), self.rows.setdefault((tensor.kind, way), _Sum())]
            if tensor.figures is not None and tensor.layer is not None:
                sums.append(self.layers.setdefault(tensor.kind, {}).setdefault(tensor.layer, _Sum()))
            for total in sums:
                total.add(tensor)

    @property
    def to(self) -> str:
        """The format that was asked for, as people write it."""
        return str(self.options["to"]).upper()

    @property
    def figures(self) -> Figures:
        """What rounding did to all weights that were rounded."""
        return self.all.figures or Figures()

    @property
    def narrowed(self) -> int:
        """How many tensors were F16 or F32 and became BF16: the only BF16 weights that are not copied as BF16."""
        return sum(total.tensors for way, total in self.ways.items() if way == ("bf16", "bf16"))

    def kinds(self) -> list[str]:
        """Return the classes that occur, in the order in which tables show them."""
        present = {kind for kind, _ in self.rows}
        return [kind for kind in TENSOR_CLASSES if kind in present]

    def of_class(self, kind: str) -> dict[_Way, _Sum]:
        """Return the sums of a class; what was rounded comes first."""
        found = {way: total for (other, way), total in self.rows.items() if other == kind}
        return dict(sorted(found.items(), key=lambda item: (item[1].figures is None, item[0][1] is None, str(item[0]))))


def _read(path: Path) -> _Report:
    """Read a report, trusting nothing in it.

    Raises:
        MalformedFile: a part is missing or of the wrong kind.
    """
    report = read_report(path)
    try:
        return _Report(
            source_name=_string(report["source_name"]),
            version=_string(report["version"]),
            finished=datetime.fromisoformat(_string(report["finished"])).astimezone(UTC),
            seconds=_number(report["seconds"]),
            bytes_read=_whole(report["bytes_read"]),
            bytes_written=_whole(report["bytes_written"]),
            options=_options(report["options"]),
            source=_object(report["source"]),
            tensors=[_tensor(name, facts) for name, facts in report["tensors"].items()],
        )
    except KeyError as error:
        raise MalformedFile("lacks a part of a report", file=path, expected=error) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedFile("a part is not what a report holds", file=path, found=str(error)[:200]) from error


def _tensor(name: str, facts: dict[str, Any]) -> _Tensor:
    source, target = facts["from"], facts["to"]
    if facts["class"] not in TENSOR_CLASSES or not {source, target} <= {*_FORMATS, None}:
        raise ValueError(f"class {facts['class']!r}, from {source!r} to {target!r} of {name!r}")
    shape = tuple(_whole(length) for length in facts["shape"])
    if len(shape) > 8 or ({source, target} & {"fp8", "int4"} and len(shape) != 2):
        raise ValueError(f"shape {shape} of {name!r}")
    figures = facts.get("figures")
    layer = facts["layer"]
    return _Tensor(
        name,
        facts["class"],
        None if layer is None else _whole(layer, 10**6),
        source,
        target,
        shape,
        None
        if figures is None
        else Figures(
            _whole(figures["count"]),
            _whole(figures["changed"]),
            *(_number(figures[key]) for key in ("energy", "error", "worst")),
        ),
    )


def _options(value: object) -> dict[str, Any]:
    options = _object(value)
    shard_size = options["shard_size"]
    return {
        "to": _FORMATS[_string(options["to"])].name,
        "scope": options["scope"] and _string(options["scope"]),
        "ignore": [_string(pattern) for pattern in options["ignore"]],
        "grid": options["grid"] and _string(options["grid"]),
        "shard_size": None if shard_size is None else _whole(shard_size),
    }


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} where text stands")
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.100} where an object stands")
    return value


def _whole(value: object, limit: int = 2**63) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise ValueError(f"{value!r:.100} where a count stands")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e100:
        raise ValueError(f"{value!r:.100} where a number stands")
    return float(value)


# --- words and numbers -----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Return a value as HTML text; what would not print or would turn the text around becomes a replacement mark."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))
    return html.escape(text if len(text) <= _NAME_SHOWN else f"{text[: _NAME_SHOWN - 3]}...")


def _code(value: object) -> str:
    """Return a name as HTML that may break after its dots and underscores, but not in a table."""
    broken = re.sub(r"([._/])", r"\1<wbr>", _text(value))
    return f"<code>{broken}</code>"


def _decibels(ratio: float) -> str:
    if math.isinf(ratio):
        return "no error" if ratio > 0 else "no signal"
    return f"{ratio:.2f}&nbsp;dB"


def _count(number: int) -> str:
    """Return a count as people read it: `69,120`, `44.0 billion`."""
    for step, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= step:
            return f"{number / step:,.{2 if number < 10 * step else 1}f}&nbsp;{word}"
    return f"{number:,}"


def _share(part: float, whole: float) -> str:
    """Return a share in percent; `100%` and `0%` only where they are exact."""
    if whole <= 0 or part in {0, whole}:
        return "0%" if part == 0 else "100%"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f}%"


def _way(way: _Way) -> str:
    source, target = (name.upper() if name else None for name in way)
    if target is None:
        return f"{source}, copied" if source else "copied"
    return f"{'F16/F32' if way == ('bf16', 'bf16') else source} &rarr; {target}"


def _outcome(way: _Way, figures: Figures | None) -> str:
    """Say how good the weights of a way came through."""
    if figures is not None:
        return "exact" if figures.exact else _decibels(figures.sqnr_db)
    if way == ("bf16", "bf16"):
        return "rounded once"
    return "exact"


def _done(report: _Report) -> str:
    """Say in one sentence what was done with how many tensors."""
    phrases = []
    for way, total in sorted(report.ways.items(), key=lambda item: (item[1].figures is None, item[0][1] is None)):
        source = "F16 or F32" if way == ("bf16", "bf16") else str(way[0]).upper()
        if way[1] is None:
            continue
        verb = "wrote" if total.figures is None else "rounded"
        exact = ", bit-equal to code &times; scale" if verb == "wrote" and way[0] != "bf16" else ""
        phrases.append(f"{verb} <b>{total.tensors:,}</b> tensors from {source} to {way[1].upper()}{exact}")
    copied = sum(total.tensors for way, total in report.ways.items() if way[1] is None)
    if copied:
        phrases.append(f"copied <b>{copied:,}</b> byte for byte")
    *first, last = phrases or ["found nothing to convert"]
    return f"k2quant {'; '.join(first)}{'; and ' if first else ''}{last}."


def _nothing_rounded(report: _Report) -> str:
    """Say why there is no picture of errors."""
    if report.all.figures is not None:
        return (
            "<b>Rounding lost nothing:</b> every rounded value was already one that "
            f"{report.to} can hold, and came through unchanged."
        )
    if report.narrowed:
        return (
            f"<b>Quantised weights:</b> every value is bit-equal to code &times; scale. {report.narrowed:,} tensors "
            "stored as F16 or F32 were rounded once, to the nearest BF16; that error is not measured."
        )
    if all(target is None for _, target in report.ways):
        return "<b>Nothing was rounded:</b> every tensor was copied byte for byte."
    return "<b>Nothing was rounded:</b> every value is bit-equal to code &times; scale, as BF16 holds it."


# --- pictures --------------------------------------------------------------------------------------------------------

_PARTS = ("BF16 weights", "FP8 codes", "INT4 codes", "scales and the rest")
_VARIABLES = (
    *("ink", "muted", "line", "on"),
    *(f"class-{number}" for number in range(len(TENSOR_CLASSES))),
    *(f"part-{number}" for number in range(len(_PARTS))),
)
"""CSS variables of the pictures. Number n is drawn in colour #0000nn, counted from 1, and renamed in the SVG."""
_MARKERS = ("os^DvPX*<>ph", "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716\u2605\u25c0\u25b6\u2b1f\u2b22")
"""One for each class, as matplotlib and as text has them."""


class _Canvas(NamedTuple):
    """A size to draw for, in CSS pixels."""

    css: str
    width: int
    font: float


_WIDE, _NARROW = _Canvas("wide", 1040, 14), _Canvas("narrow", 360, 12)
_Draw = Callable[["Axes", _Canvas], None]


def _colour(variable: str) -> str:
    return f"#0000{_VARIABLES.index(variable) + 1:02x}"


def _svg(draw: _Draw, canvas: _Canvas, height: int, label: str) -> str:
    """Draw an SVG for one size of screen."""
    from io import StringIO

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{canvas.css} {label}",  # ids must not meet those of the page's other pictures
        "font.size": canvas.font,
        "text.color": _colour("ink"),
        "text.parse_math": False,
        "axes.labelcolor": _colour("muted"),
        "axes.edgecolor": _colour("line"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": _colour("line"),
        "xtick.color": _colour("line"),
        "ytick.color": _colour("line"),
        "xtick.labelcolor": _colour("muted"),
        "ytick.labelcolor": _colour("muted"),
    }
    with rc_context(style):
        figure = Figure(figsize=(canvas.width / 72, height / 72), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(facecolor="none"), canvas)
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    return _inlined(file.getvalue(), canvas, height, label)


def _inlined(svg: str, canvas: _Canvas, height: int, label: str) -> str:
    """Turn matplotlib's SVG file into an element of the page."""
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # "axes_1" in every picture
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", body)
    body = re.sub(r"#0000([0-9a-f]{2})", lambda hit: f"var(--{_VARIABLES[int(hit[1], 16) - 1]})", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    head = f'<svg class="{canvas.css}" viewBox="0 0 {canvas.width} {height}" role="img" aria-label="{label}">'
    return head + body


def _figure(title: str, note: str, draw: _Draw, heights: tuple[int, int], *, legend: str = "", table: str = "") -> str:
    """Return a figure: title, a sentence, the picture for both kinds of screens, and what it shows as a table."""
    label = re.sub(r"<[^>]*>", "", f"{title}. {note}")
    drawings = "".join(
        _svg(draw, canvas, height, label) for canvas, height in zip((_WIDE, _NARROW), heights, strict=True)
    )
    return (
        f"<figure class=card><figcaption><h2>{title}</h2><p class=note>{note}</p></figcaption>"
        f"{legend}{drawings}{table}</figure>"
    )


def _legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a legend of (mark, CSS variable, words)."""
    items = "".join(
        f'<li><span style="color:var(--{variable})" aria-hidden="true">{mark}</span> {words}</li>'
        for mark, variable, words in entries
    )
    return f"<ul class=legend>{items}</ul>"


def _layers_figure(report: _Report) -> str:
    """Draw the error of each layer, a line for each class with a band from its worst to its best tensor."""
    series = {
        kind: {layer: total for layer, total in sorted(layers.items()) if _drawable(total.figures)}
        for kind in TENSOR_CLASSES
        if (layers := report.layers.get(kind))
    }
    series = {kind: layers for kind, layers in series.items() if layers}
    if not series:
        return ""
    lowest = min(
        (
            (total.figures.sqnr_db, kind, at)
            for kind, layers in series.items()
            for at, total in layers.items()
            if total.figures
        ),
    )

    def draw(axes: Axes, canvas: _Canvas) -> None:
        from matplotlib.ticker import MaxNLocator

        for kind, layers in series.items():
            number = TENSOR_CLASSES.index(kind)
            colour, at = _colour(f"class-{number}"), list(layers)
            values = [total.figures.sqnr_db for total in layers.values() if total.figures]
            low = [min(total.lowest, value) for total, value in zip(layers.values(), values, strict=True)]
            high = [
                total.highest if math.isfinite(total.highest) else value
                for total, value in zip(layers.values(), values, strict=True)
            ]
            if len(at) > 1:
                axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
            else:
                axes.vlines(at, low, high, color=colour, alpha=0.5, linewidth=3)
            axes.plot(at, values, color=colour, marker=_MARKERS[0][number], markersize=canvas.font / 3, linewidth=1.6)
        axes.grid(axis="y", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15 if canvas is _WIDE else 6, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("SQNR (dB)")
        _widen(axes)

    note = (
        f"Higher is better. Lowest: {lowest[1]} of layer {lowest[2]}, {_decibels(lowest[0])}. "
        "The line is a layer's whole class, the band runs from its worst to its best tensor."
    )
    legend = _legend(
        (_MARKERS[1][TENSOR_CLASSES.index(kind)], f"class-{TENSOR_CLASSES.index(kind)}", kind) for kind in series
    )
    return _figure("Error by layer: SQNR in dB", note, draw, (380, 300), legend=legend, table=_layers_table(report))


def _drawable(figures: Figures | None) -> bool:
    return figures is not None and math.isfinite(figures.sqnr_db)


def _widen(axes: Axes) -> None:
    """Give the axes some room, and never blow up differences of a fraction of a decibel."""
    low, high = axes.get_ylim()
    missing = max(2 - (high - low), 0) / 2
    axes.set_ylim(low - missing, high + missing)
    left, right = axes.get_xlim()
    if right - left < 2:
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)


def _layers_table(report: _Report) -> str:
    kinds = [kind for kind in TENSOR_CLASSES if kind in report.layers]
    rows = [
        [
            str(layer),
            *(
                _outcome((None, None), total.figures) if (total := report.layers[kind].get(layer)) else "&ndash;"
                for kind in kinds
            ),
        ]
        for layer in sorted({layer for layers in report.layers.values() for layer in layers})
    ]
    return f"<details><summary>As a table</summary>{_table(['layer', *kinds], rows, numeric=True)}</details>"


def _classes_figure(report: _Report) -> str:
    """Draw a bar for each class; those that lost nothing get a word instead."""
    bars: list[tuple[str, float | None, str]] = []
    for kind in report.kinds():
        ways = report.of_class(kind)
        figures = next((total.figures for total in ways.values() if total.figures is not None), None)
        if figures is not None and not figures.exact and _drawable(figures):
            bars.append((kind, figures.sqnr_db, f"{figures.sqnr_db:.2f} dB"))
        else:
            bars.append((kind, None, _exact_words(ways)))

    def draw(axes: Axes, canvas: _Canvas) -> None:
        values = [value for _, value, _ in bars if value is not None] or [1.0]
        low, top = min(values), max(values)
        for row, (kind, value, words) in enumerate(bars):
            colour = _colour(f"class-{TENSOR_CLASSES.index(kind)}")
            if value is not None:
                axes.barh(row, value, color=colour, height=0.62)
            axes.annotate(
                words,
                (max(value or 0, 0), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=_colour("muted" if value is None else "ink"),
            )
        axes.set_yticks(range(len(bars)), [kind for kind, _, _ in bars])
        axes.tick_params(axis="y", length=0, labelcolor=_colour("ink"))
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(min(0, low), max(top, 1) * (1.12 if canvas is _WIDE else 1.4))
        axes.grid(axis="x", linewidth=0.8)
        axes.set_xlabel("SQNR (dB)")

    note = "Higher is better: 6 dB more is half the error. Classes without a bar lost nothing."
    if not any(value is None for _, value, _ in bars):
        note = "Higher is better: 6 dB more is half the error."
    return _figure("Error by tensor class: SQNR in dB", note, draw, (64 + 34 * len(bars), 58 + 28 * len(bars)))


def _exact_words(ways: dict[_Way, _Sum]) -> str:
    """Say how a class without error came through."""
    if any(way == ("bf16", "bf16") for way in ways):
        return "rounded once to BF16"
    if any(total.figures is not None for total in ways.values()):
        return "exact: nothing to round away"
    targets = {target for _, target in ways}
    return "exact: copied" if targets == {None} else "exact: code \N{MULTIPLICATION SIGN} scale"


def _parts(report: _Report) -> list[tuple[int, int]]:
    """Return the bytes before and after of each of `_PARTS`.

    Only the codes' and the weights' sizes are known from shapes. Scales have the shape of a source's blocks and groups,
    which the report does not name; they are the rest of the bytes that it counts.
    """
    sums = dict.fromkeys(_FORMATS, 0), dict.fromkeys(_FORMATS, 0)
    for tensor in report.tensors:
        for where, name in zip(sums, (tensor.source, tensor.target or tensor.source), strict=True):
            if name is not None:
                layout = _FORMATS[name]
                where[name] += layout.state(tensor.shape)[layout.main].nbytes
    before, after = (list(where.values()) for where in sums)
    before.append(max(report.bytes_read - sum(before), 0))
    after.append(max(report.bytes_written - sum(after), 0))
    return list(zip(before, after, strict=True))


def _sizes_figure(report: _Report) -> str:
    """Draw what the checkpoint's bytes are, before and after."""
    parts = _parts(report)
    shown = [number for number, pair in enumerate(parts) if any(pair)]
    largest = max(sum(pair[side] for pair in parts) for side in (0, 1)) or 1
    exponent = min(int(math.log10(largest) / 3 + 1e-9), 4)
    unit, step = ("B", "kB", "MB", "GB", "TB")[exponent], 1000**exponent

    def draw(axes: Axes, canvas: _Canvas) -> None:
        for side in (0, 1):
            left = 0.0
            for number in shown:
                width = parts[number][side] / step
                axes.barh(side, width, left=left, color=_colour(f"part-{number}"), height=0.6)
                words = size(parts[number][side])
                if width * step / largest * canvas.width * 0.8 > canvas.font * len(words) * 0.7:
                    axes.text(left + width / 2, side, words, ha="center", va="center", color=_colour("on"))
                left += width
        axes.set_yticks([0, 1], ["before", "after"])
        axes.tick_params(axis="y", length=0, labelcolor=_colour("ink"))
        axes.spines["left"].set_visible(False)
        axes.set_ylim(1.5, -0.5)
        axes.set_xlim(0, largest / step * 1.02)
        axes.grid(axis="x", linewidth=0.8)
        axes.set_xlabel(f"size ({unit})")

    rows = [[_PARTS[number], *(size(count) if count else "&ndash;" for count in parts[number])] for number in shown]
    rows.append(["<b>all</b>", f"<b>{size(report.bytes_read)}</b>", f"<b>{size(report.bytes_written)}</b>"])
    return _figure(
        f"Size by format, in {unit}",
        f"{size(report.bytes_read)} of weights before, {size(report.bytes_written)} of files after.",
        draw,
        (190, 170),
        legend=_legend(("\u25a0", f"part-{number}", _PARTS[number]) for number in shown),
        table=f"<details><summary>As a table</summary>{_table(['', 'before', 'after'], rows, numeric=True)}</details>",
    )


# --- the page --------------------------------------------------------------------------------------------------------


def _page(report: _Report, folder: str) -> str:
    title = f"{_text(report.source_name)} as {report.to}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Names come from strangers: should one ever slip through the escaping, it still may not load or run anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} - k2quant report</title>\n<style>{_CSS}{_palette()}</style>\n</head>\n<body>\n"
        + "\n".join(_sections(report, folder, title))
        + "\n</body>\n</html>\n"
    )


def _sections(report: _Report, folder: str, title: str) -> Iterator[str]:
    exact = report.figures.exact and not report.narrowed
    yield (
        f"<header><p class=eyebrow>k2quant conversion report</p><h1>{title}</h1><p class=lead>{_done(report)}</p>"
        f'<p class=meta><span class="badge{" good" if exact else ""}">{"exact" if exact else "rounded"}</span> '
        f"{_code(folder)} &middot; {report.finished:%Y-%m-%d %H:%M} UTC &middot; k2quant {_text(report.version)}</p>"
        "</header>\n<main>"
    )
    yield f"<ul class=tiles>{''.join(_tiles(report))}</ul>"
    if report.figures.exact:
        yield f"<p class='card good'>{_nothing_rounded(report)}</p>"
    else:
        yield _layers_figure(report)
        yield _classes_figure(report)
    yield _sizes_figure(report)
    yield _classes_section(report)
    if not report.figures.exact:
        yield _worst_section(report)
    yield _how_section(report, folder)
    yield "</main>"


def _tile(label: str, value: str, note: str) -> str:
    return f"<li><span>{label}</span><strong>{value}</strong><small>{note}</small></li>"


def _tiles(report: _Report) -> Iterator[str]:
    before, after = report.bytes_read, report.bytes_written
    yield _tile(
        "Size",
        f"{size(before)} &rarr; {size(after)}".replace(" ", "&nbsp;").replace("&rarr;&nbsp;", "&rarr; "),
        f"{after / before:.2f} times the source" if before else "an empty source",
    )
    figures = report.figures
    if figures.exact:
        unchanged = "every value unchanged" if not report.narrowed else "F16 and F32 rounded once to BF16"
        yield _tile("Error", "none" if not report.narrowed else "BF16 only", unchanged)
    else:
        yield _tile(
            "Overall SQNR",
            _decibels(figures.sqnr_db),
            f"error is {_share(math.sqrt(figures.error), math.sqrt(figures.energy))} of the weights, root mean square",
        )
        worst = _worst(report, 1)[0]
        ratio = worst.figures.sqnr_db if worst.figures else math.inf
        yield _tile("Worst tensor", _decibels(ratio), _code(worst.name))
        yield _tile(
            "Values changed",
            _share(figures.changed, figures.count),
            f"of {_count(figures.count)} rounded; {_count(report.all.weights - figures.count)} others exact"
            if not report.narrowed
            else f"of {_count(figures.count)} rounded",
        )
    rate = f"{size(before / report.seconds)}/s read" if report.seconds else ""
    yield _tile("Time", duration(report.seconds).replace(" ", "&nbsp;"), rate)


def _worst(report: _Report, count: int) -> list[_Tensor]:
    """Return the tensors of the lowest SQNR."""
    from heapq import nsmallest

    rounded = ((t.figures.sqnr_db, t.name, t) for t in report.tensors if t.figures is not None and not t.figures.exact)
    return [tensor for _, _, tensor in nsmallest(count, rounded)]


def _table(heads: list[str], rows: list[list[str]], *, numeric: bool = False, left: int = 1) -> str:
    """Return a table in a box that scrolls sideways.

    Args:
        heads: the columns.
        rows: their cells, as HTML.
        numeric: whether the columns are narrow numbers, so that the table need not fill its box.
        left: how many columns hold words; the others are numbers and stand at the right.
    """
    cells = "".join(f"<th scope=col>{head}</th>" for head in heads)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>\n" for row in rows
    )
    css = f"left-{left}{' compact' if numeric else ''}"
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="table"><table class="{css}">'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _classes_section(report: _Report) -> str:
    rows = []
    for kind in report.kinds():
        for way, total in report.of_class(kind).items():
            figures = total.figures
            rows.append(
                [
                    kind,
                    _way(way),
                    f"{total.tensors:,}",
                    _count(total.weights),
                    _share(figures.changed, figures.count) if figures else "&ndash;",
                    _outcome(way, figures),
                    _decibels(total.lowest) if figures and not figures.exact else "&ndash;",
                    f"{figures.worst:.3g}" if figures and not figures.exact else "&ndash;",
                ]
            )
    heads = ["class", "formats", "tensors", "values", "changed", "SQNR", "worst tensor", "largest error"]
    return (
        "<section class=card><h2>Every tensor class</h2><p class=note>SQNR is 10&nbsp;log<sub>10</sub>"
        "(&Sigma;w&sup2;&nbsp;/&nbsp;&Sigma;(w&nbsp;&minus;&nbsp;w&prime;)&sup2;), largest error is max&nbsp;"
        "|w&nbsp;&minus;&nbsp;w&prime;|; w is a value before the conversion and w&prime; after it, both as BF16."
        f"</p>{_table(heads, rows, left=2)}</section>"
    )


def _worst_section(report: _Report) -> str:
    worst = _worst(report, _WORST_SHOWN)
    rows = [
        [
            _code(tensor.name),
            _way((tensor.source, tensor.target)),
            "&nbsp;&times;&nbsp;".join(str(length) for length in tensor.shape),
            _share(tensor.figures.changed, tensor.figures.count),
            _decibels(tensor.figures.sqnr_db),
            f"{tensor.figures.worst:.3g}",
        ]
        for tensor in worst
        if tensor.figures is not None
    ]
    heads = ["tensor", "formats", "shape", "changed", "SQNR", "largest error"]
    title = f"The {len(rows)} worst tensors" if len(rows) > 1 else "The only tensor that changed"
    return (
        f"<section class=card><h2>{title}</h2><p class=note>Lowest SQNR first.</p>"
        f"{_table(heads, rows, left=2)}</section>"
    )


def _how_section(report: _Report, folder: str) -> str:
    options = report.options
    scope = options["scope"] or DEFAULT_SCOPE.get(options["to"])
    facts = [("format", report.to)]
    if scope:
        facts.append(("scope", _text(scope) + ("" if options["scope"] else " (default)")))
    if options["to"] == "int4":
        facts.append(("grid", _text(options["grid"] or "moonshot") + ("" if options["grid"] else " (default)")))
    facts.append(("ignored", ", ".join(_code(pattern) for pattern in options["ignore"][:_LIST_SHOWN]) or "nothing"))
    facts.append(("shards", f"at most {size(options['shard_size'])}" if options["shard_size"] else "as in the source"))
    facts += [(key.replace("_", " "), _code(value)) for key, value in report.source.items() if isinstance(value, str)]
    listed = "".join(f"<div><dt>{_text(key)}</dt><dd>{value}</dd></div>" for key, value in facts)
    name = shlex.quote(folder)
    return (
        f"<section class=card><h2>How it was made, and how to check it</h2><dl>{listed}</dl>{_shards(report)}"
        f"<p>Compare every tensor on disk with the checksums of the conversion:</p>"
        f"<pre>k2quant verify --checksums {_text(name)}</pre>"
        f"<p>Compare it with its source, value by value:</p>"
        f"<pre>k2quant verify {_text(shlex.quote(report.source_name))} {_text(name)}</pre></section>"
    )


def _shards(report: _Report) -> str:
    """List the shards of the source as they were when it was read."""
    shards = report.source.get("shards")
    rows = [
        [_code(name), size(facts["size"]), _code(facts.get("header_sha256", ""))]
        for name, facts in (shards.items() if isinstance(shards, dict) else ())
        if isinstance(facts, dict) and isinstance(facts.get("size"), int) and facts["size"] < 2**63
    ]
    if not rows:
        return ""
    more = f"<p class=note>and {len(rows) - _LIST_SHOWN:,} more</p>" if len(rows) > _LIST_SHOWN else ""
    table = _table(["shard of the source", "size", "sha256 of its header"], rows[:_LIST_SHOWN], numeric=True)
    return f"<details><summary>{len(rows):,} source shards</summary>{table}{more}</details>"


_LIGHT = {
    "page": "#f5f5f2", "card": "#ffffff", "ink": "#1c2127", "muted": "#59636e", "line": "#dcdfe2", "on": "#ffffff",
    "accent": "#3a4cc0", "good": "#176b3c", "good-bg": "#e6f4ea", "mark": "#8a4b00", "mark-bg": "#fdf0dc",
}  # fmt: skip
_DARK = {
    "page": "#14171b", "card": "#1d2126", "ink": "#e7eaed", "muted": "#a3adb8", "line": "#383f47", "on": "#14171b",
    "accent": "#9aa8ff", "good": "#7fd6a0", "good-bg": "#17301f", "mark": "#f2c078", "mark-bg": "#37290f",
}  # fmt: skip
_CLASSES_LIGHT = "4456c7 00806f b5690a c2356b 0b7fab 6b7a12 8a3fb0 8a5a3c 5b6b7c 2e8540 b3362a 6f6f6f"
_CLASSES_DARK = "8c9bff 3fc7b2 f0b04d ff7fa8 5cc3ee b9c94a c58cf0 cfa27f 9fb0c3 6fcf7f ff8a7a b0b0b0"
_PARTS_LIGHT, _PARTS_DARK = "50657d 00806f 4456c7 80786d", "8fa6c0 3fc7b2 8c9bff aba396"


def _palette() -> str:
    """Return the variables of both colour schemes."""

    def rule(plain: dict[str, str], classes: str, parts: str) -> str:
        variables = {**plain}
        for prefix, colours in (("class", classes), ("part", parts)):
            variables |= {f"{prefix}-{number}": f"#{colour}" for number, colour in enumerate(colours.split())}
        return ":root{" + "".join(f"--{name}:{colour};" for name, colour in variables.items()) + "}\n"

    dark = rule(_DARK, _CLASSES_DARK, _PARTS_DARK)
    return f"{rule(_LIGHT, _CLASSES_LIGHT, _PARTS_LIGHT)}@media (prefers-color-scheme:dark){{{dark}}}\n"


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:clamp(1.7rem,1.2rem + 2.2vw,2.6rem);line-height:1.15;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 4px}
p{margin:0 0 12px}
.eyebrow{color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.04em;margin-bottom:8px}
.lead{font-size:1.1rem;max-width:48em;margin:14px 0}
.meta{color:var(--muted);font-size:.92rem}
.note,summary{color:var(--muted);font-size:.92rem}
.badge{display:inline-block;padding:1px 10px;margin-right:6px;border-radius:99px;font-weight:600;font-size:.85rem;
color:var(--mark);background:var(--mark-bg)}
.badge.good{color:var(--good);background:var(--good-bg)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:24px 28px;margin:20px 0}
p.card.good{font-size:1.1rem;color:var(--good);background:var(--good-bg);border-color:transparent}
.tiles{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,auto));gap:1px;padding:0;
margin:28px 0 20px;background:var(--line);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tiles li{background:var(--card);padding:18px 20px;min-width:0}
.tiles span,.tiles small{display:block;color:var(--muted);font-size:.88rem;line-height:1.4}
.tiles strong{display:block;font-size:1.45rem;line-height:1.25;margin:4px 0 6px;font-weight:650;letter-spacing:-.01em}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em;overflow-wrap:anywhere}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:10px 14px;margin:0 0 16px;
white-space:pre-wrap}
svg{display:block;width:100%;height:auto;stroke-linejoin:round}
svg.narrow{display:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:8px 0 6px;padding:0;font-size:.92rem}
.scroll{overflow-x:auto;margin:8px -8px 0;padding:0 8px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
table.compact{width:auto}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);font-weight:400}
thead th{color:var(--muted);font-weight:600;font-size:.85rem}
tbody tr:last-child>*{border-bottom:0}
th:first-child,.left-2 :is(th,td):nth-child(2){text-align:left}
th:first-child{padding-left:0}
td wbr,th wbr{display:none}
details{margin-top:12px}
summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 24px;margin:8px 0 16px}
dl div{display:contents}
dt{color:var(--muted)}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
dl+details{margin:0 0 20px}
figure{margin:20px 0}
@media (max-width:860px){
header,main{padding-left:16px;padding-right:16px}
header{padding-top:28px}
.card{padding:18px 16px}
svg.wide{display:none}
svg.narrow{display:block;max-width:560px}
.tiles{grid-template-columns:1fr 1fr}
.tiles li:first-child{grid-column:1/-1}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:10px}
}
@media print{body{background:none}.card,.tiles{break-inside:avoid}}
"""
