"""How much of the loss that rounding adds came back, how many answers are right, and what may be said of it."""

from __future__ import annotations

from typing import NamedTuple

from k2quant.ground.units import counted
from k2quant.qat.run.history import Answers, Evaluation, Records

CAVEAT = (
    "Part of what a training gains is more training, which has nothing to do with rounding. A control says how much: "
    "the same job with `training: {fake_quantize: false}` and an output of its own, rounded only when it is measured "
    "and exported. What QAT adds is the difference between the two rounded models"
)
"""What every figure of a run without its control has to be read with; plain text without a full stop."""
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
    return f"{_share(found, who, target(history))}{_also(last.answers)}"


def _share(found: Recovery, who: str, to: str) -> str:
    if not found.told:
        return f"The loss that rounding{to} adds is too small here to speak of"
    added = f"the loss that rounding{to} adds"
    if found.share > 1:
        return f"{who} recovers all of {added}, and {nats(found.regained - found.gap)} nats more"
    return f"{who} recovers {whole_percent(found.share) if found.share > 0 else 'nothing'} of {added}"


def _also(answers: Answers | None) -> str:
    """Return how many answers are right as the end of a sentence; a share of a loss is no share of them."""
    if answers is None:
        return ""
    return f"; {percent(answers.right, answers.count)} of the answers are right"


def percent(right: int, count: int) -> str:
    """Return a share of answers: `68.1%`; in whole percent where there are fewer than 100."""
    return f"{100 * right / count:.{1 if count >= 100 else 0}f}%"


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
    return counted(number, "step")


def nats(value: float) -> str:
    """Return a loss or a difference of losses: `2.1435`."""
    return f"{value:.4f}" if 5e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
