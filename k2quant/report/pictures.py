"""The pictures of every report: error by layer, error by tensor class, size by format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from k2quant.ground.names import TENSOR_CLASSES
from k2quant.ground.units import size
from k2quant.kernels.codecs.figures import Figures
from k2quant.report.content import Report, Sum, Way
from k2quant.report.drawing import CODED, PARTS, WIDE, Canvas, colour, figure, legend
from k2quant.report.origins import Origin
from k2quant.report.words import DASH, decibels, outcome, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "os^DvPX*<>ph"
"""One for each class, as matplotlib names them."""
MARKS = "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716\u2605\u25c0\u25b6\u2b1f\u2b22"
"""The same as text."""

_LEAST_SPAN = 2.0  # dB; an axis that blows up hundredths of a decibel shows nothing but itself


class _Point(NamedTuple):
    """The error of a class in one layer, dB."""

    layer: int
    all: float
    lowest: float
    highest: float


def by_layer(report: Report) -> str:
    """Draw the error of each layer: a line for each class, in a band from its worst to its best tensor."""
    layers = report.layers()
    series = {kind: points for kind in layers if (points := _points(layers[kind]))}
    if not series:
        return ""

    def draw(axes: Axes, canvas: Canvas) -> None:
        for kind, points in series.items():
            _draw_line(axes, canvas, class_number(kind), points)
        _scale_layers(axes, canvas)

    worst, kind = min(((point, kind) for kind in series for point in series[kind]), key=lambda pair: pair[0].all)
    lowest = f"{kind} of layer {worst.layer}, {decibels(worst.all)}"
    words = (
        f"Lower is further. Furthest: {lowest}. A line is all of a class in a layer, its band goes from the furthest "
        "tensor to the nearest."
        if report.moved
        else f"Higher is better. Lowest: {lowest}. A line is all of a class in a layer, its band goes from the worst "
        "tensor to the best."
    )
    return figure(
        f"{_measured(report)} by layer: SQNR in dB",
        words,
        draw,
        (380, 300),
        legend=legend((MARKS[class_number(kind)], f"class-{class_number(kind)}", kind) for kind in series),
        table=_layers_table(layers, report.origin),
    )


def _measured(report: Report) -> str:
    if report.moved:
        return "Distance from the base"
    return "Error" if report.origin is None else "Error of rounding"


def class_number(kind: str) -> int:
    """Return the number of a class's colour and mark."""
    return TENSOR_CLASSES.index(kind)


def _points(layers: dict[int, Sum]) -> list[_Point]:
    """Return the layers that can be drawn; those that lost nothing have no place on a scale of decibels."""
    points = []
    for layer, total in layers.items():
        ratio = total.figures.sqnr_db if total.figures else math.inf
        if math.isfinite(ratio):
            lowest, highest = (edge if math.isfinite(edge) else ratio for edge in (total.lowest, total.highest))
            points.append(_Point(layer, ratio, lowest, highest))
    return points


def _draw_line(axes: Axes, canvas: Canvas, number: int, points: list[_Point]) -> None:
    layers, values, low, high = (list(column) for column in zip(*points, strict=True))
    paint = colour(f"class-{number}")
    if len(points) > 1:
        axes.fill_between(layers, low, high, color=paint, alpha=0.16, linewidth=0)
    else:
        axes.vlines(layers, low, high, color=paint, alpha=0.4, linewidth=4)
    axes.plot(layers, values, color=paint, marker=MARKERS[number], markersize=canvas.font / 2.6, linewidth=1.6)


def _scale_layers(axes: Axes, canvas: Canvas) -> None:
    low, high = axes.get_ylim()
    room = max(_LEAST_SPAN - (high - low), 0) / 2
    axes.set_ylim(low - room, high + room)
    lay_layers(axes, canvas, "SQNR (dB)")


