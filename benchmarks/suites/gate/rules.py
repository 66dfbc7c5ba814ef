"""How gates decide: ours, and those in use, on the same resamples. Each returns True where the candidate passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.eval.statistics.paired import acceptance, p_worse, rejection, score

Bools = NDArray[Any]
Counts = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What many runs saw: arrays, one entry a resample."""

    n: int
    margin: float
    alpha: float
    accuracy: float
    """The baseline's true accuracy, which rules with a constant are given."""
    base: Counts
    """Items the baseline has right."""
    lost: Counts
    gained: Counts

    @property
    def candidate(self) -> Counts:
        """Items the candidate has right."""
        return self.base - self.lost + self.gained

    @property
    def flips(self) -> Counts:
        """Items that changed."""
        return self.lost + self.gained


def ours(seen: Seen) -> Bools:
    """Exact p of "the drop is at least the margin" at most alpha."""
    return seen.lost <= acceptance(seen.n, seen.margin, seen.alpha)[seen.flips]


def ours_fails(seen: Seen) -> Bools:
    """Exact p of "the drop is at most the margin" at most alpha: FAIL."""
    return seen.lost > rejection(seen.n, seen.margin, seen.alpha)[seen.flips]


def score_test(seen: Seen) -> Bools:
    """Tango's Z against the normal quantile, without the exact p."""
    return score(seen.lost, seen.gained, seen.n, seen.margin) >= NormalDist().inv_cdf(1 - seen.alpha)


def wald(seen: Seen) -> Bools:
    """Upper end of the two-sided t interval of the paired drop within the margin, as `nel gate` has it."""
    drop = (seen.lost - seen.gained) / seen.n
    variance = np.maximum(seen.flips / seen.n - drop**2, 0) * seen.n / (seen.n - 1)
    return drop + student(1 - seen.alpha / 2, seen.n - 1) * np.sqrt(variance / seen.n) <= seen.margin


def student(p: float, freedom: int) -> float:
    """Return Student's quantile by its series in 1 / freedom; right to 1e-5 from 29 on."""
    z, v = NormalDist().inv_cdf(p), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def absolute(seen: Seen) -> Bools:
    """Accuracy no more than 0.08 below a constant: vLLM's GSM8K test."""
    return seen.candidate / seen.n >= seen.accuracy - 0.08


def relative(seen: Seen) -> Bools:
    """Accuracy at least 0.92 of a constant: vLLM's lm-eval configs."""
    return seen.candidate / seen.n >= seen.accuracy * (1 - 0.08)


def recovery(seen: Seen) -> Bools:
    """Accuracy over that of the baseline in the same run, rounded to 2 decimals, at least 0.95: llm-compressor."""
    return np.round(seen.candidate / np.maximum(seen.base, 1), 2) >= 0.95


def two_errors(seen: Seen) -> Bools:
    """Accuracies no more than two standard errors of their difference apart, as if of different items."""
    one, other = seen.base / seen.n, seen.candidate / seen.n
    return one - other <= 2 * np.sqrt((one * (1 - one) + other * (1 - other)) / seen.n)


def flagged(seen: Seen) -> Bools:
    """McNemar's exact one-sided p at most alpha: a flag, of damage."""
    codes, place = np.unique(seen.lost * (seen.n + 1) + seen.gained, return_inverse=True)
    pairs = (divmod(int(code), seen.n + 1) for code in codes)
    return np.array([p_worse(lost, gained) <= seen.alpha for lost, gained in pairs])[place]


def mcnemar(seen: Seen) -> Bools:
    """Nothing significant, so it passes."""
    return ~flagged(seen)


RULES: dict[str, Callable[[Seen], Bools]] = {
    "k2quant": ours,
    "score test": score_test,
    "Wald/t (nel gate)": wald,
    "McNemar p > alpha": mcnemar,
    "unpaired 2 SE": two_errors,
    "llm-compressor 0.95": recovery,
    "vLLM rtol .08": relative,
    "vLLM absolute .08": absolute,
}
"""By the name in the tables."""


def ceiling(rate: float, count: int) -> float:
    """Return a rate and two standard errors of what so many resamples show of it."""
    return rate + 2 * math.sqrt(rate * (1 - rate) / count)
