"""What a search of scales bought: errors beside those of rounding, by projection and layer, and what ships rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.conversion.searching.fitting import PLAIN
from k2quant.conversion.searching.gains import shipped
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.report.choices.searches import Scales, Search, projection
from k2quant.report.content import Report
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend
from k2quant.report.pictures import MARKERS, MARKS, lay_bars, lay_layers
from k2quant.report.sections import folded, solved
from k2quant.report.words import DASH, code, plain, table, text, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDS_SHOWN = 10  # matrices at each end
_WAYS_SHOWN = 30  # kinds of what ships
_BEYOND = 2.0  # of rounding's error; what is worse is drawn at the edge


class _One(NamedTuple):
    """A weight that was searched."""

    name: str
    layer: int | None
    scales: Scales


Groups = dict[str, list[_One]]


class _Spread(NamedTuple):
    """Relative errors of some weights, in order of size."""

    best: float
    tenth: float
    median: float
    ninth: float
    worst: float

    @classmethod
    def of(cls, weights: Sequence[_One]) -> _Spread:
        """Return the spread of at least one weight."""
        found = sorted(one.scales.relative for one in weights)
        last = len(found) - 1
        return cls(found[0], found[round(0.1 * last)], median(found), found[round(0.9 * last)], found[-1])


def tiles(report: Report) -> Iterator[str]:
    """Yield the numbers that matter."""
    weights = [one for group in _groups(report).values() for one in group]
    if not weights or report.search is None:
        return
    judged = [one for one in weights if one.scales.held_out]
    what = "Held-out error" if judged else "Squared error"
    number = len(judged or weights)
    middle = median(shipped(one.scales.method, one.scales.relative) for one in judged or weights)
    rounded = sum(one.scales.method == PLAIN for one in weights)
    ships = f"; {rounded:,} {'ships' if rounded == 1 else 'ship'} rounded" if judged else ""
    yield tile(what, _times(middle), f"of rounding&rsquo;s, median of {_matrices(number)}{ships}")
    yield from solved.tiles(report)


def section(report: Report) -> str:
    """Return pictures and tables; nothing where no scales were searched."""
    groups = _groups(report)
    if report.search is None:
        return ""
    if not groups:
        return f"<p class=card>{_asked(report.search)}: no weight got new codes, so no scales were searched.</p>"
    return (
        f"{solved.section(report)}\n{_by_layer(groups)}\n{_by_projection(groups)}\n{folded.section(report)}\n"
        f"{_ships(report.search, groups)}\n{_ends(groups)}"
    )


def as_json(report: Report) -> dict[str, Any] | None:
    """Return what a search bought as JSON holds it; None where no scales were searched."""
    if report.search is None:
        return None
    groups = _groups(report)
    every = [one for weights in groups.values() for one in weights]
    ways = Counter((one.scales.method, one.scales.measure, one.scales.reason) for one in every)
    search = report.search
    return {
        "method": search.method,
        "candidates": search.candidates,
        "stats": search.stats,
        "solving": solved.as_json(report),
        "folds": folded.as_json(report),
        "matrices": len(every),
        "relative": _Spread.of(every)._asdict() if every else None,
        "projections": {
            name: {"matrices": len(weights), "relative": _Spread.of(weights)._asdict()}
            for name, weights in groups.items()
        },
        "ships": [
            {"method": method, "measure": measure, "reason": reason, "matrices": number}
            for (method, measure, reason), number in ways.most_common()
        ],
    }


def facts(search: Search) -> Iterator[tuple[str, str]]:
    """Yield how scales were searched as pairs of HTML."""
    if search.solving is not None:
        yield from solved.facts(search.method, search.solving)
    else:
        default = " (default for what the source holds)" if search.default else ""
        yield "method", f"{code(search.method)}{default}, the best of {search.candidates or 0:,} scales a group"
    if search.stats is not None:
        yield "statistics", code(search.stats)


def _groups(report: Report) -> Groups:
    """Return the weights that were searched by projection, classes in their usual order."""
    found: Groups = {}
    for tensor in sorted(report.tensors, key=lambda tensor: TENSOR_CLASSES.index(tensor.kind)):
        if tensor.scales is not None:
            name = projection(tensor.name, tensor.kind)
            found.setdefault(name, []).append(_One(tensor.name, tensor.layer, tensor.scales))
    return found


def _asked(search: Search) -> str:
    return (
        text(search.method)
        if search.candidates is None
        else f"{text(search.method)}, {search.candidates:,} scales a group"
    )


def _matrices(number: int) -> str:
    return f"{number:,} matri{'x' if number == 1 else 'ces'}"


def _times(relative: float) -> str:
    """Return an error over that of rounding; `1.000` only where it is."""
    if relative >= 1000:
        return f"{relative:.3g}"
    said = f"{relative:.3f}"
    return said if relative == 1 or said != "1.000" else "0.999" if relative < 1 else "1.001"


def _by_layer(groups: Groups) -> str:
    """Draw the median of each projection in each layer, in a band that holds four of five."""
    series = {name: points for name, weights in groups.items() if (points := _points(weights))}
    if not series:
        return ""

    def draw(axes: Axes, canvas: Canvas) -> None:
        for number, points in enumerate(series.values()):
            layers, paint = list(points), colour(_paint(number))
            low, middle, high = (
                [min(spread[part], _BEYOND) for spread in points.values()] for part in (1, 2, 3)
            )  # tenth, median, ninth tenth
            axes.fill_between(layers, low, high, color=paint, alpha=0.16, linewidth=0)
            size, marker = canvas.font / 2.6, MARKERS[number % len(MARKERS)]
            axes.plot(layers, middle, color=paint, marker=marker, markersize=size, linewidth=1.6)
        _draw_one(axes.axhline)
        least, most = axes.get_ylim()
        axes.set_ylim(max(least, 0), max(most, 1.03))
        lay_layers(axes, canvas, "error over rounding's")

    heads = ["layer", *map(text, series)]
    numbers = sorted({layer for points in series.values() for layer in points})
    rows = [
        [str(layer), *(_times(points[layer].median) if layer in points else DASH for points in series.values())]
        for layer in numbers
    ]
    return figure(
        "Error beside that of rounding, by layer",
        "Lower is better, 1 is plain rounding. A line is a projection's median matrix, its band holds four of five.",
        draw,
        (340, 280),
        legend=legend((MARKS[number % len(MARKS)], _paint(number), text(name)) for number, name in enumerate(series)),
        table=table(heads, rows, css="compact", label="error beside that of rounding, by layer"),
    )


def _paint(number: int) -> str:
    return f"class-{number % len(MARKS)}"


def _points(weights: Sequence[_One]) -> dict[int, _Spread]:
    found: dict[int, list[_One]] = {}
    for one in weights:
        if one.layer is not None:
            found.setdefault(one.layer, []).append(one)
    return {layer: _Spread.of(found[layer]) for layer in sorted(found)}


def _draw_one(line: Callable[..., object]) -> None:
    """Draw where plain rounding is."""
    line(1, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))


def _by_projection(groups: Groups) -> str:
    """Draw the spread of each projection: from best to worst, four of five thick, the median as a mark."""
    spreads = {name: _Spread.of(weights) for name, weights in groups.items()}

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, spread in enumerate(spreads.values()):
            least, tenth, middle, ninth, most = (min(value, _BEYOND) for value in spread)
            paint = colour(_paint(row))
            axes.plot([least, most], [row, row], color=paint, linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                [tenth, ninth], [row, row], color=paint, linewidth=0.6 * canvas.font, solid_capstyle="butt", alpha=0.5
            )
            axes.plot([middle], [row], MARKERS[row % len(MARKERS)], color=paint, markersize=0.75 * canvas.font)
        _draw_one(axes.axvline)
        low = min(spread.best for spread in spreads.values())
        high = max(1.0, *(min(spread.worst, _BEYOND) for spread in spreads.values()))
        room = 0.05 * (high - low) or 0.05
        lay_bars(axes, [_short(name, canvas) for name in spreads], (low - room, high + room), "error over rounding's")

    beyond = sum(one.scales.relative > _BEYOND for weights in groups.values() for one in weights)
    more = f" {_matrices(beyond)} beyond {_BEYOND:g} {'is' if beyond == 1 else 'are'} drawn there." if beyond else ""
    rows = [
        [
            text(name),
            f"{len(weights):,}",
            *(_times(value) for value in spreads[name]),
        ]
        for name, weights in groups.items()
    ]
    heads = ["projection", "matrices", "best", "tenth", "median", "ninth tenth", "worst"]
    return figure(
        "Error beside that of rounding, by projection",
        "The mark is the median matrix, the bar holds four of five, the line goes from the best to the worst. 1 is "
        f"plain rounding; what lies above it on held-out data ships rounded.{more}",
        draw,
        (70 + 34 * len(groups), 64 + 30 * len(groups)),
        table=table(heads, rows, css="compact", label="error beside that of rounding, by projection"),
    )


def _short(name: str, canvas: Canvas) -> str:
    """Return a projection's name for the axis; matplotlib gets nothing that it could not draw."""
    words = plain(name, 60)
    return words if canvas is WIDE else words.replace("_proj", "").replace("_with_mqa", "")


