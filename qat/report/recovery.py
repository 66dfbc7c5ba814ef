"""How much of what rounding costs came back, and what may be said of it."""

from __future__ import annotations

from typing import NamedTuple

from k2quant.qat.run.history import Evaluation, Records

LEAST = 3.0
"""Standard errors below which a gap is noise: no share of it is given."""


class Recovery(NamedTuple):
    """Losses of one evaluation against those of the start point, nats a token."""

    gap: float
    """What plain rounding costs the start point."""
    error: float | None
    """Standard error of `gap`; None where none was recorded."""
    regained: float
    """How far the trained model's loss lies below that of the rounded start point."""

    @property
    def told(self) -> bool:
        """Whether the gap is large enough to take a share of."""
        return self.gap > LEAST * (self.error or 0.0)

    @property
    def share(self) -> float:
        """What came back, of the gap; above 1 where the loss is below that of the start point in BF16."""
        return self.regained / self.gap


def recovery(evaluation: Evaluation) -> Recovery | None:
    """Return what an evaluation says of recovery; None where the start point was not evaluated."""
    start, rounded, error = evaluation.start, evaluation.start_rounded, evaluation.gap_error
    if start is None or rounded is None:
        return None
    error = evaluation.standard_error if error is None else error
    return Recovery(rounded - start, error, rounded - evaluation.loss)


def headline(history: Records, *, control: bool = False) -> str:
    """Return a run's result in one sentence of plain text, without a full stop.

    Args:
        history: of the run.
        control: whether nothing was fake-quantised while it trained.
    """
    who = "Training without fake quantisation" if control else "QAT"
    if not history.evaluations:
        return f"{steps(len(history.steps))} trained; nothing was evaluated"
    last = history.evaluations[-1]
    found = recovery(last)
    if found is None:
        return f"Held-out loss {nats(last.loss)} nats a token after {steps(last.step)}"
    cost = f"rounding{target(history)} costs"
    if not found.told:
        return f"What {cost} here is too small a gap to speak of"
    if found.share <= 0:
        return f"{who} recovers nothing of what {cost}"
    return f"{who} recovers {whole_percent(found.share) if found.share <= 1 else 'more than all'} of what {cost}"


def target(history: Records) -> str:
    """Return ` to INT4`, by the width of the last codes; nothing where none was recorded."""
    bits = next((record.bits for record in reversed(history.steps) if record.bits is not None), None)
    return "" if bits is None else f" to INT{bits}"


def whole_percent(share: float) -> str:
    """Return a share above 0: `63%`; `100%` only where it is."""
    percent = round(100 * share)
    if percent < 1:
        return "less than 1%"
    return f"{min(percent, 99) if share < 1 else percent:,}%"


def steps(number: int) -> str:
    """Return so many steps: `1 step`, `2,500 steps`."""
    return f"{number:,} step{'' if number == 1 else 's'}"


def nats(value: float) -> str:
    """Return a loss or a difference of losses: `2.1435`."""
    return f"{value:.4f}" if 5e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
