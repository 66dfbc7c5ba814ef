"""Numbers and verdicts as people read them, the same in every kind of report."""

from __future__ import annotations

from k2quant.eval.drift.findings import Fidelity
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Comparison, Verdict
from k2quant.ground.units import counted
from k2quant.report.words import plain

TOOL = "k2quant eval gate"
"""Stands near the beginning of every report, so that the next run knows its own files."""

NOISE = "NOISE FLOOR, no verdict"
"""The headline of an A/A run."""

LEFT_OUT = "left out here; gate.json has all"


def headline(verdict: Verdict) -> str:
    """Return the verdict in capital letters."""
    return NOISE if verdict.same_model else verdict.decision


def outcome(verdict: Verdict, comparison: Comparison) -> str:
    """Return what the numbers of one row say; nothing in an A/A run, which decides nothing."""
    return "" if verdict.same_model else comparison.decision


def rows(verdict: Verdict) -> list[Comparison]:
    """Return the pool and the tasks."""
    return [verdict.pooled, *verdict.tasks]


def title(comparison: Comparison, verdict: Verdict) -> str:
    """Return the name of a row."""
    return "all together" if comparison is verdict.pooled else plain(comparison.name)


def percent(share: float) -> str:
    """Return a share: `84.7%`."""
    return f"{100 * share:.1f}%"


def signed(share: float) -> str:
    """Return a difference in percentage points without the unit: `+0.53`."""
    return f"{round(100 * share, 2) + 0.0:+.2f}"  # + 0.0, because there is no -0.00


def points(share: float) -> str:
    """Return a difference of shares: `+0.53 pp`."""
    return f"{signed(share)} pp"


def interval(low: float, high: float) -> str:
    """Return an interval of differences, in percentage points."""
    return f"[{signed(low)}, {signed(high)}]"


def drop(comparison: Comparison) -> str:
    """Return the drop, never without its interval: `+0.53 pp [-0.12, +1.18]`."""
    return f"{points(comparison.drop)} {interval(*comparison.interval)}"


def margin(share: float) -> str:
    """Return a margin: `1 pp`."""
    return f"{100 * share:g} pp"


def confidence(policy: Policy) -> str:
    """Return the level of the intervals: `90%`."""
    return f"{100 * (1 - 2 * policy.alpha):g}%"


def chance(probability: float) -> str:
    """Return a p-value: `0.031`, `< 0.0001`."""
    return "< 0.0001" if probability < 0.0001 else f"{probability:.2g}" if probability < 0.1 else f"{probability:.2f}"


def perplexity(value: float) -> str:
    """Return a perplexity, from `1.234` over `13,657` to `1.2e+09`."""
    return f"{value:,.0f}" if 1000 <= value < 1_000_000 else f"{value:.4g}"


def scored(fidelity: Fidelity) -> str:
    """Return what was predicted: `4,096 tokens`, or `1,531 tokens of completions`."""
    return f"{counted(fidelity.tokens, 'token')}{' of completions' if fidelity.completions else ''}"


def items(number: int) -> str:
    """Return so many items."""
    return counted(number, "item")


def needed(comparison: Comparison, policy: Policy) -> str:
    """Say how many items would give the policy's power."""
    if comparison.needed is None:
        return f"no number of items gives {policy.power:.0%}"
    return f"{comparison.needed:,} items give {policy.power:.0%}"


def decided_by(verdict: Verdict) -> str:
    """Say which test decides of all items together, and of tasks where it is another one."""
    pooled = verdict.pooled
    if not pooled.repeated:
        return pooled.method
    others = sorted({task.method for task in verdict.tasks} - {pooled.method})
    more = f"; {others[0]} for tasks that were asked once" if others else ""
    return f"{pooled.method}, {pooled.answers}{more}"


def flips_title(comparison: Comparison) -> str:
    """Return what items that changed are called: flips, or of several answers what they are."""
    return "Items that changed" if comparison.repeated else "Flips"


def worse(comparison: Comparison) -> str:
    """Return the name of the test that finds damage of any size."""
    return "sign-flip" if comparison.repeated else "McNemar"


def lost_and_gained(comparison: Comparison) -> str:
    """Say what lost and gained mean."""
    if comparison.repeated:
        return (
            "Lost: items that the baseline has right, or right more often. Gained: items that the candidate has right, "
            "or right more often."
        )
    return "Lost: only the baseline has it right. Gained: only the candidate has."


def short(digest: str | None) -> str:
    """Return the beginning of a hash, enough to tell two apart."""
    return plain(digest)[:12] if digest else "not recorded"
