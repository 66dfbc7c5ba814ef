"""Items that were asked several times, and answers cut in thought: what the gate counts, decides and warns of."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.cli import main
from k2quant.eval import gate
from k2quant.eval.gating.verdict import EXACT, REPEATED, Verdict
from k2quant.eval.runs.items import Item, Key, Run, Task
from k2quant.eval.statistics import paired, repeats

pytestmark = pytest.mark.usefixtures("by_score")

Answers = Sequence[Sequence[bool]]
"""Of each item, which of its answers are right."""


def task(name: str, answers: Answers, cut: Mapping[int, int] | None = None, **changes: Any) -> Task:
    """Return a task; of the items in `cut` so many answers, the last ones, are cut in thought."""
    items = [
        Item(
            key=Key(f"doc{number}", "prompt", "target"),
            doc_id=number,
            right=right and repeat < len(item) - (cut or {}).get(number, 0),
            prompt=f"ask {number}",
            target="yes",
            answer=f"{'yes' if right else 'no'} {repeat}",
            output_digest=f"{number} {repeat} {right}",
            choices=None,
            hollow=False,
            repeat=repeat,
            cut_in_thought=None if cut is None else repeat >= len(item) - cut.get(number, 0),
        )
        for number, item in enumerate(answers)
        for repeat, right in enumerate(item)
    ]
    return replace(Task(name=name, metric="acc", filter="none", items=tuple(items), settings={}), **changes)


def run(name: str, *tasks: Task) -> Run:
    """Return a run of tasks."""
    return Run(
        folder=Path(name),
        model=name,
        model_hash=name[:1] * 64,
        tokenizer_hash="t" * 64,
        settings={},
        tasks={each.name: each for each in tasks},
    )


def gated(base: Task | Sequence[Task], candidate: Task | Sequence[Task], **changes: Any) -> Verdict:
    """Gate two runs of these tasks."""
    sides = [[side] if isinstance(side, Task) else side for side in (base, candidate)]
    return gate(run("base", *sides[0]), run("candidate", *sides[1]), **changes)


def of(*counts: int, asked: int = 4) -> list[list[bool]]:
    """Return answers of which so many are right, item by item."""
    return [[place < count for place in range(asked)] for count in counts]


GOOD = [4] * 300


def test_an_item_counts_by_its_share_of_right_answers() -> None:
    """3 of 4 instead of 1 of 4 is half an item gained; shares make accuracy and drop, items lost and gained."""
    verdict = gated(task("t", of(*GOOD, 4, 1, 2, 0)), task("t", of(*GOOD, 1, 3, 2, 0)))
    pooled = verdict.pooled
    assert (pooled.n, pooled.base_answers, pooled.repeats) == (304, 1216, (4, 4))
    assert (pooled.base_right, pooled.candidate_right) == (301.75, 301.5)
    assert (pooled.lost, pooled.gained, pooled.drop) == (1, 1, 0.25 / 304)
    assert (pooled.method, pooled.answers, verdict.as_dict()["pooled"]["method"]) == (
        REPEATED,
        "4 answers each",
        REPEATED,
    )


def test_the_tests_are_those_of_repeats(by_score: pytest.MonkeyPatch) -> None:
    """Of the differences in quarters, with the policy's alpha, margin and power."""
    by_score.undo()
    verdict = gated(task("t", of(*GOOD, 4, 1, 2)), task("t", of(*GOOD, 1, 3, 2)))
    values, counts = np.array([-3, 0, 2]), np.array([1, 301, 1])
    pooled = verdict.pooled
    assert pooled.p_good == repeats.p_good(values, counts, 4, 0.01)
    assert pooled.p_bad == repeats.p_bad(values, counts, 4, 0.01)
    assert pooled.p_worse == repeats.p_worse(values, counts)
    assert pooled.interval == repeats.interval(values, counts, 4, 0.05)
    assert pooled.power == repeats.chance_of_pass(values, counts, 4, 0.01, 0.05)
    assert pooled.needed == repeats.needed(values, counts, 4, 0.01, 0.05, 0.8)
    assert verdict.decision == ("PASS" if pooled.p_good <= 0.05 else "INCONCLUSIVE")


