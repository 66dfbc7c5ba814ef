"""What a command to be compared is, and how a list of them is written down."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Prepare = Callable[[Path], None]
"""Writes or changes files in the working folder; it has nothing of the package."""


class Command(NamedTuple):
    """One call of Python."""

    name: str
    """What its output is filed under; unique in its group."""
    arguments: tuple[str, ...]
    """Behind `python -P`; paths are seen from the working folder."""
    before: Prepare | None = None
    """What happens to the working folder right before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Commands that belong together and write to a folder of their name, or to none."""

    name: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    """Groups whose files these commands read."""
    prepare: Prepare | None = None
    """What happens before the first."""


def called(lines: Mapping[str, str], before: Mapping[str, Prepare] | None = None) -> Iterator[Command]:
    """Yield commands of k2quant from their names and what is typed behind `k2quant`."""
    for name, line in lines.items():
        yield Command(name, ("-m", "k2quant", *shlex.split(line)), (before or {}).get(name))


def with_needs(groups: tuple[Group, ...], name: str) -> tuple[Group, ...]:
    """Return the group of a name and all that it needs, in their order.

    Raises:
        KeyError: there is none of this name.
    """
    by_name = {group.name: group for group in groups}
    wanted, todo = set(), [name]
    while todo:
        wanted.add(todo[-1])
        todo.extend(by_name[todo.pop()].needs)
    return tuple(group for group in groups if group.name in wanted)
