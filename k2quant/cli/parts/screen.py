"""How commands show themselves: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from k2quant.cli.parts.flags import in_flags
from k2quant.cli.parts.terminal.streams import say
from k2quant.cli.parts.terminal.volume import volume

if TYPE_CHECKING:
    from k2quant.ground.saying.meter import Meter

Show = Callable[[int, int], None]
"""Is told what is done, and of how much."""

ShowStep = Callable[[int, int, float], None]
"""Is told the steps done, all steps and the last loss."""


def remark(text: str) -> None:
    """Say something that is no result, as one line that a terminal can show, whatever of a file stands in it."""
    if volume() != "quiet":
        warn(text)


def warn(text: str) -> None:
    """Say what a user must know of the data, even one who asked for quiet; a line like a remark."""
    from k2quant.errors import printable

    say(in_flags(printable(text)))


@contextlib.contextmanager
def remarks() -> Iterator[None]:
    """Show what is warned of a checkpoint as a remark, without the line of code that says it."""
    from k2quant.errors import CheckpointWarning

    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, CheckpointWarning):
            warn(str(message))
        else:
            before(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def progress(what: str) -> Iterator[Show | None]:
    """Show how far a job is in bytes, with rate and time left, while the block runs; nothing where quiet is asked for.

    On a terminal that is a bar which leaves nothing behind, elsewhere a line now and then.
    """
    with _shown(what, "BYTES") as meter:
        yield meter.tell if meter else None


@contextlib.contextmanager
def counting(what: str) -> Iterator[Show | None]:
    """Show how many are done and the time left while the block runs, as `progress` does."""
    with _shown(what, "THINGS") as meter:
        yield meter.tell if meter else None


@contextlib.contextmanager
def questions(what: str) -> Iterator[Show | None]:
    """Show answered questions, rate and time left while the block runs, as `progress` does."""
    with _shown(what, "ANSWERS") as meter:
        yield meter.tell if meter else None


@contextlib.contextmanager
def training(what: str) -> Iterator[ShowStep | None]:
    """Show steps, rate, loss and time left while the block runs, as `progress` does; the rate is that of the steps."""
    with staged_training(what) as (tell, _):
        yield tell


@contextlib.contextmanager
def staged_training(what: str) -> Iterator[tuple[ShowStep | None, Callable[[str], None]]]:
    """Show a training as `training` does, and before it by name what else takes its time: loading, reading.

    Gives what is told of steps, and what is told that another part begins, or a note, which stays.
    """
    with _staged(what, "STEPS") as (meter, stage):

        def show(done: int, total: int, loss: float) -> None:
            if meter:
                meter.tell(done, total, f"loss {loss:.3f}")

        yield (show if meter else None), stage


@contextlib.contextmanager
def staged_tokens(what: str) -> Iterator[tuple[Show | None, Callable[[str], None]]]:
    """Show tokens through layers, rate and time left, and before it what else takes its time, as a training is shown.

    Gives what is told of tokens, and what `staged_training` gives.
    """
    with _staged(what, "TOKENS") as (meter, stage):
        yield (meter.tell if meter else None), stage


@contextlib.contextmanager
def _staged(what: str, measure: str) -> Iterator[tuple[Meter | None, Callable[[str], None]]]:
    """Show a meter as `_shown` does; give it, and what is told that another part begins, or a note, which stays."""
    with _shown(what, measure) as meter:

        def stage(text: str) -> None:
            if text.startswith("note: "):
                remark(text)
            elif meter:
                meter.begin(text)

        yield meter, stage


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that a job of unknown length is at work while the block runs, as `progress` does."""
    with _shown(what, "THINGS"):
        yield


@contextlib.contextmanager
def _shown(what: str, measure: str) -> Iterator[Meter | None]:
    """Show a meter of one of the measures of `meter`; give it, or nothing where quiet is asked for."""
    if volume() == "quiet":
        yield None
        return
    from k2quant.cli.parts.terminal.bars import shown
    from k2quant.ground.saying import meter

    made = meter.Meter(what, getattr(meter, measure))
    with shown(made):
        yield made
