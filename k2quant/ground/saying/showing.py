"""How results show themselves: in one line whatever they hold, and in a notebook as a small table.

A result says its `facts`, by name, or is shown by its fields. Long values and what holds many are cut short: the repr
of a conversion of a trillion weights is as long as that of a small one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from html import escape
from typing import Any

from k2quant.errors import printable

_LONGEST = 60
"""Letters of a value."""
_MOST = 3
"""Items of a collection that is written out."""


def brief(result: object) -> str:
    """Return a result in one line: its kind, and its facts or fields."""
    facts = ", ".join(f"{name}={text}" for name, text in _facts(result).items())
    return f"{type(result).__name__}({facts})"


def as_html(result: object) -> str:
    """Return a result as a table of HTML with a row for each fact or field; nothing in it is anybody's markup."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in _facts(result).items()
    )
    return f"<table><caption>{escape(type(result).__name__)}</caption><tbody>{rows}</tbody></table>"


def _facts(result: object) -> dict[str, str]:
    said: Any = getattr(result, "facts", None)
    facts: Mapping[str, object] = said() if callable(said) else _fields(result)
    return {name: shown(value) for name, value in facts.items()}


def _fields(result: Any) -> dict[str, object]:
    names = [part.name for part in dataclasses.fields(result)] if dataclasses.is_dataclass(result) else result._fields
    return {name: getattr(result, name) for name in names if not name.startswith("_")}


def shown(value: object) -> str:
    """Return a value in one short line; of what holds more than a few, or long things, how many there are."""
    if isinstance(value, str | bytes):
        return _cut(value[: 2 * _LONGEST])
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array or a tensor, of whatever library
        return f"<{value.dtype} {list(value.shape)}>"
    if isinstance(value, Collection):
        if len(value) > _MOST:
            return _counted(value)
        items = [shown(item) for item in (value.items() if isinstance(value, Mapping) else value)]
        text = f"[{', '.join(items)}]"
        return text if len(text) <= _LONGEST else _counted(value)
    return _cut(value)


def _counted(value: Collection[object]) -> str:
    return f"<{len(value):,} {'item' if len(value) == 1 else 'items'}>"


def _cut(value: object) -> str:
    text = printable(" ".join(repr(value).split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
