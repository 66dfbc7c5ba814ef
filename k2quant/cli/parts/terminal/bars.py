"""Progress on stderr: one line that is drawn again and again on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from k2quant.cli.parts.terminal.meter import Meter
from k2quant.cli.parts.terminal.streams import say
from k2quant.cli.parts.terminal.tables import cells_of, shortened, terminal_width

_FRAME = 0.1  # seconds between two drawings
_LOOK = 1.0  # seconds between two looks at whether a plain line is due

FIRST = 10.0
"""Seconds after which a job that is no terminal's says anything: a short one is silent."""
LEAST, MOST, STEP = 5.0, 30.0, 0.05
"""A plain line comes after so many seconds at least and at most; in between, once so much more is done."""

_ERASE = "\r\x1b[K"
_LONGEST_BAR = 40


@contextlib.contextmanager
def shown(meter: Meter) -> Iterator[None]:
    """Show a meter while the block runs; nothing of a terminal's line is left when it ends, however it ends."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _drawn(meter):
            yield
    else:
        with _told(meter):
            yield


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


@contextlib.contextmanager
def _told(meter: Meter) -> Iterator[None]:
    cadence = Cadence(time.perf_counter())

    def look() -> None:
        if cadence.due(time.perf_counter(), meter.share or 0.0):
            say(plain(meter))

    with _repeated(look, _LOOK):
        yield


def plain(meter: Meter) -> str:
    """Return the line of a log: `k2quant: K2 to int4: 35% (210.1 GB of 594.2 GB), 1.1 GB/s, 5 min 49 s left`."""
    share, *rest = meter.facts()
    if not rest:
        return f"k2quant: {meter.what}: {share}"
    amount, *more = rest
    return ", ".join([f"k2quant: {meter.what}: {share} ({amount})", *more])


@contextlib.contextmanager
def _drawn(meter: Meter) -> Iterator[None]:
    line = _Line(sys.stderr)
    before = sys.stdout, sys.stderr
    sys.stderr = _Above(line, before[1])
    if before[0].isatty():
        sys.stdout = _Above(line, before[0])
    try:
        with _repeated(lambda: line.draw(meter), _FRAME):
            yield
    finally:
        line.erase()
        sys.stdout, sys.stderr = before


class _Line:
    """The last line of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lock = threading.RLock()
        self.free = True
        """Whether nobody else's text stands in it."""
        self._fill = "━" if (stream.encoding or "").lower().startswith("utf") else "="

    def draw(self, meter: Meter) -> None:
        with self.lock:
            if self.free:
                room = (terminal_width(self._stream) or 80) - 1  # a full line would wrap on some terminals
                self._write(_ERASE + bar(meter, room, self._fill))

    def erase(self) -> None:
        with self.lock:
            if self.free:
                self._write(_ERASE)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has gone is no reason to fail
            self._stream.write(text)
            self._stream.flush()


class _Above:
    """A stream whose text goes where the bar is; the bar comes back below it."""

    def __init__(self, line: _Line, stream: TextIO) -> None:
        self._line, self._stream = line, stream

    def write(self, text: str) -> int:
        with self._line.lock:
            if text:
                self._line.erase()
                self._line.free = text.endswith("\n")
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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


@contextlib.contextmanager
def _repeated(do: Any, every: float) -> Iterator[None]:
    """Do something again and again, in a thread, while the block runs."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(every):
            do()

    thread = threading.Thread(target=again, daemon=True, name="k2quant progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