def _ships(search: Search, groups: Groups) -> str:
    """List in how many ways the matrices ship, and why."""
    every = [one.scales for weights in groups.values() for one in weights]
    ways = Counter((scales.method, scales.measure, scales.reason) for scales in every)
    rows = [
        [code(method), f"{number:,}", text(measure), text(reason) if reason else DASH]
        for (method, measure, reason), number in ways.most_common(_WAYS_SHOWN)
    ]
    note = (
        "A matrix is judged on held-out tokens of its own; where they are few on a blend with what its layer sees; "
        "without any data on its weights. The squared error of all values together, which SQNR tells, may rise where "
        "columns that matter little pay for those that matter."
        if search.stats is not None or search.solving is not None
        else "Without statistics a matrix is judged on its weights: each column counts the same."
    )
    return (
        f"<section class=card><h2>What ships</h2><p class=note>{note}</p>"
        f"{table(['scales', 'matrices', 'measured on', 'why'], rows, css='compact', label='what ships')}</section>"
    )


def _ends(groups: Groups) -> str:
    """List the matrices that gained the least and the most."""
    every = [one for weights in groups.values() for one in weights]
    every.sort(key=lambda one: (-one.scales.relative, one.name))
    worst, best = every[:_ENDS_SHOWN], every[_ENDS_SHOWN:][-_ENDS_SHOWN:]
    heads = ["tensor", "relative error", "ships with", "measured on", "tokens"]
    rows = [
        [
            code(one.name),
            _times(one.scales.relative),
            code(one.scales.method),
            text(one.scales.measure),
            DASH if one.scales.tokens is None else f"{one.scales.tokens:,}",
        ]
        for one in [*worst, *best]
    ]
    said = f"The first {len(worst):,} gained the least, the last {len(best):,} the most." if best else "All of them."
    return (
        f"<section class=card><h2>Least and most gained</h2><p class=note>{said}</p>"
        f"{table(heads, rows, label='least and most gained')}</section>"
    )
