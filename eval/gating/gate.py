"""The gate: is a candidate good enough? A paired non-inferiority test with three answers.

PASS: the items show that the drop in accuracy is below the margin. FAIL: they show that it is above. INCONCLUSIVE: they
show neither, and how many would. Both tests hold their level at any number of items, so each mistake has at most the
chance alpha: exact ones (`paired`) where each item was asked once, and where items were asked several times those of
`repeats`, which count an item as one. The pool of all items carries PASS; FAIL also comes from any one task, by Holm's
rule over the tasks. Pool and tasks each have alpha: with several tasks a wrong FAIL from either has at most the chance
2 alpha.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from k2quant.eval.gating.comparing import compared, differs
from k2quant.eval.gating.comparing import decision as decision_of
from k2quant.eval.gating.cutting import cut_warnings
from k2quant.eval.gating.doubts import check_chance, check_models, doubts
from k2quant.eval.gating.flips import flips_of
from k2quant.eval.gating.pairing import Pairs, check_outputs, pair
from k2quant.eval.gating.parts import independent
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Comparison, Decision, Side, Verdict
from k2quant.eval.runs.items import Run
from k2quant.eval.runs.reading import read_run

POOL = "all"
"""Name of the comparison of all items together."""


def gate(
    base: str | os.PathLike[str] | Run,
    candidate: str | os.PathLike[str] | Run,
    *,
    policy: Policy | None = None,
    same_model: bool = False,
) -> Verdict:
    """Decide whether a candidate is good enough, from the same items answered by it and by its baseline.

    Args:
        base: the baseline's run: a folder that `k2quant eval run` or `lm_eval --log_samples` wrote, or what `read_run`
            gave.
        candidate: the candidate's.
        policy: margin, alpha, power and tasks; None for 1 pp, 5%, 80% and all tasks.
        same_model: whether both are runs of one model, to measure the noise between runs. Never a PASS.

    Raises:
        MalformedResults: a run's files are truncated, mixed up or lie.
        Incomparable: the runs asked different things, are the same one, or the baseline is at chance.
        HarnessFault: a run's outputs say nothing.
        UsageError: the policy names a task that there is not, or several parts of one task without the whole.
    """
    policy = policy or Policy()
    base, candidate = (run if isinstance(run, Run) else read_run(run) for run in (base, candidate))
    policy = _resolved(policy, base)
    pairs = pair(base, candidate, policy.tasks)
    check_outputs(pairs)
    check_models(base, candidate, pairs, same_model=same_model)
    check_chance([base.tasks[task.task] for task in pairs], policy)
    tasks = _adjusted([compared(task.task, [task], policy, policy.margin_of(task.task)) for task in pairs], policy)
    pool = independent(base, pairs)
    pooled = compared(POOL, pool, policy, policy.margin)
    decision, reason = _decided(pooled, tasks, policy)
    if same_model:
        decision, reason = "INCONCLUSIVE", _noise(pooled)
    return Verdict(
        decision=decision,
        reason=reason,
        warnings=(
            *(_noise_warnings(pool, policy) if same_model else _warnings(pooled, tasks, policy)),
            *cut_warnings(pooled, pool, tasks, pairs, policy.alpha),
            *doubts(base, candidate, pairs, same_model=same_model),
        ),
        pooled=pooled,
        tasks=tuple(tasks),
        flips=flips_of(pool),
        base=_side(base),
        candidate=_side(candidate),
        policy=policy,
        same_model=same_model,
    )


def _resolved(policy: Policy, run: Run) -> Policy:
    """Return the policy with a group's tasks in its place; each has the group's margin where it has none of its own."""
    tasks: dict[str, float | None] = {}
    for name, margin in policy.tasks.items():
        for part in run.parts(name) or (name,):
            if part == name or part not in policy.tasks:
                tasks[part] = margin
    return replace(policy, tasks=tasks)


def _side(run: Run) -> Side:
    return Side(folder=str(run.folder), model=run.model, model_hash=run.model_hash, tokenizer_hash=run.tokenizer_hash)


def _adjusted(tasks: list[Comparison], policy: Policy) -> list[Comparison]:
    """Return tasks with their p-values of FAIL as Holm's rule has them, and what then is decided."""
    order = sorted(tasks, key=lambda task: task.p_bad)
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, task in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * task.p_bad))
        adjusted[task.name] = largest
    return [
        replace(
            task,
            p_bad=adjusted[task.name],
            decision=decision_of(task.p_good, adjusted[task.name], policy.alpha),
        )
        for task in tasks
    ]