@settings(deadline=None, max_examples=4)  # each plans a run, which takes a while
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_one_answer_an_item_is_the_exact_paired_test(answers: list[tuple[bool, bool]]) -> None:
    """Bit for bit, however it came out."""
    sides = [task("t", [*of(*[1] * 60, asked=1), *([pair[side]] for pair in answers)]) for side in (0, 1)]
    pooled = gated(*sides).pooled
    n, lost, gained = (
        60 + len(answers),
        *(sum(pair == kind for pair in answers) for kind in ((True, False), (False, True))),
    )
    assert (pooled.method, pooled.repeats, pooled.spread, pooled.answers) == (EXACT, (1, 1), None, "")
    assert (pooled.lost, pooled.gained) == (lost, gained)
    assert (pooled.p_good, pooled.p_bad) == (paired.p_good(lost, gained, n, 0.01), paired.p_bad(lost, gained, n, 0.01))
    assert (pooled.p_worse, pooled.interval) == (paired.p_worse(lost, gained), paired.interval(lost, gained, n, 0.05))


@settings(deadline=None, max_examples=5)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=10), st.integers(0, 99))
def test_neither_the_order_of_items_nor_that_of_answers_counts(counts: list[tuple[int, int]], seed: int) -> None:
    """Items are the clusters: their shares alone decide."""
    shuffled = random.Random(seed)  # noqa: S311  an order for a test
    both = [*[(4, 4)] * 100, *counts]
    mixed = shuffled.sample(both, len(both))
    sides = [of(*(pair[side] for pair in both)) for side in (0, 1)]
    other = [[shuffled.sample(item, 4) for item in of(*(pair[side] for pair in mixed))] for side in (0, 1)]
    one, two = (gated(*(task("t", side) for side in each)).pooled for each in (sides, other))
    assert one == two


def test_both_sides_may_be_asked_differently_often() -> None:
    """What is compared are shares: 1 of 2 against 2 of 4 is no change, 2 of 2 against 3 of 4 is a quarter lost."""
    verdict = gated(task("t", of(*[2] * 300, 1, 2, asked=2)), task("t", of(*GOOD, 2, 3)), same_model=False)
    pooled = verdict.pooled
    assert (pooled.repeats, pooled.lost, pooled.gained) == ((2, 4), 1, 0)
    assert pooled.drop == pytest.approx(0.25 / 302)
    assert pooled.answers == "2 answers each (baseline) and 4 answers each (candidate)"
    assert [
        (flip.base_right, flip.base_asked, flip.candidate_right, flip.candidate_asked) for flip in verdict.flips
    ] == [(2, 2, 3, 4)]


def test_tasks_asked_once_and_several_times_are_pooled_by_items() -> None:
    """The pool has the test of repeats, each task its own; an item is an item, however often it was asked."""
    once = [task("once", of(*[1] * 200, *right, asked=1)) for right in ([1, 1], [0, 1])]
    often = [task("often", of(*[4] * 200, *right)) for right in ([4, 4], [3, 4])]
    verdict = gated((once[0], often[0]), (once[1], often[1]))
    assert [one.method for one in verdict.tasks] == [EXACT, REPEATED]
    pooled = verdict.pooled
    assert (pooled.method, pooled.repeats, pooled.n, pooled.base_answers) == (REPEATED, None, 404, 202 + 808)
    assert pooled.drop == 1.25 / 404
    assert pooled.p_good == repeats.p_good(np.array([-4, -1, 0]), np.array([1, 1, 402]), 4, 0.01)
    assert pooled.answers == "as many answers to each as its task has"


def test_flips_are_items_whose_share_changed_the_largest_change_first() -> None:
    """Lost ones first; shown are a right and a wrong answer, though others may be the other way round."""
    verdict = gated(task("t", of(*GOOD, 2, 4, 1, 3)), task("t", of(*GOOD, 1, 1, 3, 3)))
    found = [
        (flip.doc_id, flip.lost, flip.base_right, flip.candidate_right, flip.base_answer, flip.candidate_answer)
        for flip in verdict.flips
    ]
    assert found == [
        (301, True, 4, 1, "yes 0", "no 1"),
        (300, True, 2, 1, "yes 0", "no 1"),
        (302, False, 1, 3, "no 1", "yes 0"),
    ]
    assert [flip.doc_id for flip in verdict.flips[1:]] == [300, 302]


def test_a_verdict_as_text_is_the_verdict_as_data() -> None:
    """Flip by flip, with what stands before and after; without flips too."""
    for candidate in (of(*GOOD, 1, 4), of(*GOOD, 4, 1)):
        verdict = gated(task("t", of(*GOOD, 4, 1)), task("t", candidate))
        text = "".join(verdict.as_json({"tool": "x"}, {"blame": None}))
        assert text.startswith('{\n "tool": "x"')
        assert json.loads(text) == json.loads(json.dumps({"tool": "x", **verdict.as_dict(), "blame": None}))


