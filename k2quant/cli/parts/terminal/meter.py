"""How far a job is: what is done of how much, how fast, and how long the rest will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from k2quant.ground.units import duration, size

_SAMPLES = 30
_APART = 2.0
"""Seconds between samples: a rate is that of the last minute, or of the last thirty steps of longer ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What is counted, in words."""

    amount: Callable[[int, int], str]
    """What is done of how much."""
    rate: Callable[[float], str] | None = None
    """How much a second, where that says something."""


BYTES = Measure(amount=lambda done, total: f"{size(done)} of {size(total)}", rate=lambda rate: f"{size(rate)}/s")
THINGS = Measure(amount=lambda done, total: f"{done:,} of {total:,}")
ANSWERS = Measure(amount=THINGS.amount, rate=lambda rate: f"{rate:.3g} a second")
STEPS = Measure(
    amount=lambda done, total: f"{done:,} of {total:,} steps",
    rate=lambda rate: f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s a step",
)


class Meter:
    """Is told how far a job is, from any thread. Rate and time left count from what it is told first."""

    def __init__(self, what: str, measure: Measure, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin.

        Args:
            what: the job.
            measure: what is counted.
            clock: seconds.
        """
        self.share: float | None = None
        """What is done of the whole; None before anything is told."""
        self._measure, self._clock = measure, clock
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self._told: tuple[float, int, int, str] | None = None
        self.begin(what)

    def begin(self, what: str) -> None:
        """Begin another part of the job, of which nothing is told yet.

        Args:
            what: the part.
        """
        from k2quant.errors import printable

        self.what, self.begun = printable(what), self._clock()
        self._told = self.share = None
        self._samples.clear()

    def tell(self, done: int, total: int, note: str = "") -> None:
        """Note how far the job is.

        Args:
            done: what is done.
            total: of how much.
            note: what else is worth a word.
        """
        now = self._clock()
        if self._told is not None and done < self._samples[0][1]:
            self._samples.clear()  # another count began
        self._told = now, done, total, note
        self.share = min(max(done / total, 0.0), 1.0) if total > 0 else None
        if not self._samples or now - self._samples[-1][0] >= _APART:
            self._samples.append((now, done))

    def facts(self) -> list[str]:
        """Return what is known, in words: share, amount, rate, what else is worth a word, time left."""
        if self._told is None or self.share is None:
            return [f"{duration(self._clock() - self.begun)} so far"]
        _, done, total, note = self._told
        rate = self._rate()
        facts = [f"{self.share:.0%}", self._measure.amount(min(done, total), total)]
        facts += [self._measure.rate(rate)] if rate and self._measure.rate else []
        facts += [note] if note else []
        facts += [f"{_coarse((total - done) / rate)} left"] if rate and done < total else []
        return facts

    def _rate(self) -> float:
        """Return how much is done a second; 0 while that is not known."""
        if self._told is None or not self._samples:
            return 0.0
        (since, before), (now, done, *_) = self._samples[0], self._told
        return (done - before) / (now - since) if now > since and done > before else 0.0


def _coarse(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(seconds)
