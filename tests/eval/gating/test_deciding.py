"""What a gate makes of p-values that are given: decisions, Holm's rule, reason and warnings, to the last edge."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2quant.eval import gate
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Verdict
from k2quant.eval.runs.items import Item, Key, Run, Task

MODULE = importlib.import_module("k2quant.eval.gating.comparing")


@dataclass
class Found:
    """What the statistics say of so many items."""

    good: float = 0.5
    bad: float = 0.5
    worse: float = 0.5
    """Of losses; of gains it is 1."""
    power: float | None = 0.9
    """None: as much as the share of flips that it is asked for."""
    needed: int | None = 1000


def run(name: str, tasks: Mapping[str, tuple[int, int, int]], *, candidate: bool) -> Run:
    """Return a run of tasks, each with items, lost and gained."""
    made = {}
    for task, (n, lost, gained) in tasks.items():
        items = []
        for number in range(n):
            right = number >= lost if candidate else number < lost or number >= lost + gained
            key = Key(f"{number}", f"{number}", f"{number}")
            said: dict[str, Any] = {
                "prompt": "p",
                "target": "t",
                "answer": f"{right}",
                "output_digest": f"{name}{number}",
            }
            items.append(Item(key=key, doc_id=number, right=right, choices=None, hollow=False, **said))
        made[task] = Task(name=task, metric="acc", filter="none", items=tuple(items), settings={})
    groups = {"g": ("s", "t")}
    return Run(
        folder=Path(name),
        model=name,
        model_hash=("a" if name == "base" else "b") * 64,
        tokenizer_hash="t" * 64,
        settings={},
        tasks=made,
        groups=groups,
    )


Decide = Callable[..., Verdict]


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Decide:
    """Return what gates two runs with p-values that are given by the number of items."""

    def decided(
        tasks: Mapping[str, tuple[int, int, int]],
        found: Mapping[int, Found] | None = None,
        /,
        *,
        same_model: bool = False,
        **policy: Any,
    ) -> Verdict:
        by_n = dict(found or {})

        def of(n: int) -> Found:
            return by_n.get(n, Found())

        totals = {(lost, gained): n for n, lost, gained in tasks.values()}
        totals[sum(lost for _, lost, _ in tasks.values()), sum(gained for *_, gained in tasks.values())] = sum(
            n for n, _, _ in tasks.values()
        )
        fake = SimpleNamespace(
            p_good=lambda _lost, _gained, n, _margin: of(n).good,
            p_bad=lambda _lost, _gained, n, _margin: of(n).bad,
            p_worse=lambda lost, gained: of(totals[lost, gained]).worse if (lost, gained) in totals else 1.0,
            interval=lambda _lost, _gained, _n, _alpha: (-0.01, 0.02),
        )
        monkeypatch.setattr(MODULE, "paired", fake)
        powers = {n: one.power for n, one in by_n.items()}
        monkeypatch.setattr(
            MODULE,
            "chance_of_pass",
            lambda n, _margin, _alpha, flips: flips if powers.get(n, 0.9) is None else of(n).power,
        )
        pool = of(sum(n for n, _, _ in tasks.values()))
        monkeypatch.setattr(MODULE, "plan", lambda **_: SimpleNamespace(items=pool.needed))
        name = "base" if same_model else "candidate"
        base, candidate = run("base", tasks, candidate=False), run(name, tasks, candidate=True)
        return gate(base, candidate, policy=Policy(**policy), same_model=same_model)

    return decided


@pytest.mark.parametrize(
    ("good", "bad", "decision"),
    [
        (0.05, 0.5, "PASS"),
        (0.051, 0.5, "INCONCLUSIVE"),
        (0.5, 0.05, "FAIL"),
        (0.5, 0.051, "INCONCLUSIVE"),
        (0.01, 0.01, "FAIL"),
    ],
)
def test_alpha_decides(good: float, bad: float, decision: str, decide: Decide) -> None:
    """A p-value of alpha is small enough, on either side; damage that is shown counts for more."""
    verdict = decide({"t": (400, 5, 1)}, {400: Found(good=good, bad=bad)})
    assert (verdict.decision, verdict.pooled.decision, verdict.tasks[0].decision) == (decision,) * 3


def test_a_comparison_counts_what_both_models_have_right(decide: Decide) -> None:
    """Of 10 items the baseline has all but 2 gained ones, the candidate all but 3 lost ones; the pool is both tasks."""
    verdict = decide({"s": (10, 3, 2), "t": (20, 1, 0)})
    assert [(one.n, one.base_right, one.candidate_right, one.lost, one.gained) for one in verdict.tasks] == [
        (10, 8, 7, 3, 2),
        (20, 20, 19, 1, 0),
    ]
    pooled = verdict.pooled
    assert (pooled.name, pooled.n, pooled.base_right, pooled.candidate_right) == ("all", 30, 28, 26)
    assert (pooled.lost, pooled.gained, pooled.flips) == (4, 2, 0.2)


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ((0.01, 0.02, 0.04), (0.03, 0.04, 0.04)),
        ((0.04, 0.01, 0.02), (0.04, 0.03, 0.04)),
        ((0.01, 0.011, 0.5), (0.03, 0.03, 0.5)),
        ((0.5, 0.6, 0.7), (1.0, 1.0, 1.0)),
    ],
)
def test_holms_rule_is_worst_first(raw: tuple[float, ...], adjusted: tuple[float, ...], decide: Decide) -> None:
    """The smallest p-value counts three times, the next twice; none is below one before it, and none above 1."""
    sizes = (100, 200, 300)
    found = {n: Found(bad=bad) for n, bad in zip(sizes, raw, strict=True)}
    tasks = {f"t{n}": (n, 1, 0) for n in sizes}
    verdict = decide(tasks, found)
    assert [task.p_bad for task in verdict.tasks] == pytest.approx(adjusted)
    assert [task.decision == "FAIL" for task in verdict.tasks] == [bad <= 0.05 for bad in adjusted]
    assert verdict.decision == ("FAIL" if min(adjusted) <= 0.05 else "INCONCLUSIVE")


@pytest.mark.parametrize(
    ("failing", "ending"), [(1, "t0: fell by"), (3, "+2.00]"), (4, " and 1 more"), (5, " and 2 more")]
)
def test_three_failed_tasks_are_named_and_the_others_counted(failing: int, ending: str, decide: Decide) -> None:
    """Of four one is only counted, of three none."""
    tasks = {f"t{n}": (100 + n, 1, 0) for n in range(6)}
    found = {100 + n: Found(bad=1e-9 if n < failing else 1.0) for n in range(6)}
    verdict = decide(tasks, found)
    assert (verdict.decision, verdict.pooled.decision) == ("FAIL", "INCONCLUSIVE")
    assert verdict.reason.count(": fell by") == min(failing, 3)
    assert verdict.reason.endswith(ending) or (failing == 1 and ending in verdict.reason)
    assert (" more" in verdict.reason.removeprefix("more than")) == (failing > 3)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((400, 8, 2), "accuracy fell by 1.50 pp [drop -1.00 to +2.00]"),
        ((400, 2, 6), "accuracy rose by 1 pp [drop -1.00 to +2.00]"),
        ((400, 3, 3), "accuracy stayed, a drop of 0 pp [drop -1.00 to +2.00]"),
    ],
)
def test_the_reason_says_which_way_it_went(counts: tuple[int, int, int], words: str, decide: Decide) -> None:
    """Fell, rose or stayed, in points without a needless .00, with the interval."""
    assert words in decide({"t": counts}).reason


def test_the_reason_of_pass_and_fail_has_margin_confidence_and_p(decide: Decide) -> None:
    """As people read them; 1 - alpha is not rounded up."""
    passed = decide({"t": (4000, 2, 2)}, {4000: Found(good=0.0004)}, alpha=0.001, margin=0.015)
    assert passed.reason.endswith("the drop is below 1.50 pp with at least 99.9% confidence (p = 0.0004)")
    failed = decide({"t": (400, 9, 2)}, {400: Found(bad=0.012)}, margin=0.02)
    assert failed.reason.endswith("more than the margin of 2 pp (p = 0.012)")


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (None, "no number of items would do at so many flips"),
        (399, "they would mostly do"),
        (400, "they would mostly do"),
        (401, "about 401 items would do"),
    ],
)
def test_how_many_items_would_do(needed: int | None, words: str, decide: Decide) -> None:
    """More than there are are advised; as many as there are, or fewer, are no advice."""
    assert words in decide({"t": (400, 5, 1)}, {400: Found(needed=needed)}).reason


@pytest.mark.parametrize(("n", "never"), [(298, True), (299, False)])
def test_a_gate_that_can_never_pass_says_so(n: int, never: bool, decide: Decide) -> None:  # noqa: FBT001  a parameter of the test
    """0.99^299 is the first power below 5%."""
    warnings = decide({"t": (n, 0, 0)}, {n: Found(power=1.0)}).warnings
    assert any("never pass" in warning and "299 items" in warning for warning in warnings) == never


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(power=0.79), "about 1,000 items give the 80% that the policy wants"),
        (Found(power=0.79, needed=None), "no number of items gives the 80% that the policy wants"),
        (Found(power=0.8), None),
        (Found(power=0.1, bad=0.01), None),
    ],
)
def test_a_policy_that_lacks_power_is_told(found: Found, words: str | None, decide: Decide) -> None:
    """Below what it wants, and unless the candidate failed anyway."""
    warnings = [warning for warning in decide({"t": (400, 5, 1)}, {400: found}).warnings if "policy wants" in warning]
    assert len(warnings) == (words is not None)
    assert words is None or (words in warnings[0] and "at 1.5% flips, 400 items" in warnings[0])


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Found(good=0.01, worse=0.05), True),
        (Found(good=0.01, worse=0.06), False),
        (Found(good=0.5, worse=0.05), False),
    ],
)
def test_damage_inside_the_margin_is_told(found: Found, told: bool, decide: Decide) -> None:  # noqa: FBT001  a parameter of the test
    """Of a PASS, where McNemar's p is at most alpha."""
    warnings = decide({"t": (400, 5, 1)}, {400: found}).warnings
    assert any("inside the margin" in warning and "5 lost against 1 gained" in warning for warning in warnings) == told


