"""Tasks that look at the same answers as another task does: evidence once, however many tasks count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from k2quant.errors import UsageError
from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.runs.items import Run

_PART_OF = "part_of"
"""What the manifest of a run says of a task that looks at a part of each answer of another one."""

_Pairs = TypeVar("_Pairs", bound=Pairs)


def independent(base: Run, pairs: Iterable[_Pairs]) -> list[_Pairs]:
    """Return the tasks that may be pooled: parts of a task that is there are left out, for it has their answers.

    An answer that made no call where one is due is wrong in three parts. Pooled, it would count as three items that
    flipped, and the exact test would think to know three times as much as it does.

    Args:
        base: the baseline, whose tasks say what they are a part of.
        pairs: the tasks that are compared.

    Raises:
        UsageError: several parts of one task are compared, and not the task itself.
    """
    pairs = list(pairs)
    named = {task.task for task in pairs}
    wholes = {task.task: base.tasks[task.task].settings.get(_PART_OF) for task in pairs}
    lonely = Counter(str(whole) for whole in wholes.values() if whole is not None and whole not in named)
    for whole, count in lonely.items():
        if count > 1:
            parts = ", ".join(name for name, of in wholes.items() if of == whole)
            raise UsageError(
                f"{parts} look at the same answers, which would count {count} times: name one of them, or {whole} with "
                "them (`tasks=`)"
            )
    return [task for task in pairs if wholes[task.task] not in named]
