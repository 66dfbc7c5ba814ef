"""Pairing: which items of two runs are the same, which runs may not be compared, and what a verdict says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2quant.errors import HarnessFault, Incomparable, UsageError
from k2quant.eval.gating.flips import flips_of
from k2quant.eval.gating.pairing import Pairs, check_outputs, pair
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import EXIT_CODES, Comparison, Decision, Side, Verdict
from k2quant.eval.runs.items import Item, Key, Run, Task


def item(number: int, *, right: bool = True, prompt: str = "p", **changes: Any) -> Item:
    """Return an item: document `number`, answered."""
    known: dict[str, Any] = {
        "key": Key(f"doc{number}", f"{prompt}{number}", f"target{number}"),
        "doc_id": number,
        "right": right,
        "prompt": f"{prompt} {number}",
        "target": "yes",
        "answer": "yes" if right else "no",
        "output_digest": f"{number} {right}",
        "choices": None,
        "hollow": False,
    }
    return Item(**known | changes)


def task(*items: Item, name: str = "t", **changes: Any) -> Task:
    """Return a task of items."""
    known: dict[str, Any] = {"name": name, "metric": "acc", "filter": "none", "items": items, "settings": {"shots": 5}}
    return Task(**known | changes)


def run(*tasks: Task, name: str = "base", tokenizer: str | None = "t" * 64) -> Run:
    """Return a run of tasks."""
    return Run(
        folder=Path(name),
        model=name,
        model_hash=None,
        tokenizer_hash=tokenizer,
        settings={},
        tasks={each.name: each for each in tasks},
    )


RIGHTS = ((True, True), (True, False), (True, False), (False, True), (False, False))
"""Both right, lost twice, gained, both wrong."""


def both(name: str = "t") -> tuple[Task, Task]:
    """Return a task as two models answered it."""
    base, candidate = ([item(n, right=kind[side]) for n, kind in enumerate(RIGHTS)] for side in (0, 1))
    return task(*base, name=name), task(*candidate, name=name)


def outcome(pairs: Pairs) -> tuple[int, int]:
    """Return how many items were lost and gained."""
    changes = pairs.changes().tolist()
    return sum(change < 0 for change in changes), sum(change > 0 for change in changes)


def test_lost_is_what_only_the_baseline_has_right() -> None:
    """Two lost, one gained; what both have right or wrong is neither, and every flip says which way it went."""
    base, candidate = both()
    (pairs,) = pair(run(base), run(candidate))
    assert (pairs.task, *outcome(pairs)) == ("t", 2, 1)
    flips = flips_of([pairs])
    assert [(flip.doc_id, flip.lost, flip.base_answer, flip.candidate_answer) for flip in flips] == [
        (1, True, "yes", "no"),
        (2, True, "yes", "no"),
        (3, False, "no", "yes"),
    ]
    first = flips[0]
    assert (first.task, first.prompt, first.target) == ("t", "p 1", "yes")


def test_items_are_paired_by_document_and_words_not_by_place() -> None:
    """The candidate's items come in another order; each stands beside its own."""
    base, candidate = both()
    turned = replace(candidate, items=candidate.items[::-1])
    (pairs,) = pair(run(base), run(turned))
    assert [pairs.candidate.items[place].doc_id for place in pairs.places] == list(range(5))
    assert outcome(pairs) == (2, 1)
    assert [flip.doc_id for flip in flips_of([pairs])] == [1, 2, 3]


def test_a_document_that_stands_twice_is_paired_by_its_order() -> None:
    """The first with the first and the second with the second, though their keys are equal."""
    twice = Key("doc", "prompt", "target")
    base = task(item(0, key=twice), item(1, right=False, key=twice))
    (pairs,) = pair(run(base), run(base))
    assert pairs.items == 2
    assert (*outcome(pairs), pairs.identical) == (0, 0, True)
    with pytest.raises(Incomparable, match=r"other items.*the 2 of the baseline.*found 1"):
        pair(run(base), run(replace(base, items=base.items[:1])))


def test_outputs_are_identical_where_all_of_them_are() -> None:
    """One digest that differs is enough to tell two models apart."""
    base, candidate = both()
    assert pair(run(base), run(base))[0].identical
    assert not pair(run(base), run(candidate))[0].identical


