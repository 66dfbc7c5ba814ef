"""Options of commands that run text through a model to measure it, and what of them is checked before torch loads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts.options import Option, check_early, words

if TYPE_CHECKING:
    from k2quant.cli.parts.places import Place

PLACES = ("data", "validation", "test")
"""Options that name data."""


def data_options(*, required: bool) -> Option[Any]:
    """Which text is read, in which rows, and what the pass may take.

    Args:
        required: whether the command does nothing without; else the text goes with a method.
    """
    options = (
        click.option(
            "--data",
            required=required,
            metavar="FILE|NAME",
            help="Rows of text or chats (.jsonl), plain text (.txt, .text, .md, .raw), a folder of such, or a dataset"
            + ("." if required else "; for gptq, with the options down to --trust-remote-code."),
        ),
        click.option(
            "--samples", type=click.IntRange(1), default=512, show_default=True, help="Rows to measure, at most."
        ),
        click.option("--length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of a row."),
        click.option(
            "--validation",
            metavar="FILE|NAME",
            help="What judges each matrix, in place of a tenth of the documents of --data.",
        ),
        click.option(
            "--test",
            metavar="FILE|NAME",
            help="What is kept for a final figure and not measured, in place of another tenth.",
        ),
        click.option("--split", default="train", show_default=True, help="Of --data, where that is a dataset."),
        click.option("--config-name", metavar="NAME", help="Configuration of datasets that have several."),
        click.option(
            "--reasoning",
            type=words(["split", "drop"]),
            default="split",
            show_default=True,
            help="Earlier turns of a chat whose reasoning the chat template drops: read once more as they were asked "
            "for, with it, or left without it.",
        ),
        click.option(
            "--memory",
            default="32GB",
            show_default=True,
            metavar="SIZE",
            help="What the pass may take; the rest is on disk.",
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def check_data(source: Place, given: dict[str, Any], *, tokenizer: bool) -> None:
    """Refuse what cannot be read before torch and transformers are loaded, which takes seconds.

    Args:
        source: the checkpoint.
        given: the command's options, by name.
        tokenizer: whether text will be read.

    Raises:
        UsageError: data is not there.
        CheckpointError: the checkpoint cannot be read, or has no tokenizer.
    """
    from k2quant.checkpoint.beside import check_tokenizer
    from k2quant.data.places import no_data
    from k2quant.errors import UsageError

    for name in PLACES:
        if given[name] is not None and (why := no_data(given[name])):
            raise UsageError(f"`{name}=`: {given[name]!r}: {why}")
    check_early(source, follow_links=given["follow_links"])
    if tokenizer and isinstance(source, Path):  # at an address it is fetched with all that is small
        check_tokenizer(source)


def said(names: Collection[str]) -> list[str]:
    """Return which options of the command that runs stand on its line, of those that are named."""
    ctx = click.get_current_context()
    line = click.core.ParameterSource.COMMANDLINE
    return [name for name in names if ctx.get_parameter_source(name) == line]