def test_what_repeats_are_called() -> None:
    """No word of flips between right and wrong, and none of McNemar, where items were asked several times."""
    lossy = gated(task("t", of(*GOOD, *[4] * 30)), task("t", of(*GOOD, *[2] * 30)))
    assert "flips" not in " ".join((lossy.reason, *lossy.warnings))
    damaged = gated(task("t", of(*[4] * 3000, *[4] * 30)), task("t", of(*[4] * 3000, *[3] * 30)))
    assert damaged.decision == "PASS"
    assert any("right less often in 30 items, more often in 0 (sign flips" in said for said in damaged.warnings)


def test_noise_of_one_model_that_draws_its_answers() -> None:
    """Two runs of one model at a temperature: items differ by chance, which is no warning; all one way is one."""
    base = run("a", task("t", of(*GOOD, *[3, 1] * 20)))
    for counts, told in (([1, 3] * 20, False), ([1, 0] * 20, True)):
        verdict = gate(base, replace(run("a", task("t", of(*GOOD, *counts))), folder=Path("b")), same_model=True)
        assert any("more than chance" in said for said in verdict.warnings) == told
        assert "differ in 40 of 340 items" in verdict.reason


def parts(answers: Answers, cut: Mapping[int, int]) -> list[Task]:
    """Return a task and two that look at its answers again, as `eval tools` writes them."""
    whole, *others = (task(name, answers, cut) for name in ("tools", "tools_call", "tools_name"))
    return [whole, *(replace(other, settings={"part_of": "tools"}) for other in others)]


def test_answers_that_several_tasks_look_at_are_doubted_once() -> None:
    """Three answers more cut in thought, or three that changed, are chance (p = .25); nine, of three tasks, are not."""
    base, candidate = parts(of(*[1] * 300, asked=1), {}), parts(of(*[1] * 300, asked=1), {0: 1, 1: 1, 2: 1})
    assert not any("more than chance" in said for said in gated(base, candidate).warnings)
    again = replace(run("b", *candidate), model_hash="b" * 64)
    noise = gate(replace(again, tasks=run("b", *base).tasks, folder=Path("c")), again, same_model=True)
    assert not any("more than chance" in said for said in noise.warnings)


def written(folder: Path, answers: Answers, cut: int) -> Path:
    """Write a run as `k2quant eval run` does; the last answers of so many items are cut in thought."""
    rows = [
        {
            "doc_id": number,
            "target": "yes",
            "arguments": {"gen_args_0": {"arg_0": f"ask {number}", "arg_1": {}}},
            "resps": [["yes" if right else "no"]],
            "filtered_resps": ["yes" if right else "no"],
            "filter": "none",
            "metrics": ["exact_match"],
            **dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), f"{number}"),
            "exact_match": float(right),
            "repeat": repeat,
            "cut_in_thought": number < cut and repeat == len(item) - 1,
            "reasoning": "hm",
        }
        for repeat in range(len(answers[0]))
        for number, item in enumerate(answers)
        for right in (item[repeat],)
    ]
    folder.mkdir()
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "samples_t.jsonl").write_bytes(data)
    entry = {"file": "samples_t.jsonl", "sha256": hashlib.sha256(data).hexdigest(), "temperature": 1.0}
    entry |= {"repeats": len(answers[0]), "cut_in_thought": cut, "truncated": cut}
    manifest = {"schema": 1, "model": folder.name, "model_hash": hashlib.sha256(folder.name.encode()).hexdigest()}
    manifest |= {"settings": {}, "tasks": {"t": entry}}
    (folder / "k2quant_eval.json").write_text(json.dumps(manifest))
    return folder


def test_the_command_says_how_often_and_how_many_were_cut(tmp_path: Path) -> None:
    """In what it prints and in its JSON; runs of two and of four answers each are compared."""
    base = written(tmp_path / "base", of(*[2] * 200, 2, 0, asked=2), 3)
    candidate = written(tmp_path / "candidate", of(*[4] * 200, 1, 0), 1)
    shown = CliRunner().invoke(main, ["eval", "gate", str(base), str(candidate)]).output
    shown = " ".join(shown.split())
    assert "2 answers each (baseline) and 4 answers each (candidate)" in shown
    assert "cut in thought: 3 of 404 (baseline), 1 of 808 (candidate)" in shown
    assert "ended at the limit on new tokens: 3 of 404 (baseline), 1 of 808 (candidate)" in shown
    assert "lost t 200 (right 2 of 2, then 1 of 4)" in shown
    content = json.loads(CliRunner().invoke(main, ["eval", "gate", str(base), str(candidate), "--json"]).stdout)
    assert content == json.loads(json.dumps(gate(base, candidate).as_dict()))