@pytest.mark.parametrize("tokenizers", [("a" * 64, "a" * 64), (None, "a" * 64), ("a" * 64, None), (None, None)])
def test_tokenizers_that_are_equal_or_unknown_are_compared(tokenizers: tuple[str | None, str | None]) -> None:
    """What nobody recorded refuses nothing."""
    base, candidate = both()
    assert pair(run(base, tokenizer=tokenizers[0]), run(candidate, tokenizer=tokenizers[1]))


def test_two_tokenizers_are_not_compared() -> None:
    """Other tokens are another task."""
    base, candidate = both()
    with pytest.raises(Incomparable, match=r"different tokenizers.*aaaaaaaaaaaa\b.*bbbbbbbbbbbb\b"):
        pair(run(base, tokenizer="a" * 64), run(candidate, tokenizer="b" * 64))


def test_tasks_are_those_that_are_named_once_each_and_in_their_order() -> None:
    """Without names all of them; a name that stands twice is one task."""
    sides = list(zip(both("s"), both("t"), both("u"), strict=True))
    base, candidate = (run(*tasks) for tasks in sides)
    assert [pairs.task for pairs in pair(base, candidate)] == ["s", "t", "u"]
    assert [pairs.task for pairs in pair(base, candidate, ["u", "s", "u"])] == ["u", "s"]


def test_tasks_that_only_one_run_has_must_be_left_out_by_name() -> None:
    """Unnamed they are refused, whichever has more; those that both have can be named."""
    one, other = run(both("s")[0], both("t")[0]), run(both("t")[1], name="candidate")
    for base, candidate in ((one, other), (other, one)):
        with pytest.raises(Incomparable, match="only in one of them: s"):
            pair(base, candidate)
        assert [pairs.task for pairs in pair(base, candidate, ["t"])] == ["t"]
    with pytest.raises(Incomparable, match=r"lacks tasks of the baseline.*found s"):
        pair(one, other, ["s", "t"])
    with pytest.raises(UsageError, match="base has no task x; it has s, t"):
        pair(one, other, ["t", "x"])


def test_five_names_of_those_that_are_absent_are_shown() -> None:
    """A message is a line, however many are missing."""
    names = [f"x{number}" for number in range(6)]
    base, candidate = both()
    with pytest.raises(UsageError, match="has no task x0, x1, x2, x3, x4; it has t"):
        pair(run(base), run(candidate), names)
    with pytest.raises(Incomparable, match=r"found x0, x1, x2, x3, x4$"):
        pair(run(base, *(both(name)[0] for name in names)), run(candidate), ["t", *names])


def test_documents_that_stand_twice_in_one_run_each_are_other_items() -> None:
    """The same documents and as many items, but one run has the first twice and the other the second."""
    first, second = (Key(f"doc{n}", "prompt", "target") for n in (1, 2))
    base = task(item(0, key=first), item(1, key=first), item(2, key=second))
    candidate = task(item(0, key=first), item(1, key=second), item(2, key=second))
    with pytest.raises(Incomparable, match="0 of 2 prompts or targets differ, the first of document 0"):
        pair(run(base), run(candidate))


@pytest.mark.parametrize(("change", "what"), [({"metric": "f1"}, "metric"), ({"filter": "strict"}, "filter")])
def test_another_metric_or_filter_is_another_score(change: dict[str, Any], what: str) -> None:
    """The same answers, scored otherwise, are not compared."""
    base, candidate = both()
    with pytest.raises(Incomparable, match=f"scored by another {what}"):
        pair(run(base), run(replace(candidate, **change)))


def test_other_settings_are_named() -> None:
    """The first that differs, in the order of the alphabet, with both values; a setting that is not there too."""
    base, candidate = (replace(each, settings={"a": 1, "b": None, "c": 3}) for each in both())
    with pytest.raises(Incomparable, match=r"other settings.*expected c 3, found c 4"):
        pair(run(base), run(replace(candidate, settings={"a": 1, "b": None, "c": 4})))
    with pytest.raises(Incomparable, match=r"another tool.*expected b None, found no b"):
        pair(run(base), run(replace(candidate, settings={"a": 1, "c": 4})))
    with pytest.raises(Incomparable, match=r"another tool.*expected no d, found d 4"):
        pair(run(base), run(replace(candidate, settings={**base.settings, "d": 4})))


