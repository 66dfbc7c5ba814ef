"""How commands show themselves: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click


def remark(text: str) -> None:
    """Say something that is no result, as one line that a terminal can show, whatever of a file stands in it."""
    from k2quant.errors import printable

    click.echo(printable(text), err=True)


@contextlib.contextmanager
def remarks() -> Iterator[None]:
    """Show what is warned of a checkpoint as a remark, without the line of code that says it."""
    from k2quant.errors import CheckpointWarning

    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, CheckpointWarning):
            remark(str(message))
        else:
            before(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar with rate and time left in bytes while the block runs; nothing when stderr is no terminal."""
    with _bar(what, "DownloadColumn", "TransferSpeedColumn", "TimeRemainingColumn") as update:
        yield None if update is None else lambda done, total: update(completed=done, total=total)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar with how many are done and the time left while the block runs; nothing when stderr is no terminal."""
    with _bar(what, "MofNCompleteColumn", "TimeRemainingColumn") as update:
        yield None if update is None else lambda done, total: update(completed=done, total=total)


@contextlib.contextmanager
def questions(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show answered questions, rate and time left while the block runs; nothing when stderr is no terminal."""
    with _bar(what, "MofNCompleteColumn", "TimeRemainingColumn") as update:
        if update is None:
            yield None
            return
        begun: list[tuple[float, int]] = []

        def show(done: int, total: int) -> None:
            now = time.perf_counter()
            if not begun:
                begun.append((now, done))
            seconds = now - begun[0][0]
            rate = (done - begun[0][1]) / seconds if seconds else 0.0
            update(completed=done, total=total, description=f"{what}, {rate:.1f} a second")

        yield show


@contextlib.contextmanager
def training(what: str) -> Iterator[Callable[[int, int, float], None] | None]:
    """Show steps, rate, loss and time left while the block runs; nothing when stderr is no terminal."""
    begun = time.perf_counter()
    with _bar(what, "MofNCompleteColumn", "TimeRemainingColumn") as update:
        if update is None:
            yield None
            return

        def show(done: int, total: int, loss: float) -> None:
            rate = done / (time.perf_counter() - begun)
            update(completed=done, total=total, description=f"{what}, {rate:.1f} steps/s, loss {loss:.3f}")

        yield show


@contextlib.contextmanager
def _bar(what: str, *columns: str) -> Iterator[Callable[..., None] | None]:
    """Show a bar with these columns of rich behind it; give what updates it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as parts
    from rich.console import Console

    behind = [getattr(parts, name)() for name in columns]
    shown = parts.Progress(
        parts.TextColumn("{task.description}"), parts.BarColumn(), *behind, console=Console(stderr=True), transient=True
    )
    with shown:
        yield partial(shown.update, shown.add_task(what, total=None))
