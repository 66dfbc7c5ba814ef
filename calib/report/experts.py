"""Pictures and tables of the experts: each at its place, sorted by load, and the spread of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING

import numpy as np

from k2quant.calib.coverage import THIN, THINNEST, TIERS, LayerLoad, PartCoverage
from k2quant.calib.report.grid import LEVELS, MOST_LAYERS, cells, legend, levels, place
from k2quant.report.drawing import Canvas, colour, figure, frame, spoken
from k2quant.report.drawing import legend as marks
from k2quant.report.pictures import lay_layers
from k2quant.report.words import count, share, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORST_SHOWN = 20


def by_place(part: PartCoverage) -> str:
    """Draw every expert at its place: a row is a layer, a cell is an expert."""
    loads = part.layers[:MOST_LAYERS]
    rows = [levels(load, part.hidden) for load in loads]
    experts = max(len(load.tokens) for load in loads)
    title = "Every expert: its tokens over the width of its input"
    note = (
        f"A row is a layer, a cell is an expert. d is {part.hidden:,}, the width of the input of gate and up. "
        f"{_mean(part)}{_ringed(part)}{_left_out(part)}"
    )
    step = max(1, -(-experts // 8))
    columns = [((number + 0.5) / experts, str(number)) for number in range(0, experts, step)]
    drawn = place("experts", loads, spoken(title, note), ring=True, columns=columns, foot="expert")
    return frame(title, note, cells("experts", rows) + drawn, legend=legend(_counts(rows)))


def by_load(part: PartCoverage) -> str:
    """Draw the same cells sorted by load, so that a row says which part of its experts has how much."""
    loads = part.layers[:MOST_LAYERS]
    rows = [np.sort(levels(load, part.hidden)) for load in loads]
    widest = max(map(len, rows))
    title = "The same, sorted"
    note = (
        "Each row from the expert with the fewest tokens to the one with the most: how long a colour is says how many."
    )
    columns = [(at / 4, f"{25 * at}%") for at in range(5)] if all(len(row) == widest for row in rows) else []
    drawn = place("sorted", loads, spoken(title, note), ring=False, columns=columns, foot="part of the layer's experts")
    numbers = [[str(load.layer), *(f"{n:,}" for n in _counts([row]))] for load, row in zip(loads, rows, strict=True)]
    heads = ["layer", *(level.words for level in LEVELS)]
    listed = table(heads, numbers, css="compact", label="experts by layer and tokens")
    return frame(title, note, cells("sorted", rows) + drawn, legend=legend(_counts(rows)), table=listed)


def _counts(rows: Sequence[np.ndarray]) -> list[int]:
    return [int(number) for number in np.bincount(np.concatenate(rows), minlength=len(LEVELS))]


def _mean(part: PartCoverage) -> str:
    """Say what the mean of a layer is on the scale of the picture; it is the same in every layer."""
    mean = part.layers[0].mean
    thin = f"below a tenth of it, {_over(THIN * mean, part.hidden)}, an expert is thin"
    return f"The mean of a layer is {mean:,.0f} tokens, {_over(mean, part.hidden)}; {thin}."


def _over(tokens: float, width: int) -> str:
    """Return tokens over a width: `0.35 d`."""
    return (
        f"{tokens / width:#.2g}&nbsp;d".replace(".&", "&") if tokens < 100 * width else f"{tokens / width:,.0f}&nbsp;d"
    )


def _ringed(part: PartCoverage) -> str:
    return " Experts without a token are ringed." if 0 < part.empty <= 300 else ""


def _left_out(part: PartCoverage) -> str:
    return f" The first {MOST_LAYERS} of {len(part.layers):,} layers." if len(part.layers) > MOST_LAYERS else ""


def by_layer(part: PartCoverage) -> str:
    """Draw the spread of each layer on a logarithmic scale, with the marks of both scales as lines."""
    loads = part.layers[:MOST_LAYERS]
    numbers = [load.layer for load in loads]
    spread = [[max(float(q), 0.5) for q in np.quantile(load.tokens, (0, 0.1, 0.5, 0.9, 1))] for load in loads]
    low, tenth, middle, ninth, high = (list(column) for column in zip(*spread, strict=True))
    lines = [(f"{_tier(tier)} = {tier * part.hidden:,.0f}", tier * part.hidden, "muted") for tier in TIERS]
    lines += [(f"{mark:.0%} of the mean", mark * loads[0].mean, "bad") for mark in (THIN, THINNEST)]

    def draw(axes: Axes, canvas: Canvas) -> None:
        axes.set_yscale("log")
        if len(numbers) > 1:
            axes.fill_between(numbers, low, high, color=colour("candidate"), alpha=0.14, linewidth=0)
            axes.fill_between(numbers, tenth, ninth, color=colour("candidate"), alpha=0.22, linewidth=0)
        else:
            axes.vlines(numbers, low, high, color=colour("candidate"), alpha=0.3, linewidth=6)
            axes.vlines(numbers, tenth, ninth, color=colour("candidate"), alpha=0.5, linewidth=6)
        axes.plot(numbers, middle, color=colour("candidate"), marker="o", markersize=canvas.font / 3.5, linewidth=1.6)
        axes.plot(numbers, low, color=colour("bad"), marker="v", markersize=canvas.font / 3, linestyle="none")
        _draw_lines(axes, canvas, lines, (min(low), max(high)))
        _scale(axes, canvas)

    return figure(
        "Tokens of an expert, by layer",
        "The line is a layer's median expert, the inner band holds four experts of five, the outer band all. "
        "Below the dashed lines an expert is thin beside the mean of its layer, or has few tokens for the width d."
        f"{_left_out(part)}",
        draw,
        (340, 300),
        legend=marks(
            [
                ("\u25cf", "candidate", "median"),
                ("\u2592", "candidate", "tenth to ninth tenth; least to most"),
                ("\u25bc", "bad", "least"),
            ]
        ),
        table=_layers(loads, part),
    )


def _tier(tier: float) -> str:
    return "d" if tier == 1 else f"{tier:g}d" if tier > 1 else f"d/{1 / tier:g}"


def _draw_lines(
    axes: Axes, canvas: Canvas, lines: Sequence[tuple[str, float, str]], limits: tuple[float, float]
) -> None:
    """Draw marks that lie in the picture or close to it, each with its words at the right end."""
    low, high = limits[0] / 2, limits[1] * 2
    near: list[float] = []
    for words, value, paint in lines:
        if not low <= value <= high:
            continue
        axes.axhline(value, color=colour(paint), linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        above = any(0.75 < value / other < 1.34 for other in near)
        near.append(value)
        axes.annotate(
            words,
            (0 if above else 1, value),
            (4 if above else -4, 2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom",
            fontsize=0.82 * canvas.font,
            color=colour(paint),
        )
    axes.set_ylim(low, high)


def _scale(axes: Axes, canvas: Canvas) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ticks = axes.get_ylim()
    lay_layers(axes, canvas, "tokens of an expert")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0"))
    axes.set_ylim(*ticks)


def _layers(loads: Sequence[LayerLoad], part: PartCoverage) -> str:
    heads = ["layer", "least", "median", "most", "no token", f"below {THINNEST:.0%}", f"below {THIN:.0%}"]
    rows = [
        [
            str(load.layer),
            *(f"{value:,.0f}" for value in (load.tokens.min(), np.median(load.tokens), load.tokens.max())),
            *(f"{number:,}" for number in (len(load.empty), load.thin(THINNEST), load.thin(THIN))),
            f"{load.entropy:.3f}",
            missing(load, part.hidden),
        ]
        for load in loads
    ]
    return table([*heads, "entropy", "tokens missing"], rows, css="compact", label="load of the experts by layer")


def missing(load: LayerLoad | PartCoverage, width: int) -> str:
    """Return how many more tokens the worst expert needs, as HTML."""
    least = "&ge;&nbsp;" if load.empty else ""
    return f"{least}{count(load.needed(width))}"


def worst(part: PartCoverage) -> str:
    """List the experts with the fewest tokens."""
    every = (
        (int(tokens), load.layer, expert, load)
        for load in part.layers
        for expert, tokens in enumerate(load.tokens)
        if tokens < part.hidden
    )
    found = nsmallest(_WORST_SHOWN, every, key=lambda one: one[:3])
    if not found:
        return ""
    rows = [
        [
            f"layer {layer}, expert {expert}",
            f"{tokens:,}",
            share(tokens, load.mean),
            f"{tokens / part.hidden:.3g}",
            f"{tokens / part.inner:.3g}",
            f"{load.weight[expert]:.3g}",
        ]
        for tokens, layer, expert, load in found
    ]
    heads = ["expert", "tokens", "of the mean", "n/d, gate and up", "n/d, down", "&Sigma;p&sup2;"]
    more = part.below(part.hidden) - len(found)
    rest = f" {more:,} more have fewer than d." if more else ""
    note = (
        "n/d is tokens over the width of the input. &Sigma;p&sup2; is what their squared errors count for in the "
        f"layer's output.{rest}"
    )
    return (
        f"<section class=card><h2>The {len(found):,} experts with the fewest tokens</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='compact', label='experts with the fewest tokens')}</section>"
    )
