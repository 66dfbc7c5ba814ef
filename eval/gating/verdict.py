"""What a gate decides, with all that the decision rests on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from k2quant.eval.gating.flips import Flip
from k2quant.eval.gating.policy import Policy
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import counted

Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]

EXIT_CODES: dict[Decision, int] = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
"""What `k2quant eval gate` ends with."""

EXACT = "exact paired test"
"""Where each item was asked once: see `k2quant.eval.statistics.paired`."""

REPEATED = "Gaffke's bound over items"
"""Where an item was asked several times, its answers being one cluster: see `k2quant.eval.statistics.repeats`."""

SCHEMA = 1
"""Version of `Verdict.as_dict`; it grows when a reader of the older one would misread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Baseline against candidate on the same items: of one task, or of all together."""

    name: str
    """The task's name, or `all` for the pool."""
    n: int
    """Items that both answered."""
    base_answers: int
    """The baseline's answers to them: as many, or more where items were asked several times."""
    candidate_answers: int
    """The candidate's."""
    base_right: float
    """Of the items, the baseline has right; one asked several times counts by its share of right answers."""
    candidate_right: float
    """Of the items, the candidate has right."""
    repeats: tuple[int, int] | None
    """Answers of baseline and candidate to each item; None for a pool of tasks that were asked differently often."""
    lost: int
    """Items only the baseline has right (b), or of several answers a larger share."""
    gained: int
    """Items only the candidate has right (c), or of several answers a larger share."""
    margin: float
    """Largest drop in accuracy that is still good enough, 0 to 1."""
    interval: tuple[float, float]
    """Of the drop, at 1 - 2 alpha: each end is right with 1 - alpha. Tango's score interval, or that of the repeats."""
    p_good: float
    """p-value of "the drop is at least the margin": small shows that the candidate is good enough."""
    p_bad: float
    """p-value of "the drop is at most the margin": small shows that it is not. In `tasks` adjusted by Holm."""
    p_worse: float
    """One-sided p-value of "no drop", McNemar's or that of the repeats: a detector of damage, which no verdict rests
    on."""
    power: float
    """Chance of PASS for a candidate without any drop, at this n and the flip rate that was seen."""
    needed: int | None
    """Items that would give the policy's power at this flip rate; None where no number below ten million does."""
    decision: Decision
    """What the numbers say of these items alone."""
    spread: tuple[float, float] | None = None
    """What a plan knows of items asked several times: how many change in their share of right answers, 0 to 1, and by
    how much; None where each was asked once, so that `flips` change by 1."""
    base_cut: int | None = None
    """The baseline's answers that never left their reasoning and so are wrong, in tasks where anybody looked; None if
    nobody did."""
    candidate_cut: int | None = None
    """The candidate's."""
    base_truncated: int | None = None
    """The baseline's answers that ended only because they were as long as allowed, where known; None if nowhere."""
    candidate_truncated: int | None = None
    """The candidate's."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def drop(self) -> float:
        """How much accuracy the candidate lost, 0 to 1; negative where it gained."""
        return (self.base_right - self.candidate_right) / self.n

    @property
    def repeated(self) -> bool:
        """Whether any item was asked more than once."""
        return max(self.base_answers, self.candidate_answers) > self.n

    @property
    def method(self) -> str:
        """The test that decides."""
        return REPEATED if self.repeated else EXACT

    @property
    def answers(self) -> str:
        """How often the items were asked, in words; nothing where each was asked once."""
        if not self.repeated:
            return ""
        if self.repeats is None:
            return "as many answers to each as its task has"
        base, candidate = (f"{counted(repeats, 'answer')} each" for repeats in self.repeats)
        return base if base == candidate else f"{base} (baseline) and {candidate} (candidate)"

    @property
    def cut_in_thought(self) -> str:
        """How many answers of each side never left their reasoning, in words; nothing where nobody looked."""
        return self._sides("cut in thought", self.base_cut, self.candidate_cut)

    @property
    def ended_early(self) -> tuple[str, ...]:
        """What is known of answers that ended too early, a sentence each."""
        limit = self._sides("ended at the limit on new tokens", self.base_truncated, self.candidate_truncated)
        return tuple(filter(None, (self.cut_in_thought, limit)))

    def _sides(self, what: str, base: int | None, candidate: int | None) -> str:
        if base is None and candidate is None:
            return ""
        one, other = (
            "not known" if count is None else f"{count:,} of {answers:,}"
            for count, answers in ((base, self.base_answers), (candidate, self.candidate_answers))
        )
        return f"{what}: {one} (baseline), {other} (candidate)"

    @property
    def flips(self) -> float:
        """Share of items that changed between right and wrong, or in their share of right answers."""
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
    flips: Sequence[Flip]
    """All of them, lost ones first, of those the largest change first; read from the runs when they are asked for."""
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
        """Return everything as JSON holds it.

        Raises:
            MalformedResults: a run is no longer what was read.
        """
        return self._without_flips() | {"flips": [dataclasses.asdict(flip) for flip in self.flips]}

    def as_json(
        self,
        first: Mapping[str, Any] | None = None,
        last: Mapping[str, Any] | None = None,
        *,
        ensure_ascii: bool = True,
    ) -> Iterator[str]:
        """Yield what `as_dict` returns as text, flip by flip: many of them need no memory.

        Args:
            first: what stands before it.
            last: what stands after it, and before the flips.
            ensure_ascii: whether other letters are escaped, for a screen that may not have them.

        Raises:
            MalformedResults: a run is no longer what was read.
        """

        def text(value: Any, indent: int | None = None) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, indent=indent)

        head = text({**(first or {}), **self._without_flips(), **(last or {})}, 1)
        yield f'{head.removesuffix("}").rstrip()},\n "flips": ['
        for place, flip in enumerate(self.flips):
            yield f"{',' if place else ''}\n  {text(dataclasses.asdict(flip))}"
        yield "\n ]\n}\n"

    def _without_flips(self) -> dict[str, Any]:
        sides = {"base": dataclasses.asdict(self.base), "candidate": dataclasses.asdict(self.candidate)}
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("decision", "reason", "warnings")},
            "pooled": _with_shares(self.pooled),
            "tasks": [_with_shares(task) for task in self.tasks],
            **sides,
            "policy": dataclasses.asdict(self.policy),
            "same_model": self.same_model,
        }


def _with_shares(comparison: Comparison) -> dict[str, Any]:
    shares = ("drop", "flips", "base_accuracy", "candidate_accuracy", "method")
    return dataclasses.asdict(comparison) | {name: getattr(comparison, name) for name in shares}
