"""Answers that never left their reasoning: named where there are many, or more on one side than by chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from k2quant.eval.gating.comparing import differs
from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.gating.verdict import Comparison

_MANY = 0.05
"""Share of answers cut in thought from which on the limit on new tokens decides as much as the model does."""


def cut_warnings(
    pooled: Comparison, pool: Sequence[Pairs], tasks: Sequence[Comparison], pairs: Sequence[Pairs], alpha: float
) -> Iterable[str]:
    """Say where so many answers never left their reasoning, or so many more on one side, that it should be known.

    Args:
        pooled: the comparison of all items together.
        pool: the tasks in it: no answer stands in two of them.
        tasks: the comparison of each task.
        pairs: its items, in the same order.
        alpha: of the gate.
    """
    if (pooled.base_cut is None) != (pooled.candidate_cut is None):
        yield f"{pooled.cut_in_thought}: run both with the same version of k2quant, so that both are looked at"
    for comparison, task in zip(tasks, pairs, strict=True):
        if max(task.ours.cut.mean(), task.theirs.cut.mean()) > _MANY:
            yield (
                f"{comparison.name}: {comparison.cut_in_thought}: where so many never answer, the limit on new tokens "
                "decides as much as the model; allow more"
            )
    if _differ(pool, alpha):
        yield f"{pooled.cut_in_thought}: more than chance apart, so one of them thinks longer than the other"
        return
    for comparison, task in zip(tasks, pairs, strict=True):
        if len(tasks) > 1 and _differ([task], alpha / len(tasks)):
            yield f"{comparison.name}: {comparison.cut_in_thought}: more than chance apart"


def _differ(pairs: Sequence[Pairs], alpha: float) -> bool:
    """Tell whether more answers were cut on one side than chance does, in tasks where both were looked at."""
    looked = [task for task in pairs if task.ours.looked and task.theirs.looked]
    if not any(task.ours.cut.any() or task.theirs.cut.any() for task in looked):
        return False
    return differs(looked, Pairs.more_cut) <= alpha
