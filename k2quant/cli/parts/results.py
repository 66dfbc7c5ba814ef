"""How commands give back what they found: as JSON in a file, as JSON on the screen, or as text."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from k2quant.cli.parts.screen import remark, warn


def suggest(*commands: tuple[object, ...]) -> None:
    """Say which commands come next, as they are typed, each on a line of its own.

    They are for whoever sits at a terminal, and no result: on stderr, and only where that is a terminal. A script or a
    log gets nothing, nor does who asked for quiet.
    """
    if not sys.stderr.isatty():
        return
    for place, command in enumerate(commands):
        remark(("      " if place else "next: ") + shlex.join(map(str, command)))


def give(
    found: Mapping[str, Any],
    show: Callable[[], None],
    *,
    as_json: bool,
    output: Path | None,
    note: str | None = None,
    attempt: str = "",
) -> None:
    """Write what was found to a file, where one is named, and print it.

    Args:
        found: as JSON holds it.
        show: prints it as text.
        as_json: whether JSON is printed instead.
        output: the file.
        note: what must be known of it, said once the file is written and before anything is printed.
        attempt: letters of this process, where another may write the same to the file.
    """
    from k2quant.checkpoint.files.paths import write_whole

    data = json.dumps(found, indent=1)
    try:
        if output is not None:
            write_whole(output, data.encode() + b"\n", attempt)
    finally:  # what took hours is not lost with a disk that is full
        if note is not None:
            warn(note)
        if as_json:
            click.echo(data)
        else:
            show()
