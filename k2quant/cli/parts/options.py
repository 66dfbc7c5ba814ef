"""Options that several commands have, with the same names and the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
Option = Callable[[_Command], _Command]


def words(choices: Iterable[str]) -> click.Choice[str]:
    """Return the type of an option that takes one of some words, in whatever case it is typed."""
    return click.Choice(list(choices), case_sensitive=False)


def device() -> Option[Any]:
    """Where a model computes."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto to spread it.")


def dtype(default: str = "bfloat16", more: str = "") -> Option[Any]:
    """Of activations.

    Args:
        default: one of the three.
        more: what the command has to say of the choice.
    """
    return click.option(
        "--dtype",
        type=words(["bfloat16", "float16", "float32"]),
        default=default,
        show_default=True,
        help=f"Of activations and of what is not quantised{more}.",
    )


def trust_remote_code(whose: str = "the tokenizer's", more: str = "") -> Option[Any]:
    """Whether a checkpoint's own code may run.

    Args:
        whose: which tokenizer's, where a command has several checkpoints.
        more: what the command has to say besides.
    """
    return click.option(
        "--trust-remote-code", is_flag=True, help=f"Run {whose} own Python code; K2's is read without it.{more}"
    )


def follow_links() -> Option[Any]:
    """Whether links of a checkpoint may lead out of its folder."""
    return click.option(
        "--follow-links",
        is_flag=True,
        help="Read files outside the checkpoint's folder where its links lead there. For folders of your own: whoever "
        "made the links chooses which of your files are read, and copied along.",
    )


def soft_lock() -> Option[Any]:
    """What keeps two runs out of one folder where the file system cannot."""
    return click.option(
        "--soft-lock",
        is_flag=True,
        help="On a file system without locks: lock the folder by a file. A killed run leaves it there: on the same "
        "machine the next run removes it, on another you must.",
    )


def backend() -> Option[Any]:
    """How packed weights are multiplied."""
    return click.option(
        "--backend",
        type=words(["auto", "reference"]),
        default="auto",
        show_default=True,
        help="The fused kernels, or plain torch.",
    )
