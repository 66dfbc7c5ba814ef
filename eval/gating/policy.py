"""What a team agrees on before the candidate is run: margin, alpha, power, tasks; a small YAML file under review."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.strict_yaml import read_mapping
from k2quant.errors import UsageError
from k2quant.eval.statistics.restricted import LEAST_ALPHA
from k2quant.eval.statistics.tango import LEAST, check_share

_LIMIT = 2**16  # bytes of a policy file


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of a gate; the file has the same keys."""

    margin: float = 0.01
    """Largest drop in accuracy, over all items together, that is still good enough; 0.01 is one percentage point."""
    alpha: float = 0.05
    """Chance that a candidate whose drop is the margin or more passes all the same, and of the opposite mistake; with
    several tasks the pool and the tasks together each have it for FAIL."""
    power: float = 0.8
    """Chance of PASS that a candidate without any drop should have; the gate says when it is less."""
    tasks: Mapping[str, float | None] = field(default_factory=dict)
    """Tasks to gate, each with a margin of its own or None for `margin`; empty for all that the runs hold."""

    def __post_init__(self) -> None:
        """Refuse rules that make no sense.

        Raises:
            UsageError: see there.
        """
        _check_share("margin", self.margin, 0.5)
        _check_share("alpha", self.alpha, 0.5, least=LEAST_ALPHA)
        _check_share("power", self.power, 1)
        for name, margin in self.tasks.items():
            if margin is not None:
                _check_share(f"margin of {name}", margin, 0.5)

    def margin_of(self, task: str) -> float:
        """Return the margin of a task."""
        margin = self.tasks.get(task)
        return self.margin if margin is None else margin


def _check_share(name: str, value: object, limit: float, *, least: float = LEAST) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}: expected a number, found {value!r:.100}")
    check_share(name, value, limit, least=least)


_SHARE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>pp|%)?")


def share(text: str) -> float:
    """Read a share as people write it: `1pp`, `1%` and `0.01` are the same.

    Raises:
        UsageError: it is none of these.
    """
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r:.100} is no share; write 1pp, 1% or 0.01")
    return float(match["number"]) / (100 if match["unit"] else 1)


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        UsageError: it cannot be read, is no YAML mapping, has an unknown key, or a value that makes no sense.
    """
    content = read_mapping(path, _LIMIT)
    known = [part.name for part in fields(Policy)]
    for key in content:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r:.100}; known are {', '.join(known)}")
    try:
        shares = {key: _number(key, value) for key, value in content.items() if key != "tasks"}
        return Policy(**shares, tasks=_tasks(content.get("tasks", {})))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _number(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return share(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{key}: expected such as 1pp or 0.01, found {value!r:.100}")
    return value


def _tasks(value: Any) -> dict[str, float | None]:
    """Return tasks with their margins: from a list of names, or from a mapping of names to margins or nothing."""
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, dict):
        raise UsageError(f"tasks: expected a list or names with margins, found {type(value).__name__}")
    return {str(name): None if margin is None else _number(str(name), margin) for name, margin in value.items()}