def _decided(pooled: Comparison, tasks: list[Comparison], policy: Policy) -> tuple[Decision, str]:
    worst = [task for task in tasks if task.decision == "FAIL"]
    if pooled.decision == "FAIL":
        return (
            "FAIL",
            f"accuracy {_fell(pooled)}, more than the margin of {_pp(pooled.margin)} (p = {pooled.p_bad:.2g})",
        )
    if worst:
        named = ", ".join(f"{task.name}: {_fell(task)}" for task in worst[:3])
        more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
        return "FAIL", f"more than the margin was lost in {named}{more}"
    if pooled.decision == "PASS":
        return "PASS", (
            f"accuracy {_fell(pooled)}, and the drop is below {_pp(pooled.margin)} "
            f"with at least {100 * (1 - policy.alpha):.10g}% confidence (p = {pooled.p_good:.2g})"
        )
    return "INCONCLUSIVE", f"{pooled.n:,} items cannot tell: accuracy {_fell(pooled)}; {_more(pooled)}"


def _more(pooled: Comparison) -> str:
    if pooled.needed is not None and pooled.needed <= pooled.n:
        return "they would mostly do for a candidate without any drop"
    if pooled.needed is None:
        return f"no number of items would do at {'differences so large' if pooled.repeated else 'so many flips'}"
    return f"about {pooled.needed:,} items would do for a candidate without any drop"


def _noise(pooled: Comparison) -> str:
    share = f"{pooled.flips:.2%}" if pooled.repeated else f"{pooled.flips:.2%} flips"
    return (
        f"A/A: two runs of one model differ in {pooled.lost + pooled.gained} of {pooled.n:,} items ({share}), "
        f"accuracy {_fell(pooled)}; this is the noise floor, not a verdict"
    )


def _fell(comparison: Comparison) -> str:
    low, high = comparison.interval
    verb = "fell by" if comparison.drop > 0 else "rose by" if comparison.drop < 0 else "stayed, a drop of"
    return f"{verb} {_pp(abs(comparison.drop))} [drop {100 * low:+.2f} to {100 * high:+.2f}]"


def _flipped(comparison: Comparison) -> str:
    p = f"p = {comparison.p_worse:.2g}"
    if comparison.repeated:
        return f"right less often in {comparison.lost} items, more often in {comparison.gained} (sign flips, {p})"
    return f"{comparison.lost} lost against {comparison.gained} gained (McNemar {p})"


def _pp(share: float) -> str:
    return f"{100 * share:.2f} pp".replace(".00 pp", " pp")


def _noise_warnings(pool: Sequence[Pairs], policy: Policy) -> Iterable[str]:
    if differs(pool) <= policy.alpha:
        yield "the two runs of one model differ by more than chance: find out what changed before gating anything"


def _warnings(pooled: Comparison, tasks: list[Comparison], policy: Policy) -> Iterable[str]:
    smallest = math.ceil(math.log(policy.alpha) / math.log1p(-pooled.margin))
    if pooled.n < smallest:
        yield (
            f"this gate can never pass: with a margin of {_pp(pooled.margin)} it takes {smallest:,} items even when "
            f"{'nothing changes' if pooled.repeated else 'none flips'}, and there are {pooled.n:,}"
        )
    elif pooled.power < policy.power and pooled.decision != "FAIL":
        noise = "the differences that were seen" if pooled.repeated else f"{pooled.flips:.1%} flips"
        needed = "no number of items gives" if pooled.needed is None else f"about {pooled.needed:,} items give"
        yield (
            f"at {noise}, {pooled.n:,} items pass a candidate without any drop with a chance of "
            f"{pooled.power:.0%}; {needed} the {policy.power:.0%} that the policy wants"
        )
    if pooled.decision == "PASS" and pooled.p_worse <= policy.alpha:
        yield f"inside the margin, but damage: {_flipped(pooled)}"
    for task in tasks:
        if len(tasks) > 1 and task.decision != "FAIL" and task.p_worse <= policy.alpha / len(tasks):
            yield f"{task.name}: {_flipped(task)}"
