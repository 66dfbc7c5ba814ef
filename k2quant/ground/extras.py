"""The optional parts of k2quant: which packages each needs, and what is said where they are not installed.

Conversion, checks and merging need none of them. pyproject.toml has the extras themselves; a test holds both together.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Literal

from k2quant.errors import MissingExtra

Extra = Literal["run", "report", "eval", "qat", "tokenizer", "s3", "gs", "cluster", "gguf"]
"""A part, by its name in brackets: `k2quant[run]`."""

_RUN = ("torch", "transformers", "accelerate")

PACKAGES: Mapping[Extra, tuple[str, ...]] = {
    "run": _RUN,
    "report": ("matplotlib",),
    "eval": (*_RUN, "lm_eval"),
    "qat": (*_RUN, "matplotlib"),
    "tokenizer": ("tiktoken",),
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
    "cluster": ("ray",),
    "gguf": ("gguf",),
}
"""What each part cannot do without, by the names of imports; what only some of its uses need is asked for there."""


def need(extra: Extra, what: str) -> None:
    """Refuse to begin what an extra is needed for and not installed. Looks for packages and loads none.

    Args:
        extra: the part.
        what: is about to begin, for the message: "`k2quant report`".

    Raises:
        MissingExtra: a package is not there.
    """
    if missing := lacking(extra):
        are = "is" if len(missing) == 1 else "are"
        raise MissingExtra(f"{what} needs {listed(missing)}, which {are} not installed", remedy=install(extra))


@contextlib.contextmanager
def needed(extra: Extra, what: str) -> Iterator[None]:
    """Refuse the imports of a block where an extra is needed for them and not installed.

    Raises:
        MissingExtra: a package is not there.
    """
    need(extra, what)
    yield


def lacking(extra: Extra) -> tuple[str, ...]:
    """Return the packages of an extra that are not installed."""
    return tuple(name for name in PACKAGES[extra] if not _installed(name))


def install(extra: Extra) -> str:
    """Return the command that installs an extra where k2quant is installed; no index need have k2quant for it."""
    return f"pip install 'k2quant[{extra}]'"


def listed(names: tuple[str, ...]) -> str:
    """Return packages as a sentence has them: `torch, transformers and lm-eval`."""
    *first, last = (name.replace("_", "-") for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _installed(name: str) -> bool:
    return sys.modules.get(name) is not None or find_spec(name) is not None
