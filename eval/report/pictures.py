"""The pictures of a verdict: drops against the margin, accuracies, and what more items would give."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from k2quant.eval.gating.verdict import Comparison, Verdict
from k2quant.eval.report.chart_rows import Row, draw_interval, draw_upright, heights, lay_rows, room
from k2quant.eval.report.wording import confidence, decided_by, interval, margin, percent, rows, signed, title
from k2quant.ground.intervals import wilson
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 80  # rows of a picture
_COLOURS = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure"}
_MEANINGS = {"PASS": "drop is below the margin", "FAIL": "drop is above it", "INCONCLUSIVE": "cannot tell"}
_SAME = 1e-9
_EXACT = 1000  # items; beyond, the exact power takes seconds for each point, and the normal one is as good
_POINTS = 16


def drops(verdict: Verdict) -> str:
    """Draw each drop with its interval against its margin: the pool first, then the tasks."""
    shown, left_out = _shown(verdict)
    found = [_Drop(row, verdict) for row in shown]
    one_margin = all(abs(row.margin - verdict.pooled.margin) < _SAME for row in shown)

    def draw(axes: Axes, canvas: Canvas) -> None:
        draw_upright(axes, canvas, 0, len(found), color=colour("muted"), linewidth=1)
        for place, row in enumerate(found):
            draw_interval(axes, canvas, place, row.span, row.paint, "D" if row.strong else "o")
            if not one_margin:
                _draw_margin(axes, canvas, place, row.comparison.margin)
        if one_margin:
            dashes = {"color": colour("bad"), "linewidth": 1.4, "linestyle": (0, (4, 3))}
            draw_upright(axes, canvas, 100 * verdict.pooled.margin, len(found), **dashes)
        edges = [edge for row in found for edge in (*row.span, 100 * row.comparison.margin, 0.0)]
        lay_rows(axes, canvas, [row.words for row in found], room(edges, 1), "drop in accuracy (percentage points)")

    decisions = [] if verdict.same_model else [name for name in _COLOURS if any(r.decision == name for r in shown)]
    marks = [("\u25cf", _COLOURS[name], _MEANINGS[name]) for name in decisions]
    own = "the margin" if one_margin else "each row's margin"
    return figure(
        "Drop in accuracy, with its interval",
        f"Right is worse. A line is a {confidence(verdict.policy)} interval{_reading(verdict)}{left_out}",
        draw,
        heights(len(shown)),
        legend=legend([*marks, ("\u25c6", "muted", "all together"), ("\u2506", "bad", own)]),
    )


def _reading(verdict: Verdict) -> str:
    """Say how to read an interval beside its margin."""
    if verdict.same_model:
        return " of what differs between two runs of one model."
    return (
        ": all of it left of the margin is good enough, all of it right of the margin is not. "
        f"Colours are by what the verdict rests on: {decided_by(verdict)}."
    )


class _Drop:
    """A row of the picture of drops."""

    def __init__(self, comparison: Comparison, verdict: Verdict) -> None:
        low, high = comparison.interval
        self.comparison = comparison
        self.strong = comparison is verdict.pooled
        self.paint = "base" if verdict.same_model else _COLOURS[comparison.decision]
        self.span = (100 * low, 100 * comparison.drop, 100 * high)
        self.words = Row(title(comparison, verdict), f"{signed(comparison.drop)} {interval(low, high)}", self.strong)


def _draw_margin(axes: Axes, canvas: Canvas, place: int, value: float) -> None:
    up = 0.3 if canvas is WIDE else 0.24
    axes.plot([100 * value] * 2, [place - up, place + 0.3], color=colour("bad"), linewidth=1.4, linestyle=(0, (3, 2)))


def _shown(verdict: Verdict) -> tuple[list[Comparison], str]:
    """Return the rows that a picture has room for, and a sentence about the others."""
    found = rows(verdict)
    if len(found) <= _SHOWN:
        return found, ""
    worst = sorted(verdict.tasks, key=lambda task: -task.drop)[: _SHOWN - 1]
    return [verdict.pooled, *worst], f" The {len(worst)} tasks of the largest drop of {len(verdict.tasks):,}."


def accuracies(verdict: Verdict) -> str:
    """Draw the accuracy of baseline and candidate with Wilson's intervals."""
    shown, left_out = _shown(verdict)
    pairs = [(_wilson(row.base_right, row.n), _wilson(row.candidate_right, row.n)) for row in shown]
    once = (
        " An item asked several times counts as one, so a line is rather too long." if verdict.pooled.repeated else ""
    )
    words = [
        Row(
            title(row, verdict),
            f"{percent(row.base_accuracy)} \N{RIGHTWARDS ARROW} {percent(row.candidate_accuracy)}",
            row is verdict.pooled,
        )
        for row in shown
    ]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for place, (base, candidate) in enumerate(pairs):
            draw_interval(axes, canvas, place - 0.14, base, "base", "s")
            draw_interval(axes, canvas, place + 0.14, candidate, "candidate", "o")
        low, high = room((edge for pair in pairs for span in pair for edge in span), 4)
        lay_rows(axes, canvas, words, (max(low, -1), min(high, 101)), "accuracy (%)")

    return figure(
        "Accuracy of baseline and candidate",
        "A line is a 95% interval of one model by itself. Overlap says little: the same items were asked of both, and "
        f"only the picture above uses that.{once}{left_out}",
        draw,
        heights(len(shown)),
        legend=legend([("\u25a0", "base", "baseline"), ("\u25cf", "candidate", "candidate")]),
    )


