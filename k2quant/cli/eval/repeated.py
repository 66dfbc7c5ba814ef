"""`k2quant eval plan` of items that are asked several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from k2quant.cli.parts.terminal.tables import Column
from k2quant.errors import UsageError

if TYPE_CHECKING:
    from k2quant.eval.gating.pairing import Pairs
    from k2quant.eval.statistics.repeats_planning import RepeatsPlan

_SHOWN = (1, 2, 4, 8)
_ENDLESS = 1_000_000  # answers to each item: as many as it takes that only the items' own differences are left

COLUMNS = tuple(Column(head=head) for head in ("repeats", "items", "answers", "chance of PASS"))


def plans(
    rules: dict[str, float], flips: float | None, correlation: float | None, repeats: int | None
) -> list[RepeatsPlan]:
    """Return a plan for each usual number of repeats, and for the one that is asked for.

    Raises:
        UsageError: a number is missing that nothing else tells, or one is given that these plans do not know.
    """
    if rules["drop"]:
        raise UsageError("--drop: a plan with repeats is for a candidate without any drop; leave it out")
    if flips is None:
        raise UsageError("with --repeats or --correlation the share of flips must be known: --flips, or --pilot")
    if correlation is None:
        raise UsageError(
            "how alike are repeats of one item? Give --correlation, from 0 (as different items are) to 1 (each repeat "
            "the same; then they win nothing), or a --pilot that asked every item several times"
        )
    return [_plan(rules, flips, correlation, each) for each in sorted({*_SHOWN, repeats or 1})]


def _plan(rules: dict[str, float], flips: float, correlation: float, repeats: int) -> RepeatsPlan:
    from k2quant.eval.statistics.repeats_planning import plan_repeats

    kept = {name: rules[name] for name in ("margin", "alpha", "power")}
    return plan_repeats(**kept, flips=flips, correlation=correlation, repeats=repeats)


def measured(pairs: Sequence[Pairs]) -> dict[str, float | None]:
    """Return the share of single answers that flip between two runs, and how alike the repeats of an item are.

    A task that was asked once, as those by log-likelihood are whatever repeats say, has the same answers again.
    """
    from k2quant.eval.statistics.repeats_planning import Measured, pooled
    from k2quant.eval.statistics.repeats_planning import measured as of_counts

    tasks = []
    for each in pairs:
        found = of_counts(each.base_right, each.ours.repeats, each.candidate_right, each.theirs.repeats)
        tasks.append((Measured(found.flips, 1.0) if each.unit == 1 else found, each.items))
    together = pooled(tasks)
    return {"flips": together.flips, "correlation": together.correlation}


def pilot(found: dict[str, Any]) -> list[str]:
    """Say what a pilot with repeats showed."""
    counts = f"{found['n']:,} items, of which {found['lost']:,} came out worse and {found['gained']:,} better"
    alike = "" if found["correlation"] is None else f"; an item's repeats correlate by {found['correlation']:.2g}"
    return [f"The pilot: {counts}; {found['flips']:.2%} of single answers flipped{alike}."]


def row(plan: RepeatsPlan) -> tuple[str, ...]:
    """Return a line of the table."""
    from k2quant.eval.statistics.planning import MOST

    if plan.items is None:
        return str(plan.repeats), f"over {MOST:,}", "", ""
    return str(plan.repeats), f"{plan.items:,}", f"{plan.answers:,}", f"{plan.reached:.1%}"


def remarks(plans: list[RepeatsPlan]) -> list[str]:
    """Say what repeats can do, and what they cannot."""
    first = plans[0]
    rules = {"margin": first.margin, "alpha": first.alpha, "power": first.power, "drop": 0.0}
    endless = _plan(rules, first.flips, first.correlation, _ENDLESS)
    least = "no number of items would do" if endless.items is None else f"it takes {endless.items:,} items"
    spread = (
        f"{first.flips:.2%} of single answers flip; the difference on an item in one repeat correlates with that in "
        f"another by {first.correlation:.2g}."
    )
    limit = (
        f"Repeats take away the noise of answers, not that of items: with endless repeats {least}. More items win more "
        "than as many answers to the same ones."
    )
    return ["", spread, limit, "Answers are those of each model; where any item was asked twice, items are clusters."]
