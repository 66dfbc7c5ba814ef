"""Progress for whoever calls Python and says `progress=True`: a bar in a notebook, a line on stderr elsewhere."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from k2quant.errors import UsageError
from k2quant.ground.units import duration, size

Progress = Callable[[int, int], None]
"""Called with what is done, and of how much."""

Asked = Progress | bool | None
"""A function, or True for a bar; None and False for nothing."""

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_FRAME = 0.1  # seconds between two drawings
_FIRST, _LEAST, _MOST, _STEP = 10.0, 5.0, 30.0, 0.05
"""Seconds before the first plain line; between two at least and at most; the share that must be done in between."""


@contextlib.contextmanager
def showing(asked: Asked, what: str, unit: str = "") -> Iterator[Progress | None]:
    """Give what is to be called as the work goes on, if anything; what a bar left behind goes when the block ends.

    Args:
        asked: what the caller said.
        what: the work, in a few words.
        unit: what is counted, such as `passes`; bytes where nothing is said.

    Raises:
        UsageError: neither a function nor true or false.
    """
    if asked is None or asked is False:
        yield None
        return
    if asked is not True:
        if not callable(asked):
            raise UsageError(
                f"progress is {asked!r:.100}; expected True, or a function of what is done and of how much"
            )
        yield asked
        return
    show = _Notebook() if _in_notebook() else _Terminal() if sys.stderr.isatty() else _Log()
    meter = _Meter(what, unit)
    try:
        yield lambda done, total: show.tell(meter, done, total)
    finally:
        show.end()


def told(asked: Asked) -> Progress | None:
    """Return what `barred` gave a function: the one to call, or None."""
    return asked if callable(asked) else None


def barred(what: str, unit: str = "") -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """Have a function's keyword `progress` take whatever `showing` takes; the function is given a function or None.

    Args:
        what: the work, in a word; the name of the first argument stands behind it, where that is a path.
        unit: what is counted; bytes where nothing is said.
    """

    def wrap(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        @functools.wraps(function)
        def call(*given: _Given.args, **named: _Given.kwargs) -> _Result:
            if "progress" not in named:
                return function(*given, **named)
            of = f" {Path(given[0]).name}" if given and isinstance(given[0], str | os.PathLike) else ""
            asked: Any = named["progress"]
            with showing(asked, what + of, unit) as told:
                named["progress"] = told
                return function(*given, **named)

        return call

    return wrap


class _Meter:
    """Puts into words how far the work is."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._begun: tuple[float, int] | None = None

    def line(self, done: int, total: int) -> str:
        """Return the work, what is done of how much, the rate and the time left."""
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now, done  # what an earlier run had done does not count into the rate
        seconds, more = now - self._begun[0], done - self._begun[1]
        facts = [f"{self._what}: {done / total:.0%}" if total else self._what, f"{self._amount(done, total)}"]
        if seconds > 1 and more > 0:
            rate = more / seconds
            facts.append(self._speed(rate))
            facts.append(f"{duration((total - done) / rate)} left")
        return ", ".join(facts)

    def _speed(self, rate: float) -> str:
        if not self._unit:
            return f"{size(rate)}/s"
        return f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{duration(1 / rate)} each"

    def _amount(self, done: int, total: int) -> str:
        return f"{done:,} of {total:,} {self._unit}" if self._unit else f"{size(done)} of {size(total)}"


class _Log:
    """A line now and then, where nobody may be looking; short work is silent."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self._share = 0.0

    def tell(self, meter: _Meter, done: int, total: int) -> None:
        now, share = time.perf_counter(), done / total if total else 0.0
        line = meter.line(done, total)
        waited = now - self._last
        if now - self._begun >= _FIRST and waited >= _LEAST and (waited >= _MOST or share - self._share >= _STEP):
            self._last, self._share = now, share
            _write(f"k2quant: {line}\n")

    def end(self) -> None:
        """Leave what was said."""


class _Terminal:
    """One line that is drawn again and again, and erased at the end."""

    def __init__(self) -> None:
        self._last = 0.0

    def tell(self, meter: _Meter, done: int, total: int) -> None:
        line, now = meter.line(done, total), time.perf_counter()
        if now - self._last >= _FRAME:
            self._last = now
            _write(f"\r\x1b[K{line}")

    def end(self) -> None:
        _write("\r\x1b[K")


class _Notebook:
    """A bar of HTML below the cell; no widgets are needed."""

    def __init__(self) -> None:
        ipython = import_module("IPython.display")  # no dependency: it is there where a notebook is
        self._html, self._display = ipython.HTML, ipython.display
        self._last = 0.0
        self._handle: Any = None

    def tell(self, meter: _Meter, done: int, total: int) -> None:
        from html import escape

        line, now = meter.line(done, total), time.perf_counter()
        if now - self._last < _FRAME and done < total:
            return
        self._last = now
        bar = self._html(f'<progress value="{done}" max="{max(total, 1)}"></progress> {escape(line)}')
        if self._handle is None:
            self._handle = self._display(bar, display_id=True)
        else:
            self._handle.update(bar)

    def end(self) -> None:
        """Leave the bar as it is: it says how far the work came."""


def _in_notebook() -> bool:
    """Tell whether a kernel of Jupyter runs this: then IPython is loaded, and its shell is none of a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stderr that has gone is no reason to fail
        sys.stderr.write(text)
        sys.stderr.flush()