def _wilson(right: float, n: int) -> tuple[float, float, float]:
    """Return Wilson's 95% interval around a share: low end, share, high end, in percent."""
    low, high = wilson(right, n)
    return 100 * low, 100 * right / n, 100 * high


def power_curve(verdict: Verdict) -> str:
    """Draw the chance of PASS of a candidate without any drop, by the number of items."""
    pooled, policy = verdict.pooled, verdict.policy
    curve = _curve(pooled, policy.alpha)
    wanted, needed = 100 * policy.power, pooled.needed

    def draw(axes: Axes, canvas: Canvas) -> None:
        axes.set_xscale("log")
        axes.plot(*zip(*curve, strict=True), color=colour("candidate"), linewidth=2)
        axes.axhline(wanted, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        _note(
            axes, canvas, (pooled.n, 100 * pooled.power), f"here: {pooled.n:,} items, {pooled.power:.0%}", "candidate"
        )
        if needed is not None and needed != pooled.n:
            axes.plot([needed], [wanted], color=colour("base"), marker="s", markersize=canvas.font / 1.7)
        _scale_power(axes, canvas)

    aim = (
        f"{needed:,} items reach the {policy.power:.0%} that the policy wants"
        if needed is not None
        else f"no number of items reaches the {policy.power:.0%} that the policy wants"
    )
    noise = f"the {percent(pooled.flips)} of flips that were seen"
    if pooled.repeated:
        noise = "the differences between items that were seen"
    return figure(
        "What more items would give",
        f"Chance of PASS for a candidate that lost nothing, at {noise} and a margin of {margin(pooled.margin)}: {aim}.",
        draw,
        (300, 260),
        legend=legend(
            [
                ("\u25cf", "candidate", "this gate"),
                ("\u25a0", "base", "items needed"),
                ("\u2504", "muted", "power wanted"),
            ]
        ),
    )


def _note(axes: Axes, canvas: Canvas, point: tuple[float, float], words: str, paint: str) -> None:
    """Mark a point, with words on the side where the curve is not."""
    low, high = axes.get_xlim()
    left = math.log(point[0] / low) > 0.55 * math.log(high / low)
    axes.plot(*([value] for value in point), color=colour(paint), marker="o", markersize=canvas.font / 1.5)
    axes.annotate(
        words,
        point,
        xytext=(-10, 10) if left else (10, -10),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom" if left else "top",
    )


def _scale_power(axes: Axes, canvas: Canvas) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if canvas is WIDE else (1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("items")
    axes.set_ylabel("chance of PASS (%)")


def _curve(pooled: Comparison, alpha: float) -> list[tuple[int, float]]:
    """Return numbers of items with the power there, in percent; those that are marked are among them."""
    marked = [pooled.n, *((pooled.needed - 1, pooled.needed) if pooled.needed else ())]  # without flips it is one step
    ends = [pooled.n, pooled.needed or 4 * pooled.n]
    low, high = max(min(ends) / 8, 10), 1.6 * max(ends)
    numbers = {round(low * (high / low) ** (step / (_POINTS - 1))) for step in range(_POINTS)}.union(marked)
    return [(n, 100 * _power(n, pooled, alpha)) for n in sorted(numbers)]


def _power(n: int, pooled: Comparison, alpha: float) -> float:
    from k2quant.eval.statistics.paired import power, score  # numpy is loaded here
    from k2quant.eval.statistics.repeats_planning import Differences, power_of

    wanted, flips = pooled.margin, pooled.flips
    if n == pooled.n:
        return pooled.power
    if pooled.spread and flips:
        return power_of(Differences(*pooled.spread), n, wanted, alpha)
    if not flips:
        return float((1 - wanted) ** n <= alpha)
    if n <= _EXACT:
        return power(n, wanted, alpha, flips)
    expected = float(score(n * flips / 2, n * flips / 2, n, wanted))
    spread = wanted * math.sqrt(n) / expected  # of Z's denominator; the flips of a lossless candidate spread by sqrt(d)
    return NormalDist().cdf((expected - NormalDist().inv_cdf(1 - alpha)) * spread / math.sqrt(flips))