class TestCutInThought:
    """Answers that never left their reasoning."""

    def test_they_are_counted_on_each_side(self) -> None:
        """By task and in all; a task in which nobody looked has no count, and then the pool has none."""
        looked = [task("t", of(*GOOD), cut) for cut in ({0: 1, 5: 2}, {0: 4})]
        verdict = gated(*looked)
        assert (verdict.pooled.base_cut, verdict.pooled.candidate_cut) == (3, 4)
        content = verdict.as_dict()["tasks"][0]
        assert (content["base_cut"], content["candidate_cut"]) == (3, 4)
        more = [task("u", of(*GOOD)) for _ in range(2)]
        both = gated((looked[0], more[0]), (looked[1], more[1]))
        assert [one.base_cut for one in both.tasks] == [3, None]
        assert both.pooled.base_cut == 3

    @pytest.mark.parametrize("asked", [1, 4])
    @pytest.mark.parametrize(
        ("base", "candidate", "told"),
        [(range(6), range(20, 26), False), (range(2), range(20, 34), True), (range(20, 34), range(2), True)],
    )
    def test_a_difference_beyond_chance_is_told(
        self,
        asked: int,
        base: range,
        candidate: range,
        told: bool,  # noqa: FBT001  a parameter of the test
    ) -> None:
        """6 items cut here and 6 others there are chance; 2 against 14 are not, whichever side it is."""
        sides = [task("t", of(*[asked] * 2000, asked=asked), dict.fromkeys(cut, 1)) for cut in (base, candidate)]
        found = [said for said in gated(*sides).warnings if "more than chance apart" in said]
        assert bool(found) == told
        if told:
            assert f"cut in thought: {len(base)} of {2000 * asked:,} (baseline), {len(candidate)} of" in found[0]

    @pytest.mark.parametrize(("cut", "told"), [(20, False), (21, True)])
    def test_many_are_told_even_where_both_have_them(self, cut: int, told: bool) -> None:  # noqa: FBT001  a parameter
        """5% are not many yet."""
        sides = [task("t", of(*[1] * 400, asked=1), dict.fromkeys(range(cut), 1)) for _ in range(2)]
        assert any("where so many never answer" in said for said in gated(*sides).warnings) == told

    def test_the_task_is_named_where_the_pool_does_not_show_it(self) -> None:
        """At alpha over the number of tasks."""
        pairs = [
            [task(name, of(*[1] * 400, asked=1), dict.fromkeys(range(count), 1)) for count in counts]
            for name, counts in (("t", (0, 9)), ("u", (9, 0)), ("v", (3, 3)))
        ]
        warnings = gated([base for base, _ in pairs], [candidate for _, candidate in pairs]).warnings
        assert [said.split(":")[0] for said in warnings if "more than chance" in said] == ["t", "u"]

    def test_one_side_that_was_not_looked_at_is_told(self) -> None:
        """Its answers may be cut just as well."""
        sides = task("t", of(*GOOD), {0: 1}), task("t", of(*GOOD))
        assert any("candidate" in said and "not known" in said for said in gated(*sides).warnings)

    @pytest.mark.parametrize("filtered", ["", "[invalid]"])
    def test_an_empty_answer_says_why(self, filtered: str) -> None:
        """Among the flips, whatever the task's filter makes of an empty text."""
        base, candidate = task("t", of(*GOOD), {}), task("t", of(*GOOD), {7: 4})
        items = [replace(item, answer=filtered) if item.cut_in_thought else item for item in candidate.items]
        (flip,) = gated(base, replace(candidate, items=tuple(items))).flips
        assert (flip.doc_id, flip.candidate_answer) == (7, "(cut in thought)")

    def test_truncated_answers_are_counted_too(self) -> None:
        """Where the runs' manifests know them."""
        verdict = gated(task("t", of(*GOOD), truncated=3), task("t", of(*GOOD, asked=4)))
        assert (verdict.pooled.base_truncated, verdict.pooled.candidate_truncated) == (3, None)
