"""JSON as a hostile file may hold it: no duplicate keys, no surprises by depth or by size of numbers."""

from __future__ import annotations

import json
from typing import Any

from k2quant.errors import MalformedFile


def _refuse_constant(literal: str) -> None:
    msg = f"{literal} is not JSON"
    raise ValueError(msg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        msg = f"duplicate key {key!r}"
        raise ValueError(msg)
    return mapping


def parse_object(data: bytes, *, file: object) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object.

    Raises:
        MalformedFile: they do not, a key stands twice, or the nesting is too deep.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedFile("not valid JSON", file=file, found=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise MalformedFile("not a JSON object", file=file, found=type(value).__name__)
    return value
