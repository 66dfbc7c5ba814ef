"""Print what k2quant offers to Python and its tree of commands; runs with the package of either checkout."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import click

_MODULES = ("k2quant", "k2quant.errors", "k2quant.eval", "k2quant.kernels.ops", "k2quant.model", "k2quant.qat")


def offered(module: ModuleType) -> list[str]:
    """Return the names in `__all__`, and what else a module shows that is the package's and no module."""
    shown = {name for name in dir(module) if not name.startswith("_") and _is_ours(getattr(module, name))}
    return sorted({*getattr(module, "__all__", ()), *shown})


def _is_ours(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("k2quant")


def described(value: Any) -> Iterator[str]:
    """Yield a signature, and of a class what its instances have."""
    if not callable(value):
        yield f": {value!r}" if isinstance(value, str) else f": {type(value).__name__}"
        return
    yield _signature(value)
    if isinstance(value, type):
        yield f", a {' and a '.join(base.__name__ for base in value.__mro__[1:])}"
        for name in sorted(name for name in dir(value) if not name.startswith("_")):
            member = getattr(value, name)
            yield f"\n    .{name}{_signature(member) if callable(member) else ''}"


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):  # of a type of Python's own
        return "(?)"


def commands(command: click.Command, path: str, context: click.Context) -> Iterator[str]:
    """Yield the path of a command and of all below it, each with what click knows of its parameters."""
    yield path
    for each in command.params:
        yield f"    {json.dumps(each.to_info_dict(), sort_keys=True, default=str)}"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from commands(below, f"{path} {name}", context)


def main() -> None:
    """Print a line for each name, and more for a class."""
    for place in _MODULES:
        module = import_module(place)
        print(f"{place}.__all__ = {sorted(getattr(module, '__all__', ()))}")
        for name in offered(module):
            print(f"{place}.{name}{''.join(described(getattr(module, name)))}")
    top = import_module("k2quant.cli").main
    for line in commands(top, "k2quant", click.Context(top)):
        print(line)


if __name__ == "__main__":
    main()
