"""A group whose commands have files of their own, loaded when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """Knows the names of its commands; the file of one has its `command`."""

    def __init__(self, *, home: str, names: tuple[str, ...], **settings: Any) -> None:
        """Remember where commands are.

        Args:
            home: what stands before a command's name in its module's: `k2quant.cli.eval_` for `k2quant eval run`.
            names: of the commands, in the order of the help.
            settings: those of `click.Group`.
        """
        super().__init__(**settings)
        self._home, self._names = home, names

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the names."""
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """Load a command."""
        if cmd_name not in self._names:
            return None
        command: click.Command = import_module(f"{self._home}{cmd_name}").command
        return command
