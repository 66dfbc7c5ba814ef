"""A group whose commands have files of their own, loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from k2quant.cli.parts.flags import noted
from k2quant.cli.parts.terminal.volume import volume_options


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

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command; like the group it gets `-q` and `-v`."""
        if cmd_name not in self._homes:
            return None
        command: click.Command = import_module(self._homes[cmd_name][0]).command
        if not any(param.name == "quiet" for param in command.params):
            command.params += volume_options()
        return noted(ctx, command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        """List the commands with their lines; none is loaded for that."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._homes.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with; one that is not there is answered with those like it."""
        name = args[0]
        if name not in self._homes and not name.startswith("-") and not ctx.resilient_parsing:
            near = _like(name, self._spelled(ctx))
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {near}?" if near else ""))
        return super().resolve_command(ctx, args)

    def _spelled(self, ctx: click.Context) -> dict[str, str]:
        """Return what may be typed for each command, and what it is called: those of the groups below by both names."""
        found = {name: name for name in self._homes}
        for group in self._homes:
            command = self.get_command(ctx, group)
            if isinstance(command, LazyGroup):
                for name in command.list_commands(ctx):
                    found[f"{group} {name}"] = found[f"{group}-{name}"] = f"{group} {name}"
                    found.setdefault(name, f"{group} {name}")
        return found


def _like(name: str, spelled: Mapping[str, str]) -> str:
    """Return the likeliest commands, the first first, as they are called."""
    from difflib import get_close_matches

    close = [name.lower()] if name.lower() in spelled else get_close_matches(name.lower(), spelled, n=2)
    return " or ".join(f"`{command}`" for command in dict.fromkeys(spelled[each] for each in close))
