"""The changes that change nothing, each with its reason; a line that is edited makes its entries stale."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

from mutation.making import Mutant

LIST = Path(__file__).with_name("equivalent.toml")

Key = tuple[str, str, str]


def reasons() -> dict[Key, str]:
    """Return why each listed change changes nothing, by module, line, and line with the change.

    Raises:
        ValueError: an entry lacks something, or stands twice.
    """
    found: dict[Key, str] = {}
    for entry in tomllib.loads(LIST.read_text(encoding="utf-8")).get("equivalent", []):
        if set(entry) != {"module", "line", "change", "reason"} or not all(map(str.strip, entry.values())):
            raise ValueError(f"{LIST}: expected module, line, change and reason, found {entry}")
        key = entry["module"], entry["line"], entry["change"]
        if key in found:
            raise ValueError(f"{LIST}: {key} stands twice")
        found[key] = entry["reason"]
    return found


def stale(listed: Iterable[Key], module: str, made: Iterable[Mutant]) -> list[Key]:
    """Return the entries of a module that are no change of it any more."""
    keys = {mutant.key for mutant in made}
    return [key for key in listed if key[0] == module and key not in keys]
