"""A group whose commands have files of their own, loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from k2quant.cli.parts.volume import volume_options


class LazyGroup(click.Group):
    """Knows the names of its commands and a line on each; the file of one has its `command`."""

    def __init__(self, *, homes: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        """Remember where commands are.

        Args:
            homes: the module of each command, and what it does in a line of at most 64 characters, by its name, in
                the order of the help.
            settings: those of `click.Group`.
        """
        super().__init__(**settings)
        self._homes = homes
        self.params += volume_options()

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the names."""
        return list(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """Load a command; like the group it gets `-q` and `-v`."""
        if cmd_name not in self._homes:
            return None
        command: click.Command = import_module(self._homes[cmd_name][0]).command
        if not any(param.name == "quiet" for param in command.params):
            command.params += volume_options()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        """List the commands with their lines; none is loaded for that."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._homes.items()])
