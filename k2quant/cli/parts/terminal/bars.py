"""Progress on stderr: one line that is drawn again and again on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from k2quant.cli.parts.terminal.streams import say
from k2quant.ground.saying.meter import ERASE, Cadence, Meter, fitted, plain
from k2quant.ground.saying.width import can_draw

_FRAME = 0.1  # seconds between two drawings
_LOOK = 1.0  # seconds between two looks at whether a plain line is due


@contextlib.contextmanager
def shown(meter: Meter) -> Iterator[None]:
    """Show a meter while the block runs; nothing of a terminal's line is left when it ends, however it ends."""
    if can_draw(sys.stderr):
        with _drawn(meter):
            yield
    else:
        with _told(meter):
            yield


@contextlib.contextmanager
def _told(meter: Meter) -> Iterator[None]:
    cadence = Cadence(time.perf_counter())

    def look() -> None:
        if cadence.due(time.perf_counter(), meter.share or 0.0):
            say(plain(meter))

    with _repeated(look, _LOOK):
        yield


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

    def draw(self, meter: Meter) -> None:
        with self.lock:
            if self.free:
                self._write(ERASE + fitted(meter, self._stream))

    def erase(self) -> None:
        with self.lock:
            if self.free:
                self._write(ERASE)

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
