"""What rounding left of an update that was merged in: as numbers, as pictures and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from k2quant.merge.figures import MergeFigures, total
from k2quant.report.content import Report, Sum
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend
from k2quant.report.origins import Merged
from k2quant.report.pictures import MARKERS, MARKS, class_number, lay_bars, lay_layers
from k2quant.report.words import DASH, count, share, table, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _LOST = "candidate", "bad"
_MOST = 0.5  # a share of groups that is worth a word
_LITTLE = 1.0  # percent of an update; a picture of less is one of nothing

Classes = dict[str, MergeFigures]


def tiles(report: Report) -> Iterator[str]:
    """Yield the numbers that matter."""
    classes = _classes(report)
    if not classes:
        return
    kind, worst = _worst(classes)
    whole = total(classes.values())
    note = f"{kind}; {share(whole.lost, whole.update)} of the whole update" if len(classes) > 1 else kind
    yield tile("Update lost", share(worst.lost, worst.update), note)
    changed = share(whole.codes_changed, whole.count)
    yield tile("Weights changed", changed, f"of {count(whole.count)} with an update")


def section(report: Report, origin: Merged) -> str:
    """Return the pictures and the table; the table says what the terminal does."""
    classes = _classes(report)
    if not classes:
        return "<p class=card>What became of the update was not measured.</p>"
    return f"{_by_class(classes)}\n{_by_layer(report)}\n{_table(report, classes, origin)}"


def _classes(report: Report) -> Classes:
    return {
        kind: total(layer.update for layer in layers.values() if layer.update is not None)
        for kind, layers in report.updates().items()
    }


def _worst(classes: Classes) -> tuple[str, MergeFigures]:
    return max(classes.items(), key=lambda pair: pair[1].lost_share)


def _by_class(classes: Classes) -> str:
    """Draw a bar for each class, of what came through and what did not."""
    lost = [100 * figures.lost_share for figures in classes.values()]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for row, gone in enumerate(lost):
            axes.barh(row, 100 - gone, color=colour(_KEPT), height=0.62)
            axes.barh(row, gone, left=100 - gone, color=colour(_LOST), height=0.62)
            words = f"{gone:.1f}% lost"
            axes.annotate(
                words, (100, row), xytext=(7, 0), textcoords="offset points", va="center", color=colour("ink")
            )
        room = 1.12 if canvas is WIDE else 1.45  # for the words behind the bars
        lay_bars(axes, list(classes), (0, 100 * room), "share of the update's energy (%)")
        axes.set_xticks(range(0, 101, 20 if canvas is WIDE else 50))

    kind, worst = _worst(classes)
    why = ""
    if worst.groups_below_half_step > _MOST * worst.groups:
        such = share(worst.groups_below_half_step, worst.groups)
        why = f"; in {such} of their groups it is smaller than half a step of the base's scale"
    return figure(
        "What rounding left of the update, by tensor class",
        f"Most is lost in {kind}: {share(worst.lost, worst.update)}{why}.",
        draw,
        (64 + 34 * len(classes), 58 + 28 * len(classes)),
        legend=legend([("\u25a0", _KEPT, "came through"), ("\u25a0", _LOST, "lost to rounding")]),
    )


def _by_layer(report: Report) -> str:
    """Draw the share that is lost in each layer, a line for each class; nothing for one layer, or if little is."""
    found = report.updates()
    series = {
        kind: {layer: _lost(total) for layer, total in layers.items() if layer is not None}
        for kind, layers in found.items()
    }
    series = {kind: points for kind, points in series.items() if points}
    numbers = sorted({layer for points in series.values() for layer in points})
    if len(numbers) < 2 or max(max(points.values()) for points in series.values()) < _LITTLE:
        return ""

    def draw(axes: Axes, canvas: Canvas) -> None:
        for kind, points in series.items():
            number = class_number(kind)
            axes.plot(
                list(points),
                list(points.values()),
                color=colour(f"class-{number}"),
                marker=MARKERS[number],
                markersize=canvas.font / 2.6,
                linewidth=1.6,
            )
        axes.set_ylim(-3, 103)
        lay_layers(axes, canvas, "update lost (%)")

    rows = [
        [str(layer), *(f"{points[layer]:.1f}%" if layer in points else DASH for points in series.values())]
        for layer in numbers
    ]
    return figure(
        "Update lost, by layer",
        "Lower is better: the share of a class's update in a layer that did not come through.",
        draw,
        (320, 260),
        legend=legend((MARKS[class_number(kind)], f"class-{class_number(kind)}", kind) for kind in series),
        table=table(["layer", *series], rows, css="compact", label="update lost by layer and class"),
    )


def _lost(total: Sum) -> float:
    return 100 * total.update.lost_share if total.update else 0.0


def _table(report: Report, classes: Classes, origin: Merged) -> str:
    heads = ["class", "tensors", "|D|", "cosine", "|E|&nbsp;/&nbsp;|D|", "lost", "codes changed"]
    counts = {kind: sum(total.updated for total in layers.values()) for kind, layers in report.updates().items()}
    rows = [
        [
            kind,
            f"{counts[kind]:,}",
            f"{figures.norm:.4g}",
            f"{figures.cosine:.4f}",
            f"{figures.ratio:.3f}",
            share(figures.lost, figures.update),
            share(figures.codes_changed, figures.count),
        ]
        for kind, figures in classes.items()
    ]
    more = origin.weights - sum(counts.values())
    untold = f" {more:,} more were replaced whole and not measured." if more > 0 else ""
    return (
        "<section class=card><h2>What became of the update</h2><p class=note>D is the exact update, scaling &times; "
        "B &times; A; E is what the stored weights changed by. Lost is "
        "&Sigma;min(D&sup2;,&nbsp;(D&nbsp;&minus;&nbsp;E)&sup2;)&nbsp;/&nbsp;&Sigma;D&sup2;: 100% where no weight came "
        f"nearer to what was asked for.{untold}</p>{table(heads, rows, label='what became of the update')}</section>"
    )
