"""How messages name arguments: as Python has them, so marked that a command line can say its flags instead.

A mark is `` `restart=True` ``, or `` `scope=` `` where any value is meant: a name, an equals sign, perhaps a value, in
backticks. A message below the command line holds marks and no flags, so nothing is said twice.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

_MARK = re.compile(r"`([a-z][a-z0-9_]*)=([^`\s]*)`")


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a message with flags in place of its marks: `restart=True` becomes --restart, `device=cpu` --device cpu.

    Args:
        text: the message.
        flags: by the names of arguments. What has no flag stays as it is.
    """

    def shown(mark: re.Match[str]) -> str:
        name, value = mark.groups()
        if name not in flags:
            return mark[0]
        return f"{flags[name]} {value}" if value and value != "True" else flags[name]

    return _MARK.sub(shown, text)


_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def hinting(hints: Mapping[str, str]) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """Have a function answer keywords that it does not have with those that it has.

    Args:
        hints: by the keywords that other libraries have, what to say here.
    """

    def wrap(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        known = [name for name, each in inspect.signature(function).parameters.items() if each.kind != each.VAR_KEYWORD]

        @functools.wraps(function)
        def call(*given: _Given.args, **named: _Given.kwargs) -> _Result:
            for name in named:
                if name not in known:
                    raise TypeError(f"{function.__name__}() has no argument {name!r}{_hint(name, hints, known)}")
            return function(*given, **named)

        return call

    return wrap


def _hint(name: str, hints: Mapping[str, str], known: list[str]) -> str:
    if name in hints:
        return f": {hints[name]}"
    close = get_close_matches(name, known, 1)
    return f", did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
