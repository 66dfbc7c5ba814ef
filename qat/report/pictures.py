"""Pictures of a history: held-out loss, training loss, and the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from k2quant.qat.report.recovery import nats
from k2quant.qat.run.history import Evaluation, StepRecord
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend
from k2quant.report.words import DASH, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 500  # of a curve; more could not be told apart on a screen, and would make the page large
_SMOOTH = 25  # the smoothed curve is a mean of one part in so many of all steps
_ROWS = 200  # evaluations in a table
_LINE = 3  # values that make a line; two are two dots
_WIDTHS = 12  # widths of codes that are named in the picture


class _Series(NamedTuple):
    """A loss that is evaluated again and again."""

    name: str
    paint: str
    marker: str
    mark: str
    """The marker as text."""
    points: list[tuple[int, float]]


def held_out(evaluations: Sequence[Evaluation]) -> str:
    """Draw the held-out losses of the model, and those of its start point as horizontal lines."""
    if not evaluations:
        return ""
    series = list(_series(evaluations))
    last = evaluations[-1]
    lines = [
        (name, paint, value)
        for name, paint, value in (
            ("start, rounded", "bad", last.start_rounded),
            ("start, BF16", "good", last.start),
        )
        if value is not None
    ]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for _, paint, value in lines:
            axes.axhline(value, color=colour(paint), linewidth=1.6, linestyle=(0, (4, 3)))
        for found in series:
            _draw_points(axes, canvas, found)
        _scale(axes, canvas, "held-out cross-entropy (nats a token)")

    marks = [(found.mark, found.paint, found.name) for found in series]
    return figure(
        "Held-out loss",
        f"Cross-entropy in nats a token, always of the same rows. Lower is better.{_error(last)}",
        draw,
        (380, 320),
        legend=legend([*marks, *(("\u2505\u2505", paint, f"{name}: {nats(value)}") for name, paint, value in lines)]),
        table=_losses(evaluations),
    )


def _series(evaluations: Sequence[Evaluation]) -> Iterator[_Series]:
    unrounded = [(found.step, found.unrounded) for found in evaluations if found.unrounded is not None]
    if unrounded:
        yield _Series("now, without rounding", "class-1", "s", "\u25a0", unrounded)
    rounded = [(found.step, found.loss) for found in evaluations]
    yield _Series("now, fake-quantised", "candidate", "o", "\u25cf", rounded)


def _error(last: Evaluation) -> str:
    if last.standard_error is None:
        return ""
    return (
        f" One loss has a standard error of {nats(last.standard_error)}; differences are surer than that, "
        "since the rows are the same."
    )


def _draw_points(axes: Axes, canvas: Canvas, found: _Series) -> None:
    steps, values = zip(*found.points, strict=True)
    size = canvas.font / 2.2 if len(steps) <= canvas.width / 16 else 0
    line, _ = _line(len(steps))
    axes.plot(
        steps, values, linestyle=line, color=colour(found.paint), marker=found.marker, markersize=size, linewidth=1.8
    )


def _line(count: int) -> tuple[str, str]:
    """Return line and marker of so many values: a line between two would say what nobody measured there."""
    return ("-", "") if count >= _LINE else ("none", "o")


def _losses(evaluations: Sequence[Evaluation]) -> str:
    heads = ["step", "fake-quantised", "standard error", "without rounding"]
    rows = [
        [
            f"{found.step:,}",
            *(DASH if value is None else nats(value) for value in (found.loss, found.standard_error, found.unrounded)),
        ]
        for found in evaluations[-_ROWS:]
    ]
    return table(heads, rows, css="compact", label="held-out losses")


def training(steps: Sequence[StepRecord]) -> str:
    """Draw the training loss, raw and smoothed."""
    if not steps:
        return ""
    values = [record.cross_entropy for record in steps]
    return _curve(
        "Training loss",
        "Cross-entropy of the tokens learnt in each step, with the codes of that step. Every step has other text, "
        "so it is noisier than the held-out loss.",
        steps,
        values,
        "training cross-entropy (nats a token)",
    )


def divergence(steps: Sequence[StepRecord]) -> str:
    """Draw the divergence from the teacher, where there was one."""
    taught = [record for record in steps if record.divergence is not None]
    if not taught:
        return ""
    values = [record.divergence or 0.0 for record in taught]
    return _curve(
        "Divergence from the teacher",
        "KL(teacher || student) of the tokens learnt in each step. Lower is better.",
        taught,
        values,
        "KL divergence (nats a token)",
    )


def _curve(title: str, note: str, steps: Sequence[StepRecord], values: list[float], label: str) -> str:
    window = max(1, len(values) // _SMOOTH)
    smooth = _means(values, window)
    stride = -(-len(values) // _COLUMNS)
    numbers = [record.step for record in steps]

    def draw(axes: Axes, canvas: Canvas) -> None:
        if stride == 1:
            line, dot = _line(len(values))
            faint = 1 if dot else 0.45
            axes.plot(numbers, values, linestyle=line, marker=dot, color=colour("base"), alpha=faint, linewidth=1)
        else:
            parts = [values[begin : begin + stride] for begin in range(0, len(values), stride)]
            low, high = [min(part) for part in parts], [max(part) for part in parts]
            axes.fill_between(numbers[::stride], low, high, color=colour("base"), alpha=0.3, linewidth=0)
        if window > 1:
            shown = [*range(window - 1, len(values), stride), len(values) - 1]
            axes.plot([numbers[n] for n in shown], [smooth[n] for n in shown], color=colour("candidate"), linewidth=2)
        _scale(axes, canvas, label)
        axes.set_ylim(*_limits(values, smooth[window - 1 :]))

    one = "\u25cf" if len(values) < _LINE else "\u2014"
    raw = (one, "each step") if stride == 1 else ("\u2592", f"lowest to highest of {stride:,} steps")
    marks = [(raw[0], "base", raw[1])]
    if window > 1:
        marks.append(("\u2501", "candidate", f"mean of the last {window:,} steps"))
    return figure(title, note, draw, (320, 280), legend=legend(marks))


def _means(values: list[float], window: int) -> list[float]:
    """Return the mean of the last so many values at each, of fewer at the first ones."""
    sums = [0.0, *accumulate(values)]
    return [(sums[n + 1] - sums[max(0, n + 1 - window)]) / min(window, n + 1) for n in range(len(values))]


def _limits(values: list[float], smooth: list[float]) -> tuple[float, float]:
    """Return limits that a few wild steps do not stretch."""
    order = sorted(values)
    tail = len(order) // 100
    low, high = min(order[tail], *smooth), max(order[len(order) - 1 - tail], *smooth)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def schedule(steps: Sequence[StepRecord]) -> str:
    """Draw the learning rate and where the width of the codes changed; nothing where neither did."""
    widths = _widths(steps)
    if len({record.rate for record in steps}) < 2 and len(widths) < 2:
        return ""
    stride = -(-len(steps) // _COLUMNS)
    shown = [*steps[::stride], steps[-1]]

    line, dot = _line(len(steps))

    def draw(axes: Axes, canvas: Canvas) -> None:
        axes.plot(
            [record.step for record in shown],
            [record.rate for record in shown],
            linestyle=line,
            marker=dot,
            color=colour("base"),
            linewidth=1.8,
        )
        _scale(axes, canvas, "learning rate")
        low, high = min(record.rate for record in shown), max(record.rate for record in shown)
        axes.set_ylim(min(0, low), (high or 1.0) * 1.22)
        if len(widths) > 1:
            _draw_widths(axes, canvas, widths[:_WIDTHS], shown[-1].step)

    said = "" if len(widths) < 2 else f"Codes: {', then '.join(words for _, words in widths[:_WIDTHS])}."
    more = f" {len(widths) - _WIDTHS:,} later changes are left out." if len(widths) > _WIDTHS else ""
    title = "Learning rate" if len(widths) < 2 else "Learning rate and width of the codes"
    return figure(title, f"{said}{more}", draw, (210, 200))


def _draw_widths(axes: Axes, canvas: Canvas, widths: list[tuple[int, str]], last: int) -> None:
    """Mark each change of width, with its name where there is room for it before the next."""
    room = (last - widths[0][0]) * 4.5 * canvas.font / (0.8 * canvas.width)
    for (step, words), (after, _) in pairwise([*widths, (last, "")]):
        axes.axvline(step, color=colour("candidate"), linewidth=1.2, linestyle=(0, (4, 3)))
        if after - step >= room:
            top = axes.get_xaxis_transform()
            axes.annotate(words, (step, 0.97), (4, 0), xycoords=top, textcoords="offset points", va="top")


def _widths(steps: Sequence[StepRecord]) -> list[tuple[int, str]]:
    """Return the step of each change of the codes' width, the first step among them, and the width as words."""
    first = [(steps[0].step, width(steps[0].bits))] if steps else []
    return first + [(after.step, width(after.bits)) for before, after in pairwise(steps) if before.bits != after.bits]


def width(bits: int | None) -> str:
    """Return the width of codes as people write it."""
    return "BF16" if bits is None else f"INT{bits}"


def _scale(axes: Axes, canvas: Canvas, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 2:  # a single step
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10 if canvas is WIDE else 5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
