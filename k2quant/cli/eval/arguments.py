"""Pairs of a name and something as they are typed: `tensor_parallel_size=8,gpu_memory_utilization=0.9`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from k2quant.cli.parts.options import Option

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def model_args(texts: tuple[str, ...]) -> dict[str, Any]:
    """Return an engine's arguments with their values: numbers, true, false, none, JSON, or else text.

    Args:
        texts: pairs with commas between them. A comma within brackets or double quotes is a part of its value.

    Raises:
        click.UsageError: something is no pair, or named twice; values are not repeated, for one may be a secret.
    """
    found: dict[str, Any] = {}
    for part in (part for text in texts for part in _parts(text)):
        name, equals, value = part.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name.isidentifier():
            raise click.UsageError("--model-args: expected NAME=VALUE,NAME=VALUE such as tensor_parallel_size=8")
        if name in found:
            raise click.UsageError(f"--model-args: {name} stands twice")
        found[name] = _value(name, value.strip())
    return found


def model_args_option(about: str) -> Option[Any]:
    """What an engine takes besides, as `model_args` reads it.

    Args:
        about: what the command has to say of it.
    """
    return click.option("--model-args", multiple=True, metavar="NAME=VALUE,...", help=about)


def header_option() -> Option[Any]:
    """Headers for a server, as `headers` reads them."""
    return click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="NAME=VARIABLE",
        help="Header for a server, with its value in that variable of the environment; repeatable.",
    )


def headers(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return for each header the variable of the environment with its value.

    Raises:
        click.UsageError: something is no pair; it is not repeated, for it may hold the value itself.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, variable = pair.partition("=")
        if not equals or ":" in name:
            raise click.UsageError("--header: expected NAME=VARIABLE, a variable of the environment with its value")
        if name.lower() in map(str.lower, found):
            raise click.UsageError(f"--header: {name} stands twice")
        found[name] = variable
    return found


def _parts(text: str) -> Iterator[str]:
    """Yield what stands between commas; those within brackets and double quotes are none."""
    begin = depth = 0
    quoted = escaped = False
    for place, letter in enumerate(text):
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            yield text[begin:place]
            begin = place + 1
    yield text[begin:]


def _value(name: str, text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        if text[:1] in {"[", "{", '"'}:
            raise click.UsageError(f"--model-args: {name} is no JSON") from error
        return text


def _refused(literal: str) -> Any:
    raise ValueError(literal)
