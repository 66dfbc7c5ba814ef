"""The flags of a command, mostly of the one that runs, in place of what errors and remarks call arguments of Python.

They are what click knows of the command: no flag is written down but where it is declared.
"""

from __future__ import annotations

import click

from k2quant.ground.saying import arguments

_KEY = "k2quant.command"


def noted(ctx: click.Context, command: click.Command) -> click.Command:
    """Remember a command that was found, and return it; the last of a call is the one that runs."""
    ctx.meta[_KEY] = command
    return command


def running() -> click.Command | None:
    """Return the command that runs; None outside the command line, and before one was found."""
    ctx = click.get_current_context(silent=True)
    command: click.Command | None = ctx.meta.get(_KEY) if ctx is not None else None
    return command


def in_flags(text: str, command: click.Command | None = None) -> str:
    """Return a message as the command line says it, see `k2quant.ground.saying.arguments`.

    Args:
        text: the message.
        command: that it is about; None for the one that runs.
    """
    command = command or running()
    if command is None:
        return text
    options = (param for param in command.params if isinstance(param, click.Option))
    return arguments.in_flags(text, {option.name: max(option.opts, key=len) for option in options if option.name})
