"""What a run of benchmarks comes to: items, each right or wrong, by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.ground.saying.showing import brief


class Key(NamedTuple):
    """What makes an item of two runs the same item: the document and every word of the prompt and of the target."""

    doc_hash: str
    prompt_hash: str
    """Of the rendered prompts: all requests of the item where k2quant ran it, the first one's context where not."""
    target_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question, and what a model made of it."""

    key: Key
    doc_id: int
    """Its place in the task's data."""
    right: bool
    prompt: str
    """The end of the prompt, for people."""
    target: str
    """The right answer, for people."""
    answer: str
    """What the task's filter made of the model's output; of a multiple choice, the number of the likeliest one."""
    output_digest: str
    """SHA-256 of the raw responses, log-probabilities included: equal where two runs gave the same to the last bit."""
    choices: int | None
    """Of a multiple choice, how many there are; None where the model wrote its answer."""
    hollow: bool
    """Whether the output says nothing: an empty text, or log-probabilities that are all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All items of one task by one metric behind one filter, in the order of `doc_id`; no document stands twice."""

    name: str
    metric: str
    """Such as `exact_match` or `acc`: 1 for right, 0 for wrong."""
    filter: str
    """Such as `strict-match`, or `none`."""
    items: tuple[Item, ...]
    settings: Mapping[str, Any]
    """What must be the same for two runs to be comparable: version, shots, generation settings, chat template."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def right(self) -> int:
        """How many items are right."""
        return sum(item.right for item in self.items)

    @property
    def accuracy(self) -> float:
        """Right of all, 0 to 1."""
        return self.right / len(self.items)

    @property
    def chance(self) -> float:
        """The accuracy of guessing: the mean of 1 / choices; 0 where the model writes its answers."""
        return sum(1 / item.choices for item in self.items if item.choices) / len(self.items)


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
