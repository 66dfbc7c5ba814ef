"""Options that several commands have, with the same names and the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.address import Address

_Command = TypeVar("_Command", bound=Callable[..., Any])
Option = Callable[[_Command], _Command]


def words(choices: Iterable[str]) -> click.Choice[str]:
    """Return the type of an option that takes one of some words, in whatever case it is typed."""
    return click.Choice(list(choices), case_sensitive=False)


def all_of(options: Iterable[Option[Any]]) -> Option[Any]:
    """Return several options as one, in their order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(tuple(options)):
            command = option(command)
        return command

    return add


def device(
    default: str = "cpu",
    more: str = "cpu, cuda, cuda:N, or auto to spread it.",
    *,
    others: tuple[str, ...] | None = ("cpu", "auto"),
) -> Option[Any]:
    """Where something is computed; what cannot be one is refused before torch is loaded.

    Args:
        default: what is meant where nothing is said.
        more: what the command has to say of the choice.
        others: what may be named beside `cuda` and `cuda:N`; None: what torch knows.
    """

    def check(ctx: click.Context, _: click.Parameter, value: str) -> str:
        name = value.lower()
        if not ctx.resilient_parsing:
            _check_device(name, others)
        return name

    return click.option("--device", default=default, show_default=True, callback=check, help=more)


def _check_device(name: str, others: tuple[str, ...] | None) -> None:
    from k2quant.kernels.devices.driver import gpu_number, refuse_without_driver

    if name in (others or ()) or (others is None and not name.startswith("cuda")):
        return
    gpu_number(name, known=", ".join([*(others or ()), "cuda, cuda:N"]))
    refuse_without_driver(name, remedy="" if others == () else "; use --device cpu")


def check_early(
    *folders: Path | Address, follow_links: bool, text: Path | None = None, output: Path | None = None
) -> None:
    """Refuse what cannot be read or written before torch and transformers are loaded, which takes seconds.

    Args:
        folders: of checkpoints; their indexes and headers are read.
        follow_links: whether their links may lead out of them.
        text: a file to be read later.
        output: a file to be written at the end.

    Raises:
        CheckpointError: a folder holds no checkpoint, or the file is none.
        OutputError: the folder of `output` is not there, or nothing may be written there.
        OSError: the file cannot be opened.
    """
    import os

    from k2quant.checkpoint.files.paths import open_regular
    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.errors import OutputError

    if output is not None and not os.access(output.parent, os.W_OK | os.X_OK):
        raise OutputError("cannot be written", file=output, remedy="name a file in a folder that is there and yours")
    for folder in folders:
        open_checkpoint(folder, follow_links=follow_links)
    if text is not None:
        os.close(open_regular(text))


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


def backend(
    choices: tuple[str, ...] = ("auto", "reference"), more: str = "The fused kernels, or plain torch."
) -> Option[Any]:
    """How packed weights are multiplied.

    Args:
        choices: the first is meant where nothing is said.
        more: what the command has to say of the choice.
    """
    return click.option("--backend", type=words(choices), default=choices[0], show_default=True, help=more)


def exact_backend() -> Option[Any]:
    """How weights are multiplied where two checkpoints are compared."""
    return backend(
        ("decoded", "auto", "reference"),
        "decoded: every weight as the BF16 values that it means, so that equal values give equal bits in any format; "
        "auto: the fused kernels, as a model is run; reference: plain torch.",
    )
