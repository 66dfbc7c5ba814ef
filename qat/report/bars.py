"""What came back as one bar on one axis: BF16, trained and rounded, in nats and in answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from k2quant.qat.report.recovery import nats, percent, recovery
from k2quant.qat.run.history import Evaluation
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HIGH = 0.5  # of the bar, where the whole picture is 1


class _Mark(NamedTuple):
    """A place on the axis."""

    words: str
    paint: str
    marker: str
    sign: str
    """The marker as text."""
    value: float
    said: str
    """The value in words."""


def loss_recovered(last: Evaluation) -> str:
    """Draw the held-out loss of the trained model between that of the start point in BF16 and that of it rounded."""
    found = recovery(last)
    if found is None or last.start is None or last.start_rounded is None:
        return ""
    marks = [
        _Mark(words, *look, value, nats(value))
        for (words, look), value in zip(_looks(), (last.start, last.loss, last.start_rounded), strict=True)
    ]
    left = last.loss - last.start
    moved = "took off" if found.regained >= 0 else "added to"
    what = "as low as" if left == 0 else f"{nats(abs(left))} {'above' if left > 0 else 'below'}"
    return _bar(
        "Loss that came back",
        f"Held-out cross-entropy in nats a token; the filled part is what training {moved} the rounded model. What is "
        f"served now is {what} the start point in BF16.",
        marks,
        "held-out cross-entropy (nats a token)",
        better=found.regained >= 0,
    )


def answers_right(last: Evaluation) -> str:
    """Draw the share of answers that are right, as `loss_recovered` draws losses."""
    found = last.answers
    if found is None or found.start is None or found.start_rounded is None:
        return ""
    marks = [
        _Mark(words, *look, 100 * right / found.count, percent(right, found.count))
        for (words, look), right in zip(_looks(), (found.start, found.right, found.start_rounded), strict=True)
    ]
    return _bar(
        "Answers that came back",
        f"Of {found.count:,} held-out answers those that are wholly right, every token of them. A share of the loss is "
        "no share of these.",
        marks,
        "answers right (%)",
        limits=(0, 100),
        better=found.right >= found.start_rounded,
    )


def _looks() -> tuple[tuple[str, tuple[str, str, str]], ...]:
    return (
        ("start, BF16", ("good", "D", "\u25c6")),
        ("trained, rounded", ("candidate", "o", "\u25cf")),
        ("start, rounded", ("bad", "s", "\u25a0")),
    )


def _bar(
    title: str,
    note: str,
    marks: list[_Mark],
    label: str,
    *,
    better: bool,
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw marks for BF16, trained and rounded, on a bar that is filled from rounded to trained."""
    values = [mark.value for mark in marks]
    _, trained, rounded = values

    def draw(axes: Axes, canvas: Canvas) -> None:
        low, high = limits or _around(values)
        axes.barh(0, max(values) - min(values), _HIGH, min(values), color=colour("line"))
        axes.barh(0, rounded - trained, _HIGH, trained, color=colour("candidate" if better else "bad"), alpha=0.35)
        for mark in marks:
            axes.plot(
                [mark.value], [0], mark.marker, color=colour(mark.paint), markersize=0.8 * canvas.font, clip_on=False
            )
        axes.set_xlim(low, high)
        axes.set_ylim(-0.5, 0.5)
        _scale(axes, canvas, label)

    entries = [(mark.sign, mark.paint, f"{mark.words}: {mark.said.replace('-', '&minus;')}") for mark in marks]
    return figure(title, note, draw, (120, 110), legend=legend(entries))


def _around(values: list[float]) -> tuple[float, float]:
    """Return limits with a margin; from 0 on where the lowest is near it."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.2 * high else low - margin), high + margin


def _scale(axes: Axes, canvas: Canvas, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10 if canvas is WIDE else 5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