def lay_layers(axes: Axes, canvas: Canvas, label: str) -> None:
    """Lay out a picture of layers, from left to right; `label` is what stands upwards."""
    from matplotlib.ticker import MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 1:  # a single layer
        axes.set_xlim((left + right) / 2 - 0.6, (left + right) / 2 + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=15 if canvas is WIDE else 6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(label)


def _layers_table(layers: dict[str, dict[int, Sum]], origin: Origin) -> str:
    way = Way(None, None, substituted=origin is not None)

    def cell(total: Sum | None) -> str:
        return outcome(way, total.figures, origin) if total else DASH

    numbers = sorted({layer for found in layers.values() for layer in found})
    rows = [[str(layer), *(cell(found.get(layer)) for found in layers.values())] for layer in numbers]
    return table(["layer", *layers], rows, css="compact", label="SQNR by layer and class")


class _Bar(NamedTuple):
    kind: str
    ratio: float | None
    """SQNR in dB; None for a class that has none."""
    words: str


def by_class(report: Report) -> str:
    """Draw a bar for each class; one that lost nothing gets a word instead."""
    bars = [_bar(kind, ways, report.origin) for kind, ways in report.rows().items()]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, bar in enumerate(bars):
            if bar.ratio is not None:
                axes.barh(row, bar.ratio, color=colour(f"class-{class_number(bar.kind)}"), height=0.62)
            axes.annotate(
                bar.words,
                (max(bar.ratio or 0, 0), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=colour("muted" if bar.ratio is None else "ink"),
            )
        ratios = [bar.ratio for bar in bars if bar.ratio is not None] or [1.0]
        room = 1.12 if canvas is WIDE else 1.4  # for the words behind the longest bar
        lay_bars(axes, [bar.kind for bar in bars], (min(0, *ratios, 0), max(*ratios, 1) * room), "SQNR (dB)")

    without = any(bar.ratio is None for bar in bars)
    words = (
        f"Lower is further: 6 dB less is twice the way.{' Classes without a bar did not move.' * without}"
        if report.moved
        else f"Higher is better: 6 dB more is half the error.{' Classes without a bar lost nothing.' * without}"
    )
    return figure(
        f"{_measured(report)} by tensor class: SQNR in dB",
        words,
        draw,
        (64 + 34 * len(bars), 58 + 28 * len(bars)),
    )


def _bar(kind: str, ways: dict[Way, Sum], origin: Origin) -> _Bar:
    figures = [total.figures for total in ways.values() if total.figures is not None]
    ratio = sum(figures, start=Figures()).sqnr_db
    if math.isfinite(ratio):
        return _Bar(kind, ratio, f"{ratio:.2f} dB")
    if figures and ratio < 0:
        return _Bar(kind, None, "no signal")
    if any(way.substituted for way in ways):
        way = next(way for way in ways if way.substituted)
        return _Bar(kind, None, outcome(way, None, origin))
    if figures:
        return _Bar(kind, None, "exact: nothing to round away")
    copied = all(way.copied for way in ways)
    return _Bar(kind, None, "exact: copied" if copied else "exact: code \N{MULTIPLICATION SIGN} scale")


def by_format(report: Report) -> str:
    """Draw what the checkpoint's bytes are, before and after."""
    before, after = ([found.get(name, 0) for name in CODED] for found in report.code_bytes())
    before.append(max(report.bytes_read - sum(before), 0))
    after.append(max(report.bytes_written - sum(after), 0))
    shown = [number for number in range(len(PARTS)) if before[number] or after[number]]
    largest = max(sum(before), sum(after), 1)
    unit, step = _unit(largest)

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, parts in enumerate((before, after)):
            left = 0.0
            for number in shown:
                width, words = parts[number] / step, size(parts[number])
                axes.barh(row, width, left=left, color=colour(f"part-{number}"), height=0.6)
                if parts[number] / largest * canvas.width * 0.8 > canvas.font * len(words) * 0.7:
                    axes.text(left + width / 2, row, words, ha="center", va="center", color=colour("on"))
                left += width
        lay_bars(axes, ["before", "after"], (0, largest / step * 1.02), f"size ({unit})")

    sides = (before, after)
    rows = [[PARTS[number], *(size(side[number]) if side[number] else DASH for side in sides)] for number in shown]
    rows.append(["all", size(report.bytes_read), size(report.bytes_written)])
    return figure(
        f"Size by format, in {unit}",
        f"{size(report.bytes_read)} of weights before, {size(report.bytes_written)} of files after.",
        draw,
        (190, 170),
        legend=legend(("\u25a0", f"part-{number}", PARTS[number]) for number in shown),
        table=table(["", "before", "after"], rows, css="compact", label="size by format"),
    )


def _unit(count: int) -> tuple[str, int]:
    exponent = min(int(math.log10(count) / 3 + 1e-9), 4)
    return ("B", "kB", "MB", "GB", "TB")[exponent], 1000**exponent


def lay_bars(axes: Axes, names: list[str], limits: tuple[float, float], label: str) -> None:
    """Lay out horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(*limits)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_xlabel(label)
