"""How much a command says on stderr: `-q` and `-v`, which every command has."""

from __future__ import annotations

import time
from typing import Literal

import click

from k2quant.cli.parts.terminal.streams import say
from k2quant.ground.units import duration, size

Volume = Literal["quiet", "normal", "verbose"]

_KEY = "k2quant.volume"
_LISTENER = "k2quant.listener"  # what shows the log, where one does


def volume() -> Volume:
    """Return how much the command that runs shall say."""
    ctx = click.get_current_context(silent=True)
    chosen: Volume = ctx.meta.get(_KEY, "normal") if ctx else "normal"
    return chosen


def volume_options() -> list[click.Option]:
    """Return the two options; of several the last counts."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_quiet,
            help="No progress and no notes on stderr: only errors, and warnings about what was read.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_verbose,
            help="Say on stderr what is being done, and when.",
        ),
    ]


def _quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's signature
    if value:
        ctx.meta[_KEY] = "quiet"
        if _LISTENER in ctx.meta:  # `k2quant -v convert -q`
            ctx.meta[_LISTENER].setLevel("WARNING")


def _verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's signature
    if value:
        ctx.meta[_KEY] = "verbose"
        if _LISTENER not in ctx.meta:
            _listen(ctx)
        ctx.meta[_LISTENER].setLevel("INFO")


def _listen(ctx: click.Context) -> None:
    """Show what the package logs, with the time of day, until the command line ends."""
    import logging

    logger = logging.getLogger("k2quant")
    begun, handler, before = time.perf_counter(), logging.StreamHandler(_Said()), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel("INFO")
    ctx.meta[_LISTENER] = handler

    def end() -> None:
        logger.info("ended after %s, at most %s in memory", duration(time.perf_counter() - begun), size(_peak_memory()))
        logger.removeHandler(handler)
        logger.setLevel(before)

    ctx.find_root().call_on_close(end)


def _peak_memory() -> int:
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in kB


class _Said:
    """What a log is written to."""

    @staticmethod
    def write(text: str) -> None:
        """Print a line."""
        from k2quant.errors import printable

        if line := text.rstrip("\n"):
            say(printable(line))
