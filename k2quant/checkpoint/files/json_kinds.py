"""Values out of JSON, each of the kind that belongs there; a reader turns what they raise into an error with a name."""

from __future__ import annotations

import math
from typing import Any


def text(value: object) -> str:
    """Return text, or raise TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} where text stands")
    return value


def mapping(value: object) -> dict[str, Any]:
    """Return an object, or raise TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.100} where an object stands")
    return value


def values(value: object) -> list[Any]:
    """Return a list, or raise TypeError."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.100} where a list stands")
    return value


def whole(value: object, least: int = 0, limit: int = 2**63) -> int:
    """Return an integer from `least` to below `limit`, or raise ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise ValueError(f"{value!r:.100} where a count from {least} stands")
    return value


def number(value: object, low: float = 0.0, high: float = 1e100) -> float:
    """Return a finite number from `low` to `high`, or raise ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r:.100} where a number from {low:g} to {high:g} stands")
    if not math.isfinite(value):
        raise ValueError(f"{value!r:.100} where a number stands")
    return float(value)


def truth(value: object) -> bool:
    """Return true or false, or raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.100} where true or false stands")
    return value
