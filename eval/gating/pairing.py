"""Two runs side by side: what may be compared, and item by item how it came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.errors import HarnessFault, Incomparable, UsageError, printable
from k2quant.eval.gating.verdict import Flip
from k2quant.eval.runs.items import Item, Run, Task

_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The same items of one task, in the order of the baseline."""

    task: str
    base: tuple[Item, ...]
    candidate: tuple[Item, ...]

    @property
    def lost(self) -> int:
        """Items only the baseline has right."""
        return sum(one.right and not other.right for one, other in self._both())

    @property
    def gained(self) -> int:
        """Items only the candidate has right."""
        return sum(other.right and not one.right for one, other in self._both())

    @property
    def identical(self) -> bool:
        """Whether every output is the same to the last bit."""
        return all(one.output_digest == other.output_digest for one, other in self._both())

    def flips(self) -> Iterable[Flip]:
        """Yield the items that changed between right and wrong."""
        for one, other in self._both():
            if one.right != other.right:
                yield Flip(
                    task=self.task,
                    doc_id=one.doc_id,
                    lost=one.right,
                    prompt=one.prompt,
                    target=one.target,
                    base_answer=one.answer,
                    candidate_answer=other.answer,
                )

    def _both(self) -> Iterable[tuple[Item, Item]]:
        return zip(self.base, self.candidate, strict=True)


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
    if base.settings.keys() != candidate.settings.keys():
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
    ours, theirs = _by_key(base.items), _by_key(candidate.items)
    if ours.keys() != theirs.keys():
        raise _mismatch(base, candidate, place)
    return Pairs(task=base.name, base=tuple(ours.values()), candidate=tuple(theirs[key] for key in ours))


_SAME_WAY = "run both with the same tasks, shots, limit and settings"


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    key = next(
        key for key in sorted({**ours, **theirs}) if [ours.get(key), key in ours] != [theirs.get(key), key in theirs]
    )
    sides = (("expected", ours), ("found", theirs))
    return {side: f"{key} {where[key]!r:.200}" if key in where else f"no {key}" for side, where in sides}


def _by_key(items: Iterable[Item]) -> dict[tuple[Any, int], Item]:
    """Return items by key; the few documents that a benchmark holds twice are told apart by their order."""
    seen: Counter[Any] = Counter()
    found: dict[tuple[Any, int], Item] = {}
    for item in items:
        found[item.key, seen[item.key]] = item
        seen[item.key] += 1
    return found


def _mismatch(base: Task, candidate: Task, place: str) -> Incomparable:
    """Say whether other items were asked, or the same ones in other words."""
    ours = {item.key.doc_hash: item for item in base.items}
    theirs = {item.key.doc_hash: item for item in candidate.items}
    if ours.keys() != theirs.keys() or len(base.items) != len(candidate.items):
        return Incomparable(
            "other items",
            file=place,
            expected=f"the {len(base.items)} of the baseline",
            found=f"{len(candidate.items)}, {len(ours.keys() & theirs.keys())} in common",
            remedy=_SAME_WAY,
        )
    changed = [item.doc_id for doc, item in ours.items() if theirs[doc].key != item.key]
    return Incomparable(
        "the same items in other words",
        file=place,
        found=f"{len(changed)} of {len(ours)} prompts or targets differ, the first of document {(changed or [0])[0]}",
        remedy=f"{_SAME_WAY}, and the same chat template",
    )


def check_outputs(pairs: Iterable[Pairs]) -> None:
    """Refuse a task whose outputs say nothing on either side: the harness or the server broke, not the model.

    Raises:
        HarnessFault: see above.
    """
    for task in pairs:
        for who, items in (("baseline", task.base), ("candidate", task.candidate)):
            hollow = sum(item.hollow for item in items)
            if 2 * hollow > len(items):
                raise HarnessFault(
                    f"the {who}'s outputs of {task.task} say nothing",
                    found=f"{hollow} of {len(items)} empty, or with log-probabilities that are all the same",
                    remedy="a server without echoed log-probabilities cannot do multiple choice; look at its samples",
                )