@pytest.mark.parametrize(
    ("found", "told"),
    [(Found(worse=0.025), True), (Found(worse=0.026), False), (Found(worse=0.001, bad=1e-9), False)],
)
def test_damage_in_one_of_two_tasks_is_told(found: Found, told: bool, decide: Decide) -> None:  # noqa: FBT001  a parameter of the test
    """At half of alpha, for there are two; not where the task failed, which says more."""
    warnings = decide({"s": (400, 5, 1), "t": (500, 1, 1)}, {400: found}).warnings
    assert any(warning.startswith("s: 5 lost against 1 gained") for warning in warnings) == told
    alone = decide({"s": (400, 5, 1)}, {400: found}).warnings
    assert not any(warning.startswith("s: ") for warning in alone)


@pytest.mark.parametrize(("worse", "told"), [(0.025, True), (0.026, False)])
@pytest.mark.parametrize("counts", [(400, 5, 1), (400, 1, 5)])
def test_noise_that_is_no_chance_is_told(
    worse: float,
    told: bool,  # noqa: FBT001  a parameter of the test
    counts: tuple[int, int, int],
    decide: Decide,
) -> None:
    """Two-sided, so at twice the smaller p; and an A/A run has no other warning of the gate's own."""
    verdict = decide({"t": counts}, {400: Found(worse=worse, power=0.0)}, same_model=True)
    assert any("more than chance" in warning for warning in verdict.warnings) == told
    assert not any("policy wants" in warning for warning in verdict.warnings)
    assert verdict.decision == "INCONCLUSIVE"
    assert "differ in 6 of 400 items (1.50% flips)" in verdict.reason


