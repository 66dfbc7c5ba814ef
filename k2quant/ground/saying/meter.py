"""How far a job is: what is done of how much, how fast, how long the rest will take; and the line that says so."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from k2quant.ground.saying.width import cells_of, shortened, terminal_width
from k2quant.ground.units import duration, size

_SAMPLES = 30
_APART = 2.0
"""Seconds between samples: a rate is that of the last minute, or of the last thirty steps of longer ones."""

FIRST = 10.0
"""Seconds after which a job that is no terminal's says anything: a short one is silent."""
LEAST, MOST, STEP = 5.0, 30.0, 0.05
"""A plain line comes after so many seconds at least and at most; in between, once so much more is done."""

ERASE = "\r\x1b[K"
"""Empties the line of a terminal that a bar stands in."""

_LONGEST_BAR = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What is counted, in words."""

    amount: Callable[[int, int], str]
    """What is done of how much."""
    rate: Callable[[float], str] | None = None
    """How much a second, where that says something."""


def each(one: str, many: str) -> Measure:
    """Return the measure of what takes its time one by one: `50 of 100 steps`, `1.5 steps/s`, `40.0 s a step`."""
    return Measure(
        amount=lambda done, total: f"{done:,} of {total:,} {many}",
        rate=lambda rate: f"{rate:.1f} {many}/s" if rate >= 1 else f"{duration(1 / rate)} a {one}",
    )


BYTES = Measure(amount=lambda done, total: f"{size(done)} of {size(total)}", rate=lambda rate: f"{size(rate)}/s")
THINGS = Measure(amount=lambda done, total: f"{done:,} of {total:,}")
ANSWERS = Measure(amount=THINGS.amount, rate=lambda rate: f"{rate:.3g} a second")
STEPS = each("step", "steps")
TOKENS = Measure(amount=lambda done, total: f"{done:,} of {total:,} tokens", rate=lambda rate: f"{rate:,.0f} a second")
"""Through a layer: a token counts once for each."""


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


class Cadence:
    """Says when a plain line is due."""

    def __init__(self, now: float) -> None:
        """Begin.

        Args:
            now: the time in seconds.
        """
        self._begun = self._last = now
        self._share = 0.0

    def due(self, now: float, share: float) -> bool:
        """Return whether a line is due, and count on from it if so.

        Args:
            now: the time in seconds.
            share: what is done of the whole.
        """
        waited = now - self._last
        if now - self._begun < FIRST or waited < LEAST or (waited < MOST and share - self._share < STEP):
            return False
        self._last, self._share = now, share
        return True


def plain(meter: Meter) -> str:
    """Return the line of a log: `k2quant: K2 to int4: 35% (210.1 GB of 594.2 GB), 1.1 GB/s, 5 min 49 s left`."""
    return f"k2quant: {sentence(meter)}"


def sentence(meter: Meter) -> str:
    """Return a meter in words: `K2 to int4: 35% (210.1 GB of 594.2 GB), 1.1 GB/s, 5 min 49 s left`."""
    share, *rest = meter.facts()
    if not rest:
        return f"{meter.what}: {share}"
    amount, *more = rest
    return ", ".join([f"{meter.what}: {share} ({amount})", *more])


def fitted(meter: Meter, stream: TextIO) -> str:
    """Return a meter as a bar that fits the terminal, of signs that it has."""
    room = (terminal_width(stream) or 80) - 1  # a full line would wrap on some terminals
    return bar(meter, room, "━" if (getattr(stream, "encoding", None) or "").lower().startswith("utf") else "=")


def bar(meter: Meter, room: int, fill: str = "━") -> str:
    """Return a meter as one line of at most `room` columns; what matters least goes first where that is little.

    Args:
        meter: what to show.
        room: columns.
        fill: what a bar is made of.
    """
    share, *more = meter.facts()
    facts = [f"{share:>4}", *more]
    what = shortened(meter.what, max(room // 3, 8))
    while len(facts) > 1 and cells_of("  ".join([what, *facts])) > room:
        del facts[1 if len(facts) > 2 else -1]  # the amount, the rate, then the time left; never the share
    line = "  ".join([what, *facts])
    long = min(room - cells_of(line) - 2, _LONGEST_BAR)
    if meter.share is not None and long >= 8:
        done = round(meter.share * long)
        drawn = fill * done + ("─" if fill == "━" else "-") * (long - done)
        line = "  ".join([what, drawn, *facts])
    return shortened(line, room)
