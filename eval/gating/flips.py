"""The items that changed between right and wrong, and what both models answered; texts are read when they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.runs.items import Item

CUT = "(cut in thought)"
"""What stands for the answer where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """An item that one model has right and the other wrong; of one asked several times, right more often."""

    task: str
    doc_id: int
    lost: bool
    """Whether the baseline has it right, or right more often; else the candidate."""
    prompt: str
    target: str
    base_answer: str
    """Of several the first that is right if the item was lost, the first that is wrong if it was gained."""
    candidate_answer: str
    """Of several the first that is wrong if the item was lost, the first that is right if it was gained."""
    base_right: int
    """How many of the baseline's answers are right."""
    base_asked: int
    """Of so many."""
    candidate_right: int
    candidate_asked: int

    @property
    def repeated(self) -> bool:
        """Whether the item was asked more than once."""
        return max(self.base_asked, self.candidate_asked) > 1

    @property
    def shares(self) -> str:
        """How often it was right on each side, in words."""
        return f"{self.base_right} of {self.base_asked}, then {self.candidate_right} of {self.candidate_asked}"


class Flips(Sequence[Flip]):
    """Flips of all tasks, lost ones first, of those the largest change first; each is read when it is asked for."""

    def __init__(self, pairs: Sequence[Pairs], found: NDArray[np.int64]) -> None:
        """Hold some flips of these tasks.

        Args:
            pairs: the tasks.
            found: int64 `[flips, 3]`: place of the task, place of the item, 1 if it was lost and else 0.
        """
        self._pairs, self._found = pairs, found

    def __repr__(self) -> str:
        """Return it in one line."""
        return f"<{len(self):,} flips>"

    def __len__(self) -> int:
        """How many there are."""
        return len(self._found)

    @overload
    def __getitem__(self, place: int) -> Flip: ...
    @overload
    def __getitem__(self, place: slice) -> Flips: ...
    def __getitem__(self, place: int | slice) -> Flip | Flips:
        """Return a flip with its texts, or those of a slice, unread."""
        if isinstance(place, slice):
            return Flips(self._pairs, self._found[place])
        return self._read(self._found[place].tolist())

    def __iter__(self) -> Iterator[Flip]:
        """Read one after another."""
        return map(self._read, (row.tolist() for row in self._found))

    def by_kind(self) -> dict[tuple[str, bool], Sequence[Flip]]:
        """Return the flips of each task, lost and gained apart, unread."""
        kinds: dict[tuple[str, bool], Sequence[Flip]] = {}
        for lost in (1, 0):
            for place, pairs in enumerate(self._pairs):
                some = self._found[(self._found[:, 0] == place) & (self._found[:, 2] == lost)]
                if len(some):
                    kinds[pairs.task, bool(lost)] = Flips(self._pairs, some)
        return kinds

    def _read(self, row: list[int]) -> Flip:
        pairs, item, lost = self._pairs[row[0]], row[1], bool(row[2])
        base = pairs.base.items[_answers(item, pairs.ours.repeats)]
        candidate = pairs.candidate.items[_answers(int(pairs.places[item]), pairs.theirs.repeats)]
        first = base[0]
        return Flip(
            task=pairs.task,
            doc_id=first.doc_id,
            lost=lost,
            prompt=first.prompt,
            target=first.target,
            base_answer=next(_said(answer) for answer in base if answer.right == lost),
            candidate_answer=next(_said(answer) for answer in candidate if answer.right != lost),
            base_right=_right(base),
            base_asked=len(base),
            candidate_right=_right(candidate),
            candidate_asked=len(candidate),
        )


def _answers(item: int, repeats: int) -> slice:
    return slice(item * repeats, (item + 1) * repeats)


def _said(answer: Item) -> str:
    """Return an answer; one that never left its reasoning has none, whatever a filter makes of the empty text."""
    return CUT if answer.cut_in_thought else answer.answer


def _right(answers: Iterable[Item]) -> int:
    return sum(answer.right for answer in answers)


def flips_of(pairs: Sequence[Pairs]) -> Flips:
    """Return the items of all tasks whose share of right answers changed."""
    found, sizes = [], []
    for place, task in enumerate(pairs):
        changes = task.changes()
        items = np.flatnonzero(changes)
        found.append(np.column_stack([np.full(len(items), place), items, changes[items] < 0]).astype(np.int64))
        sizes.append(np.abs(changes[items]) / task.unit)
    rows = np.concatenate(found) if found else np.empty((0, 3), np.int64)
    order = np.lexsort((-np.concatenate(sizes), 1 - rows[:, 2])) if found else slice(None)
    return Flips(tuple(pairs), rows[order])


def by_kind(flips: Sequence[Flip]) -> Mapping[tuple[str, bool], Sequence[Flip]]:
    """Return flips by task, lost and gained apart, in their order; texts that need not be read are not."""
    if isinstance(flips, Flips):
        return flips.by_kind()
    kinds: dict[tuple[str, bool], list[Flip]] = {}
    for flip in flips:
        kinds.setdefault((flip.task, flip.lost), []).append(flip)
    return kinds
