"""Whether two models answered, and the baseline well enough to lose something: refused if not, named if in doubt."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist

from k2quant.errors import Incomparable
from k2quant.eval.gating.pairing import Pairs
from k2quant.eval.gating.policy import Policy
from k2quant.eval.runs.items import Run, Task
from k2quant.ground.intervals import wilson

_ENOUGH = 30  # items from which on a task at chance is refused, not only named


def check_models(base: Run, candidate: Run, pairs: Iterable[Pairs], *, same_model: bool) -> None:
    """Refuse one model twice where two are to be compared, and two where one is to be measured.

    Raises:
        Incomparable: so it is.
    """
    known = None not in {base.model_hash, candidate.model_hash}
    same = base.model_hash == candidate.model_hash if known else None
    if same_model and same is False:
        raise Incomparable(
            "two models, not one twice",
            file=candidate.folder,
            expected=f"{base.model_hash:.12}",
            found=f"{candidate.model_hash:.12}",
            remedy="leave `same_model=True` out",
        )
    if same and not same_model:
        raise Incomparable(
            "the same model twice",
            file=candidate.folder,
            found=f"{candidate.model_hash:.12} in both runs",
            remedy="with `same_model=True` the noise between two runs is measured",
        )
    if same is None and not same_model and all(task.identical for task in pairs):
        raise Incomparable(
            "the same outputs to the last bit, and nobody recorded whose they are",
            file=candidate.folder,
            remedy="the same model twice, or a cache that answered for both? Run both with `k2quant eval run`; "
            "with `same_model=True` the noise between two runs of one model is measured",
        )


def check_chance(tasks: list[Task], policy: Policy) -> None:
    """Refuse a baseline that has nothing to lose: no candidate could fail.

    Raises:
        Incomparable: see above.
    """
    sizes = [task.columns.items for task in tasks]
    items = sum(sizes)
    right = sum(task.right / task.columns.repeats for task in tasks)
    chance = sum(task.chance * size for task, size in zip(tasks, sizes, strict=True)) / items
    for task, size in zip(tasks, sizes, strict=True):
        floor = task.chance + policy.margin_of(task.name)
        if len(tasks) > 1 and size >= _ENOUGH and task.accuracy <= floor:
            raise _at_chance(f"in {task.name} ", task.accuracy, task.chance, size)
    # An item asked several times counts as one: its answers hang together.
    if wilson(right, items, -NormalDist().inv_cdf(policy.alpha))[0] <= chance + policy.margin:
        raise _at_chance("", right / items, chance, items)


def _at_chance(where: str, accuracy: float, chance: float, items: int) -> Incomparable:
    return Incomparable(
        f"the baseline is {where}not clearly better than chance, so there is nothing to lose",
        expected=f"well above {chance:.1%} and the margin",
        found=f"{accuracy:.1%} of {items} items",
        remedy="take tasks that the baseline can do (`tasks=`), or more items",
    )


def doubts(base: Run, candidate: Run, pairs: Iterable[Pairs], *, same_model: bool) -> Iterable[str]:
    """Say what makes it doubtful that two models answered these items well enough to lose something."""
    if same_model:
        return
    if None in {base.model_hash, candidate.model_hash} and base.model and base.model == candidate.model:
        yield f"both runs name the model {base.model}; no hash tells whether these are two models or the same one twice"
    if all(task.identical for task in pairs):
        yield "every output is the same to the last bit: either nothing was lost, or one cache answered for both"
    else:
        for name in (task.task for task in pairs if task.identical and task.ours.choices[0]):
            yield f"{name}: every log-probability is the same to the last bit; did one cache answer for both?"
    for both in pairs:
        task = both.base
        if both.items < _ENOUGH and task.accuracy <= task.chance:
            yield f"{task.name}: the baseline is at chance, {task.accuracy:.1%} of {both.items} items"
