"""A group whose commands have files of their own, loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """Knows the names of its commands; the file of one has its `command`."""

    def __init__(self, *, homes: Mapping[str, str], **settings: Any) -> None:
        """Remember where commands are.

        Args:
            homes: the module of each command, by its name, in the order of the help.
            settings: those of `click.Group`.
        """
        super().__init__(**settings)
        self._homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the names."""
        return list(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """Load a command."""
        if cmd_name not in self._homes:
            return None
        command: click.Command = import_module(self._homes[cmd_name]).command
        return command
