"""What a gate decides, with all that the decision rests on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from k2quant.eval.gating.policy import Policy
from k2quant.ground.saying.showing import as_html, brief

Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]

EXIT_CODES: dict[Decision, int] = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
"""What `k2quant eval gate` ends with."""

SCHEMA = 1
"""Version of `Verdict.as_dict`; it grows when a reader of the older one would misread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Baseline against candidate on the same items: of one task, or of all together."""

    name: str
    """The task's name, or `all` for the pool."""
    n: int
    """Items that both answered."""
    base_right: int
    """Of them, the baseline has right."""
    candidate_right: int
    """Of them, the candidate has right."""
    lost: int
    """Items only the baseline has right (b)."""
    gained: int
    """Items only the candidate has right (c)."""
    margin: float
    """Largest drop in accuracy that is still good enough, 0 to 1."""
    interval: tuple[float, float]
    """Tango's score interval of the drop at 1 - 2 alpha: each end is right with 1 - alpha."""
    p_good: float
    """Exact p-value of "the drop is at least the margin": small shows that the candidate is good enough."""
    p_bad: float
    """Exact p-value of "the drop is at most the margin": small shows that it is not. In `tasks` adjusted by Holm."""
    p_worse: float
    """One-sided McNemar p-value of "no drop": a detector of damage, which no verdict rests on."""
    power: float
    """Chance of PASS for a candidate without any drop, at this n and the flip rate that was seen."""
    needed: int | None
    """Items that would give the policy's power at this flip rate; None where no number below ten million does."""
    decision: Decision
    """What the numbers say of these items alone."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def drop(self) -> float:
        """How much accuracy the candidate lost, 0 to 1; negative where it gained."""
        return (self.lost - self.gained) / self.n

    @property
    def flips(self) -> float:
        """Share of items that changed between right and wrong."""
        return (self.lost + self.gained) / self.n

    @property
    def base_accuracy(self) -> float:
        """Of the baseline, 0 to 1."""
        return self.base_right / self.n

    @property
    def candidate_accuracy(self) -> float:
        """Of the candidate, 0 to 1."""
        return self.candidate_right / self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """An item that one model has right and the other wrong."""

    task: str
    doc_id: int
    lost: bool
    """Whether the baseline has it right; else the candidate."""
    prompt: str
    target: str
    base_answer: str
    candidate_answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two runs, as a report names it."""

    folder: str
    model: str
    model_hash: str | None
    tokenizer_hash: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The gate's answer. `decision` is what a CI obeys, `reason` is one sentence for people."""

    decision: Decision
    reason: str
    warnings: tuple[str, ...]
    """What else should be known: flips that look like damage inside the margin, a policy that lacks power."""
    pooled: Comparison
    tasks: tuple[Comparison, ...]
    flips: tuple[Flip, ...]
    """All of them, lost ones first."""
    base: Side
    candidate: Side
    policy: Policy
    same_model: bool
    """Whether this was an A/A run: the same model twice, to measure noise; never a PASS."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        pooled = self.pooled
        shares = {"drop": f"{pooled.drop:.2%}", "items": pooled.n, "lost": pooled.lost, "gained": pooled.gained}
        models = {"base": self.base.model, "candidate": self.candidate.model}
        return {"decision": self.decision, "reason": self.reason, **shares, **models, "warnings": len(self.warnings)}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    @property
    def exit_code(self) -> int:
        """What the command ends with: 0, 3 or 4."""
        return EXIT_CODES[self.decision]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        comparisons = [self.pooled, *self.tasks]
        pooled, *tasks = [_with_shares(comparison) for comparison in comparisons]
        return {"schema": SCHEMA} | dataclasses.asdict(self) | {"pooled": pooled, "tasks": tasks}


def _with_shares(comparison: Comparison) -> dict[str, Any]:
    shares = {name: getattr(comparison, name) for name in ("drop", "flips", "base_accuracy", "candidate_accuracy")}
    return dataclasses.asdict(comparison) | shares
