"""Answers that never left their reasoning: named where there are many, or more on one side than by chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from k2quant.eval.gating.comparing import differs
from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.gating.verdict import Comparison

_MANY = 0.05
"""Share of answers cut in thought from which on the limit on new tokens decides as much as the model does."""


def cut_warnings(
    pooled: Comparison, tasks: Sequence[Comparison], pairs: Sequence[Pairs], pool: Sequence[Pairs], alpha: float
) -> Iterable[str]:
    """Say where so many answers never left their reasoning, or so many more on one side, that it should be known.

    Args:
        pooled: what the pool comes to.
        tasks: what each task comes to.
        pairs: the tasks, in the same order.
        pool: those of them whose answers count in the pool.
        alpha: of each doubt.
    """
    if (pooled.base_cut is None) != (pooled.candidate_cut is None):
        yield f"{pooled.cut_in_thought}: run both with the same version of k2quant, so that both are looked at"
    looked = [task for task in pairs if task.ours.looked and task.theirs.looked]
    for comparison, task in zip(tasks, pairs, strict=True):
        if max(task.ours.cut.mean(), task.theirs.cut.mean()) > _MANY:
            yield (
                f"{comparison.name}: {comparison.cut_in_thought}: where so many never answer, the limit on new tokens "
                "decides as much as the model; allow more"
            )
    counted = [task for task in pool if task in looked]
    if counted and _differ(counted, alpha):
        yield f"{pooled.cut_in_thought}: more than chance apart, so one of them thinks longer than the other"
        return
    for comparison, task in zip(tasks, pairs, strict=True):
        if len(tasks) > 1 and task in looked and _differ([task], alpha / len(tasks)):
            yield f"{comparison.name}: {comparison.cut_in_thought}: more than chance apart"


def _differ(pairs: Sequence[Pairs], alpha: float) -> bool:
    return (
        any(task.ours.cut.any() or task.theirs.cut.any() for task in pairs) and differs(pairs, Pairs.more_cut) <= alpha
    )
