"""Colour: of the words that decide, where a terminal shows it and nobody asked for none."""

from __future__ import annotations

from collections.abc import Mapping

import click

_COLOURS = {
    "green": ("PASS", "passed", "yes", "ok"),
    "red": ("FAIL", "FAILED", "failed", "NO", "TOO SMALL", "TOO LITTLE"),
    "yellow": ("INCONCLUSIVE",),
}
_OF = {word: colour for colour, words in _COLOURS.items() for word in words}


def wanted(environment: Mapping[str, str]) -> bool | None:
    """Return whether colour is wanted whatever stdout is; None: where it is a terminal.

    What is returned belongs into `click.Context.color`; `click.echo` then takes the colours out of all that is printed
    where they are not wanted.

    Args:
        environment: NO_COLOR (https://no-color.org) and `TERM=dumb` want none, FORCE_COLOR and CLICOLOR_FORCE some.
    """
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return False
    if any(environment.get(name, "0") not in {"", "0"} for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return None


def verdict(word: str) -> str:
    """Return a verdict in its colour: good green, bad red, neither yellow. Other words stay as they are."""
    colour = _OF.get(word.strip())
    return click.style(word, fg=colour, bold=True) if colour else word