def test_flips_are_listed_lost_ones_first_whatever_the_task(decide: Decide) -> None:
    """And within that in the order of the tasks."""
    flips = decide({"s": (10, 1, 1), "t": (10, 2, 1)}).flips
    assert [(flip.task, flip.lost) for flip in flips] == [
        *[("s", True), ("t", True), ("t", True)],
        *[("s", False), ("t", False)],
    ]


def test_a_group_gives_its_margin_to_tasks_that_have_none(decide: Decide) -> None:
    """A task that is named has its own, whichever comes first, even if that is none."""
    tasks = {"s": (10, 1, 0), "t": (10, 0, 1), "u": (10, 0, 0)}
    for named in ({"g": 0.1, "t": 0.2}, {"t": 0.2, "g": 0.1}):
        margins = {task.name: task.margin for task in decide(tasks, tasks=named).tasks}
        assert margins == {"s": 0.1, "t": 0.2}
    assert {task.margin for task in decide(tasks, tasks={"g": 0.1, "s": None}, margin=0.03).tasks} == {0.03, 0.1}


def test_power_is_that_of_the_share_of_flips_that_was_seen(decide: Decide) -> None:
    """Six of 400, lost and gained alike."""
    assert decide({"t": (400, 5, 1)}, {400: Found(power=None)}).pooled.power == 6 / 400


def test_two_models_are_compared_unless_something_else_is_said() -> None:
    """Without a word it is no A/A run, and 300 items without a flip pass at the usual policy."""
    verdict = gate(*(run(name, {"t": (300, 0, 0)}, candidate=name != "base") for name in ("base", "candidate")))
    assert (verdict.same_model, verdict.decision, verdict.policy) == (False, "PASS", Policy())


def test_sides_and_policy_are_what_was_compared(decide: Decide) -> None:
    """Folder, model and hashes of both, and the tasks that the policy's names stand for."""
    verdict = decide({"s": (10, 1, 0), "t": (10, 0, 1)}, tasks={"g": None})
    assert (verdict.base.folder, verdict.base.model, verdict.candidate.model) == ("base", "base", "candidate")
    assert (verdict.base.model_hash, verdict.candidate.model_hash) == ("a" * 64, "b" * 64)
    assert verdict.policy.tasks == {"s": None, "t": None}
    assert not verdict.same_model
