"""Arguments of Python, in what errors and remarks say, as the flags of the command that runs.

Below the command line a message calls an argument `` `restart=True` ``, or `` `scope=` `` where any value is meant: a
name, an equals sign, perhaps a value, in backticks. Here each such mark becomes the flag that click has for it. So no
message says a thing twice, and no flag is written down but where the command declares it.
"""

from __future__ import annotations

import re

import click

_MARK = re.compile(r"`([a-z][a-z0-9_]*)=([^`\s]*)`")
_KEY = "k2quant.command"


def noted(ctx: click.Context, command: click.Command) -> click.Command:
    """Remember a command that was found, and return it; the last of a call is the one that runs."""
    ctx.meta[_KEY] = command
    return command


def in_flags(text: str) -> str:
    """Return a message as the command line says it: `restart=True` is --restart.

    What the command that runs has no flag for stays as it is.
    """
    ctx = click.get_current_context(silent=True)
    command = ctx.meta.get(_KEY) if ctx is not None else None
    flags = _flags_of(command) if isinstance(command, click.Command) else {}

    def shown(mark: re.Match[str]) -> str:
        name, value = mark.groups()
        flag = flags.get(name)
        if flag is None:
            return mark[0]
        return f"{flag} {value}" if value and value != "True" else flag

    return _MARK.sub(shown, text)


def _flags_of(command: click.Command) -> dict[str, str]:
    """Return the flags of a command by the names of what they set."""
    options = (param for param in command.params if isinstance(param, click.Option))
    return {option.name: max(option.opts, key=len) for option in options if option.name}
