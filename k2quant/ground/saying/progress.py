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
from k2quant.ground.saying.meter import BYTES, ERASE, Cadence, Measure, Meter, fitted, plain, sentence
from k2quant.ground.saying.width import can_draw

Progress = Callable[[int, int], None]
"""Called with what is done, and of how much."""

Asked = Progress | bool | None
"""A function, or True for a bar; None and False for nothing."""

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_FRAME = 0.1  # seconds between two drawings


@contextlib.contextmanager
def showing(asked: Asked, what: str, measure: Measure = BYTES) -> Iterator[Progress | None]:
    """Give what is to be called as the work goes on, if anything; what a bar left behind goes when the block ends.

    Args:
        asked: what the caller said.
        what: the work, in a few words.
        measure: what is counted.

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
    show = _Notebook() if _in_notebook() else _Terminal() if can_draw(sys.stderr) else _Log()
    meter = Meter(what, measure)

    def tell(done: int, total: int) -> None:
        meter.tell(done, total)
        show.tell(meter, done, total)

    try:
        yield tell
    finally:
        show.end()


def told(asked: Asked) -> Progress | None:
    """Return what `barred` gave a function: the one to call, or None."""
    return asked if callable(asked) else None


def barred(what: str, measure: Measure = BYTES) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """Have a function's keyword `progress` take whatever `showing` takes; the function is given a function or None.

    Args:
        what: the work, in a word; the name of the first argument stands behind it, where that is a path.
        measure: what is counted.
    """

    def wrap(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        @functools.wraps(function)
        def call(*given: _Given.args, **named: _Given.kwargs) -> _Result:
            if "progress" not in named:
                return function(*given, **named)
            of = f" {Path(given[0]).name}" if given and isinstance(given[0], str | os.PathLike) else ""
            asked: Any = named["progress"]
            with showing(asked, what + of, measure) as told:
                named["progress"] = told
                return function(*given, **named)

        return call

    return wrap


class _Log:
    """A line now and then, where nobody may be looking; short work is silent."""

    def __init__(self) -> None:
        self._cadence = Cadence(time.perf_counter())

    def tell(self, meter: Meter, _done: int, _total: int) -> None:
        if self._cadence.due(time.perf_counter(), meter.share or 0.0):
            _write(f"{plain(meter)}\n")

    def end(self) -> None:
        """Leave what was said."""


class _Terminal:
    """One line that is drawn again and again, and erased at the end."""

    def __init__(self) -> None:
        self._last = 0.0

    def tell(self, meter: Meter, _done: int, _total: int) -> None:
        now = time.perf_counter()
        if now - self._last >= _FRAME:
            self._last = now
            _write(ERASE + fitted(meter, sys.stderr))

    def end(self) -> None:
        _write(ERASE)


class _Notebook:
    """A bar of HTML below the cell; no widgets are needed."""

    def __init__(self) -> None:
        ipython = import_module("IPython.display")  # no dependency: it is there where a notebook is
        self._html, self._display = ipython.HTML, ipython.display
        self._last = 0.0
        self._handle: Any = None

    def tell(self, meter: Meter, done: int, total: int) -> None:
        from html import escape

        now = time.perf_counter()
        if now - self._last < _FRAME and done < total:
            return
        self._last = now
        bar = self._html(f'<progress value="{done}" max="{max(total, 1)}"></progress> {escape(sentence(meter))}')
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
    with contextlib.suppress(AttributeError, OSError, ValueError):  # one that is gone, or None, is no reason to fail
        sys.stderr.write(text)
        sys.stderr.flush()
