"""Dataclasses made of what YAML or JSON holds: names and types are checked, and messages say where."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from k2quant.errors import UsageError
from k2quant.qat.config import shown

_Type = TypeVar("_Type")


def build(kind: type[_Type], content: object, where: str, *, hidden: Collection[str] = ()) -> _Type:
    """Make a dataclass of a mapping, checking names and types.

    Args:
        kind: the dataclass.
        content: the mapping; or anything else, which is refused.
        where: the mapping's place, for messages; empty for the whole file.
        hidden: names of fields that are no keys of a file.

    Raises:
        UsageError: a key is missing or unknown, or a value makes no sense.
    """
    if not isinstance(content, Mapping):
        found = "nothing" if content is None else type(content).__name__
        raise UsageError(f"{where or 'job'}: expected keys and values, found {found}")
    known = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    prefix = f"{where}: " if where else ""
    for name in content:
        if name not in known or name in hidden:
            listed = ", ".join(sorted(known.keys() - set(hidden)))
            raise UsageError(f"{prefix}unknown key {shown(name)}; known are {listed}")
    for name in _needed(kind):
        if name not in content:
            raise UsageError(f"{prefix}the key {name!r} is missing")
    types_of = typing.get_type_hints(kind)
    values = {name: _value(types_of[name], value, f"{prefix}{name}") for name, value in content.items()}
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from error


def filled(kind: type, content: dict[Any, Any]) -> dict[Any, Any]:
    """Return what a file holds, each section with nothing under it as `{}`, if it can do with its defaults.

    YAML reads it as null, which would be no section at all. That is what null means in the manifest of a run.
    """
    found = dict(content)
    for name, hint in typing.get_type_hints(kind).items():
        section = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        if section is None:
            continue
        if name in found and found[name] is None and not _needed(cast("type", section)):
            found[name] = {}
        elif isinstance(found.get(name), dict):
            found[name] = filled(cast("type", section), found[name])
    return found


def _needed(kind: type) -> list[str]:
    """Return the names of a dataclass's fields that have no default."""
    parts = fields(kind)
    return [part.name for part in parts if part.default is MISSING and part.default_factory is MISSING]


def _value(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a field of this type wants it."""
    origin = get_origin(kind)
    if origin in {types.UnionType, typing.Union}:
        inner = next(one for one in get_args(kind) if one is not type(None))
        return None if value is None else _value(inner, value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{where}: expected {', '.join(get_args(kind))}, found {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list, found {shown(value)}")
        return tuple(_value(get_args(kind)[0], one, where) for one in value)
    return build(cast("type", kind), value, where) if is_dataclass(kind) else _plain(kind, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    """Return text, a number or a truth value."""
    if kind is float and (type(value) is int or isinstance(value, str)):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{where}: expected {words.get(kind, kind)}, found {shown(value)}")
    return value