def test_a_marker_of_one_side_alone_is_another_setting() -> None:
    """`--think-end ''` for one run is no work of another tool."""
    base, candidate = (replace(each, settings={"a": 1}) for each in both())
    marked = replace(base, settings={"a": 1, "think_end": "</think>"})
    for one, other, said in ((marked, candidate, "found no"), (candidate, marked, "expected no")):
        with pytest.raises(Incomparable, match=f"run with other settings.*{said} think_end.*same tasks"):
            pair(run(one), run(other))


def test_other_items_and_other_words_are_told_apart() -> None:
    """Documents that differ are other items; the same documents with other prompts are other words."""
    base, candidate = both()
    fewer = replace(candidate, items=candidate.items[1:])
    with pytest.raises(Incomparable, match=r"other items.*the 5 of the baseline.*found 4, 4 in common"):
        pair(run(base), run(fewer))
    other = replace(candidate, items=(*candidate.items[1:], item(9)))
    with pytest.raises(Incomparable, match=r"other items.*found 5, 4 in common"):
        pair(run(base), run(other))
    words = replace(candidate, items=(*candidate.items[:3], item(3, prompt="q"), item(4, prompt="q")))
    with pytest.raises(
        Incomparable, match=r"in other words.*2 of 5 prompts or targets differ, the first of document 3"
    ):
        pair(run(base), run(words))


@pytest.mark.parametrize(("hollow", "refused"), [(0, False), (2, False), (3, True), (4, True)])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_a_task_of_which_more_than_half_says_nothing_is_a_fault_of_the_harness(
    hollow: int,
    refused: bool,  # noqa: FBT001  a parameter of the test
    side: str,
) -> None:
    """Two of four hollow outputs may be the model's; three of four are not, on whichever side."""
    full, empty = (task(*(item(n, hollow=n < count) for n in range(4))) for count in (0, hollow))
    tasks = (empty, full) if side == "baseline" else (full, empty)
    pairs = pair(run(tasks[0]), run(tasks[1]))
    if not refused:
        check_outputs(pairs)
        return
    with pytest.raises(HarnessFault, match=rf"the {side}'s outputs of t say nothing.*{hollow} of 4"):
        check_outputs(pairs)


def comparison(**changes: Any) -> Comparison:
    """Return what 5 items of a task came to."""
    known: dict[str, Any] = {
        "name": "t",
        "n": 5,
        "base_answers": 5,
        "candidate_answers": 5,
        "repeats": (1, 1),
        "base_right": 3,
        "candidate_right": 2,
        "lost": 2,
        "gained": 1,
        "margin": 0.01,
        "interval": (0.0, 0.5),
        "p_good": 0.5,
        "p_bad": 0.5,
        "p_worse": 0.5,
        "power": 0.1,
        "needed": None,
        "decision": "PASS",
    }
    return Comparison(**known | changes)


def test_shares_are_those_of_all_items() -> None:
    """One more lost than gained of five is a drop of a fifth; three of five flipped."""
    found = comparison()
    assert (found.drop, found.flips, found.base_accuracy, found.candidate_accuracy) == (0.2, 0.6, 0.6, 0.4)
    assert comparison(base_right=2, candidate_right=3).drop == -0.2


@pytest.mark.parametrize(("decision", "code"), [("PASS", 0), ("FAIL", 3), ("INCONCLUSIVE", 4)])
def test_a_verdict_says_all_that_it_rests_on(decision: Decision, code: int) -> None:
    """Its exit code is the decision's; as data it has the shares of the pool and of every task, and a version."""
    side = Side(folder="f", model="m", model_hash=None, tokenizer_hash=None)
    verdict = Verdict(
        decision=decision,
        reason="why",
        warnings=(),
        pooled=comparison(name="all"),
        tasks=(comparison(), comparison(name="u", base_right=2, candidate_right=3)),
        flips=(),
        base=side,
        candidate=side,
        policy=Policy(),
        same_model=False,
    )
    assert verdict.exit_code == EXIT_CODES[decision] == code
    found = verdict.as_dict()
    assert (found["schema"], found["decision"], found["same_model"]) == (1, decision, False)
    assert [part["name"] for part in (found["pooled"], *found["tasks"])] == ["all", "t", "u"]
    assert [part["drop"] for part in (found["pooled"], *found["tasks"])] == [0.2, 0.2, -0.2]
    assert {"flips", "base_accuracy", "candidate_accuracy"} <= found["pooled"].keys()
