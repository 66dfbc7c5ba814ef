"""Two runs side by side: what may be compared, and item by item how it came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.errors import HarnessFault, Incomparable, UsageError, printable
from k2quant.eval.runs.columns import Columns
from k2quant.eval.runs.items import Run, Task
from k2quant.ground.saying.showing import brief

_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """The same items of one task, in the order of the baseline."""

    base: Task
    candidate: Task
    ours: Columns
    """The baseline's answers."""
    theirs: Columns
    """The candidate's."""
    places: NDArray[np.int64]
    """For each item of the baseline, which of the candidate's it is: `[items]`."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.base.name

    @property
    def items(self) -> int:
        """How many there are."""
        return len(self.places)

    @property
    def unit(self) -> int:
        """Both sides' shares of right answers are whole multiples of 1 / `unit`; 1 where each item was asked once."""
        return math.lcm(self.ours.repeats, self.theirs.repeats)

    @property
    def base_right(self) -> NDArray[np.int64]:
        """The baseline's right answers to each item: `[items]`."""
        return self.ours.counted(self.ours.right)

    @property
    def candidate_right(self) -> NDArray[np.int64]:
        """The candidate's right answers to each item: `[items]`."""
        return self.theirs.counted(self.theirs.right)[self.places]

    def changes(self, unit: int | None = None) -> NDArray[np.int64]:
        """Return by how much the share of right answers to each item rose: int64 `[items]`, in parts of 1 / `unit`."""
        return self._risen(self.base_right, self.candidate_right, unit or self.unit)

    def more_cut(self, unit: int) -> NDArray[np.int64]:
        """Return by how much the share of answers cut in thought rose: int64 `[items]`, in parts of 1 / `unit`."""
        base, candidate = self.ours.counted(self.ours.cut), self.theirs.counted(self.theirs.cut)[self.places]
        return self._risen(base, candidate, unit)

    def _risen(self, base: NDArray[np.int64], candidate: NDArray[np.int64], unit: int) -> NDArray[np.int64]:
        return candidate * (unit // self.theirs.repeats) - base * (unit // self.ours.repeats)

    @property
    def identical(self) -> bool:
        """Whether every output is the same to the last bit."""
        if self.ours.repeats != self.theirs.repeats:
            return False
        ours, theirs = (side.output.reshape(-1, side.repeats) for side in (self.ours, self.theirs))
        return bool((ours == theirs[self.places]).all())


def pair(base: Run, candidate: Run, names: Iterable[str] = ()) -> tuple[Pairs, ...]:
    """Pair the items of two runs, task by task.

    Args:
        base: the run that counts as the truth.
        candidate: the other one.
        names: the tasks to pair; none for all that the runs hold.

    Raises:
        UsageError: a task is named that the baseline does not have.
        Incomparable: the runs did not ask the same items in the same words with the same settings and tokenizer.
    """
    if None not in {base.tokenizer_hash, candidate.tokenizer_hash} and base.tokenizer_hash != candidate.tokenizer_hash:
        raise Incomparable(
            "the runs had different tokenizers",
            file=candidate.folder,
            expected=f"{base.tokenizer_hash:.12}",
            found=f"{candidate.tokenizer_hash:.12}",
            remedy="copy the baseline's tokenizer files into the candidate and run it again",
        )
    return tuple(
        _paired(base.tasks[name], candidate.tasks[name], candidate) for name in _common(base, candidate, names)
    )


def _common(base: Run, candidate: Run, names: Iterable[str]) -> list[str]:
    wanted = list(dict.fromkeys(names))
    if absent := [name for name in wanted if name not in base.tasks]:
        named, there = (", ".join(map(printable, names)) for names in (absent[:_SHOWN], base.tasks))
        raise UsageError(f"{base.folder} has no task {named}; it has {there}")
    if not wanted and (only := sorted(base.tasks.keys() ^ candidate.tasks.keys())):
        raise Incomparable(
            "the runs have different tasks",
            file=candidate.folder,
            found=f"only in one of them: {', '.join(only[:_SHOWN])}",
            remedy="name those to compare with `tasks=`",
        )
    wanted = wanted or list(base.tasks)
    if absent := [name for name in wanted if name not in candidate.tasks]:
        raise Incomparable("lacks tasks of the baseline", file=candidate.folder, found=", ".join(absent[:_SHOWN]))
    return wanted


def _paired(base: Task, candidate: Task, run: Run) -> Pairs:
    place = f"{run.folder}, task {base.name}"
    for what, one, other in (("metric", base.metric, candidate.metric), ("filter", base.filter, candidate.filter)):
        if one != other:
            raise Incomparable(f"scored by another {what}", file=place, expected=one, found=other)
    if (base.settings.keys() ^ candidate.settings.keys()) - _NOT_ALWAYS:
        raise Incomparable(
            "noted by another tool, or another version of it",
            file=place,
            **_difference(base.settings, candidate.settings),
            remedy="run both with k2quant eval run, or both with lm_eval",
        )
    if base.settings != candidate.settings:
        raise Incomparable(
            "run with other settings", file=place, **_difference(base.settings, candidate.settings), remedy=_SAME_WAY
        )
    ours, theirs = base.columns, candidate.columns
    places = _places(ours.of_items(ours.key), theirs.of_items(theirs.key))
    if places is None:
        raise _mismatch(ours, theirs, place)
    return Pairs(base=base, candidate=candidate, ours=ours, theirs=theirs, places=places)


_NOT_ALWAYS = {"think_end"}
"""Settings that a run notes where they hold: nobody looked for reasoning in one that has no marker."""
_SAME_WAY = "run both with the same tasks, shots, limit and settings"


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    key = next(
        key for key in sorted({**ours, **theirs}) if [ours.get(key), key in ours] != [theirs.get(key), key in theirs]
    )
    sides = (("expected", ours), ("found", theirs))
    return {side: f"{key} {where[key]!r:.200}" if key in where else f"no {key}" for side, where in sides}


def _places(ours: NDArray[np.bytes_], theirs: NDArray[np.bytes_]) -> NDArray[np.int64] | None:
    """Return where each of our keys stands among theirs, or None where they have others.

    The few documents that a benchmark holds twice are told apart by their order.
    """
    if len(ours) != len(theirs):
        return None
    if (ours == theirs).all():
        return np.arange(len(ours))
    our_order, their_order = (np.argsort(keys, kind="stable") for keys in (ours, theirs))
    if (ours[our_order] != theirs[their_order]).any():
        return None
    places = np.empty(len(ours), np.int64)
    places[our_order] = their_order
    return places


def _mismatch(ours: Columns, theirs: Columns, place: str) -> Incomparable:
    """Say whether other items were asked, or the same ones in other words."""
    base, candidate = (_by_document(side) for side in (ours, theirs))
    if base.keys() != candidate.keys() or ours.items != theirs.items:
        return Incomparable(
            "other items",
            file=place,
            expected=f"the {ours.items} of the baseline",
            found=f"{theirs.items}, {len(base.keys() & candidate.keys())} in common",
            remedy=_SAME_WAY,
        )
    changed = [number for document, (key, number) in base.items() if candidate[document][0] != key]
    return Incomparable(
        "the same items in other words",
        file=place,
        found=f"{len(changed)} of {len(base)} prompts or targets differ, the first of document {(changed or [0])[0]}",
        remedy=f"{_SAME_WAY}, and the same chat template",
    )


def _by_document(side: Columns) -> dict[bytes, tuple[bytes, int]]:
    """Return key and number of each document."""
    document, key, number = (side.of_items(column).tolist() for column in (side.document, side.key, side.doc_id))
    return dict(zip(document, zip(key, number, strict=True), strict=True))


def check_outputs(pairs: Iterable[Pairs]) -> None:
    """Refuse a task whose outputs say nothing on either side: the harness or the server broke, not the model.

    Raises:
        HarnessFault: see above.
    """
    for task in pairs:
        for who, side in (("baseline", task.ours), ("candidate", task.theirs)):
            hollow, answers = int(side.hollow.sum()), len(side.hollow)
            if 2 * hollow > answers:
                raise HarnessFault(
                    f"the {who}'s outputs of {task.task} say nothing",
                    found=f"{hollow} of {answers} empty, or with log-probabilities that are all the same",
                    remedy="a server without echoed log-probabilities cannot do multiple choice; look at its samples",
                )
