"""A terminal for tests: what a command writes to one, and what then stands on its screen."""

from __future__ import annotations

import errno
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fcntl import ioctl

_PIECES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|.", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a command left on a terminal."""

    code: int
    """Its exit code."""
    written: str
    """All that it wrote, codes included."""
    columns: int

    @property
    def screen(self) -> list[str]:
        """Return the lines that stand there at the end."""
        return screen(self.written, self.columns)


def on_terminal(
    command: Sequence[str], *, columns: int, more: Mapping[str, str] | None = None, stdout: int | None = None
) -> Seen:
    """Run Python with these arguments on a terminal, stdout and stderr both.

    Args:
        command: what comes behind `python`.
        columns: of the terminal.
        more: variables of the environment besides.
        stdout: a descriptor that stdout goes to instead.
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env=kept | {"TERM": "xterm-256color"} | dict(more or {}),
    )
    os.close(theirs)
    parts = []
    while part := _read(ours):
        parts.append(part)
    os.close(ours)
    return Seen(code=process.wait(), written=b"".join(parts).decode(), columns=columns)


def but_progress(stderr: str) -> str:
    """Return what a command said in a pipe, without the lines of how far it is that a slow machine sees."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"k2quant: [^:]+: (\d+% \(|.* so far$)", line))


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # Linux says so when the other side is closed
            return b""
        raise


def screen(written: str, columns: int) -> list[str]:
    """Return the lines of a terminal after something was written, spaces at their ends left out."""
    lines, row, column = [[""]], 0, 0
    for piece in _PIECES.findall(written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [[""]] * (row == len(lines))
            column = 0
        elif piece == "\x1b[K":
            del lines[row][column:]
        elif not piece.startswith("\x1b"):
            if column == columns:
                row, column = row + 1, 0
                lines += [[]] * (row == len(lines))
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = piece
            column += 1
    shown = ["".join(line).rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown
