"""The streams that a command speaks on: closed, cut off and full ones are no reason for a job to fail."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path
from typing import Literal, TextIO

import click

CUT_OFF = 141
"""Exit code of who writes into a pipe that nobody reads any more: 128 and the number of SIGPIPE, as shells have it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C it is nobody's error, and no library takes it for one of its own."""


def open_closed() -> None:
    """Let what was closed by `2>&-` and the like lead nowhere.

    Left as it is, the next file that is opened would get the number, and what a library has to say on stderr would
    stand in a shard.
    """
    for number in (0, 1, 2):  # ascending: a file that is opened gets the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = _nowhere("r")
    if sys.stdout is None:
        sys.stdout = _nowhere("w")
    if sys.stderr is None:
        sys.stderr = _nowhere("w")


def _nowhere(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode, encoding="utf-8")  # for as long as the process lives


def say(text: str) -> None:
    """Print a line on stderr; one that cannot be printed is lost, and the job goes on."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def cut_off() -> bool:
    """Return whether the reader of stdout or stderr has gone; what is still to be said then goes nowhere.

    So nothing is said of it when the interpreter ends and empties its buffers.
    """
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_cut_off(stream)]
    for stream in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _is_cut_off(stream: TextIO) -> bool:
    """Return whether a stream is a pipe that nobody reads."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    watch = select.poll()
    watch.register(number, select.POLLOUT)
    return any(events & select.POLLERR for _, events in watch.poll(0))
