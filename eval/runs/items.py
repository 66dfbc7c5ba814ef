"""What a run of benchmarks comes to: items, each right or wrong, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.eval.runs.answers import Item, Key
from k2quant.eval.runs.columns import Columns, Stored, columns_of
from k2quant.ground.saying.showing import brief

__all__ = ["Item", "Key", "Run", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All answers of one task by one metric behind one filter; no document stands twice."""

    name: str
    metric: str
    """Such as `exact_match` or `acc`: 1 for right, 0 for wrong."""
    filter: str
    """Such as `strict-match`, or `none`."""
    items: Sequence[Item]
    """In the order of `doc_id`, then of `repeat`: all answers of an item stand together, and each item has as many.
    Of a task that was read from a file, each comes from there when it is asked for."""
    settings: Mapping[str, Any]
    """What must be the same for two runs to be comparable: version, shots, generation settings, chat template."""
    truncated: int | None = None
    """How many answers ended only because they were as long as allowed; None where nobody knows."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def columns(self) -> Columns:
        """What a gate needs of every answer."""
        return self.items.columns if isinstance(self.items, Stored) else columns_of(self.items)

    @property
    def right(self) -> int:
        """How many answers are right."""
        return int(self.columns.right.sum())

    @property
    def accuracy(self) -> float:
        """Right of all, 0 to 1."""
        return self.right / len(self.items)

    @property
    def chance(self) -> float:
        """The accuracy of guessing: the mean of 1 / choices; 0 where the model writes its answers."""
        choices = self.columns.choices
        numbers, counts = np.unique(choices[choices > 0], return_counts=True)
        return sum(int(count) / int(number) for number, count in zip(numbers, counts, strict=True)) / len(self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model's answers to some tasks."""

    folder: Path
    """Where they were read from."""
    model: str
    """The model as it was named."""
    model_hash: str | None
    """SHA-256 over the content of its weights and config; None where nobody recorded it."""
    tokenizer_hash: str | None
    """SHA-256 over the content of its tokenizer's files; None where nobody recorded it."""
    settings: Mapping[str, Any]
    """Of the whole run, such as backend, dtype, batch size, versions; for people, not for comparing."""
    tasks: Mapping[str, Task]
    """By name."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each group of the harness the tasks and groups that it holds."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the tasks that a name stands for: itself, or those of a group; none where there is no such name."""
        found: dict[str, None] = {}
        waiting, seen = [name], {name}
        while waiting:
            part = waiting.pop(0)
            if part in self.tasks:
                found[part] = None
            inside = [inner for inner in self.groups.get(part, ()) if inner not in seen]
            waiting, seen = inside + waiting, seen | set(inside)
        return tuple(found)
