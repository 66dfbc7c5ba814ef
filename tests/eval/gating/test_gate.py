"""The gate: which runs it reads, which it refuses to compare, and what it decides."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from k2quant.cli import main
from k2quant.errors import EvaluationError, HarnessFault, Incomparable, MalformedResults, UsageError
from k2quant.eval import gate
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Verdict
from k2quant.eval.runs.reading import read_run
from k2quant.eval.statistics.restricted import GAMMA

pytestmark = pytest.mark.usefixtures("by_score", "sketched")

TIME = "2026-11-22T09-44-46.769087"
Rows = Sequence[dict[str, Any]]


def sha(text: object) -> str:
    """Return a hash as lm-eval writes it."""
    return hashlib.sha256(str(text).encode()).hexdigest()


def sample(number: int, *, right: bool, prompt: str = "ask", **changes: Any) -> dict[str, Any]:
    """Return a line of samples: document `number`, answered in words."""
    answer = "yes" if right else f"no {number}"
    return {
        "doc_id": number,
        "doc": {"question": f"{prompt} {number}"},
        "target": "yes",
        "arguments": {"gen_args_0": {"arg_0": f"{prompt} {number}", "arg_1": {"until": ["\n"]}}},
        "resps": [[answer]],
        "filtered_resps": [answer],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": sha(number),
        "prompt_hash": sha(prompt),
        "target_hash": sha("yes"),
        "exact_match": float(right),
    } | changes


def choice(number: int, picked: int, log_probabilities: Sequence[float] | None = None) -> dict[str, Any]:
    """Return a line of samples: a multiple choice of four whose right answer is number 1."""
    values = log_probabilities or [-1.0 if place == picked else -2.0 - place for place in range(4)]
    pairs = [[str(value), str(place == picked)] for place, value in enumerate(values)]
    changes: dict[str, Any] = {
        "target": "1",
        "resps": [[pair] for pair in pairs],
        "filtered_resps": pairs,
        "metrics": ["acc"],
    }
    return sample(number, right=picked == 1, acc=float(picked == 1), **changes)


def answers(right: int, lost: int = 0, gained: int = 0, wrong: int = 0) -> tuple[Rows, Rows]:
    """Return what two models made of the same items: both right, lost, gained, both wrong."""
    kinds = [(True, True)] * right + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * wrong
    base, candidate = ([sample(n, right=pair[side]) for n, pair in enumerate(kinds)] for side in (0, 1))
    return base, candidate


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_plain(folder: Path, tasks: Mapping[str, Rows], **results: Any) -> Path:
    """Write what `lm_eval --log_samples` writes, in the folder of the model's name."""
    home = folder / "some__model"
    home.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        write_rows(home / f"samples_{name}_{TIME}.jsonl", rows)
    content = {
        "results": {},
        "configs": {name: {"output_type": "generate_until"} for name in tasks},
        "versions": dict.fromkeys(tasks, 3),
        "n-shot": dict.fromkeys(tasks, 5),
        "n-samples": {name: {"original": 999, "effective": len(rows)} for name, rows in tasks.items()},
        "config": {"model": "hf", "model_args": {}, "gen_kwargs": None},
        "model_name": "some/model",
    } | results
    (home / f"results_{TIME}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_ours(folder: Path, tasks: Mapping[str, Rows], *, model: str = "a", tokenizer: str = "t") -> Path:
    """Write what `k2quant eval run` writes; hashes are those of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, rows in tasks.items():
        path = folder / f"samples_{name}.jsonl"
        write_rows(path, rows)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entries[name] = {"file": path.name, "sha256": digest, "rows": len(rows), "version": 3, "shots": 5}
    manifest = {
        "schema": 1,
        "model": model,
        "model_hash": sha(model),
        "tokenizer_hash": sha(tokenizer),
        "settings": {"backend": "k2quant"},
        "tasks": entries,
    }
    (folder / "k2quant_eval.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


Decide = Callable[..., Verdict]


@pytest.fixture
def decide(tmp_path: Path) -> Decide:
    """Return what writes two runs of tasks and gates them."""

    def decided(
        tasks: Mapping[str, tuple[Rows, Rows]],
        *,
        models: str = "ab",
        same_model: bool = False,
        margins: Mapping[str, float | None] | None = None,
    ) -> Verdict:
        sides = [{name: pair[side] for name, pair in tasks.items()} for side in (0, 1)]
        runs = [write_ours(tmp_path / f"run{n}", side, model=models[n]) for n, side in enumerate(sides)]
        return gate(*runs, policy=Policy(tasks=margins or {}), same_model=same_model)

    return decided


class TestDecisions:
    """PASS, FAIL, INCONCLUSIVE."""

    def test_no_flip_passes_from_299_items_on(self, decide: Decide) -> None:
        """0.99 ** 298 is above 5%, 0.99 ** 299 is not: one item fewer cannot show a drop below 1 pp."""
        assert decide({"t": answers(299)}).decision == "PASS"
        verdict = decide({"t": answers(298)})
        assert verdict.decision == "INCONCLUSIVE"
        assert verdict.pooled.p_good == pytest.approx(0.99**298 + GAMMA, rel=1e-9)
        assert "can never pass" in verdict.warnings[0]
        assert "299" in verdict.warnings[0]

    def test_damage_above_the_margin_fails(self, decide: Decide) -> None:
        """40 of 1,000 lost and 2 gained is no drop of 1 pp."""
        verdict = decide({"t": answers(860, lost=40, gained=2, wrong=98)})
        assert verdict.decision == "FAIL"
        assert verdict.exit_code == 3
        assert verdict.pooled.drop == pytest.approx(0.038)
        assert "3.80 pp" in verdict.reason

    def test_a_p_value_between_alpha_and_twice_alpha_does_not_fail(self, decide: Decide) -> None:
        """4 of 100 lost has p = .0598 of a drop within 1 pp: above 5%, so nothing is shown, in pool and task alike."""
        verdict = decide({"t": answers(96, lost=4)})
        assert 0.05 < verdict.pooled.p_bad < 0.06
        assert (verdict.decision, verdict.pooled.decision) == ("INCONCLUSIVE", "INCONCLUSIVE")
        assert [task.decision for task in verdict.tasks] == ["INCONCLUSIVE"]

    @pytest.mark.parametrize(
        ("sides", "decision"), [(answers(96, lost=4), "FAIL"), (answers(299), "PASS")], ids=["bad", "good"]
    )
    def test_alpha_itself_is_small_enough(
        self, sides: tuple[Rows, Rows], decision: str, decide: Decide, tmp_path: Path
    ) -> None:
        """A p-value that is alpha decides, and one that is the next number above it does not."""
        pooled = decide({"t": sides}).pooled
        p = pooled.p_bad if decision == "FAIL" else pooled.p_good
        runs = [tmp_path / "run0", tmp_path / "run1"]
        assert gate(*runs, policy=Policy(alpha=p)).decision == decision
        assert gate(*runs, policy=Policy(alpha=math.nextafter(p, 0))).decision == "INCONCLUSIVE"

    def test_too_few_items_tell_nothing_and_say_how_many_would(
        self, decide: Decide, by_score: pytest.MonkeyPatch
    ) -> None:
        """10 lost and 8 gained of 400: neither below nor above 1 pp; the verdict names a number that would do."""
        by_score.undo()
        verdict = decide({"t": answers(340, lost=10, gained=8, wrong=42)})
        assert verdict.decision == "INCONCLUSIVE"
        assert verdict.exit_code == 4
        assert verdict.pooled.needed is not None
        assert 2_000 < verdict.pooled.needed < 4_000  # 6.183 d / m**2 is 2,782
        assert f"{verdict.pooled.needed:,}" in verdict.reason

    def test_a_drop_inside_the_margin_passes_with_a_note(self, decide: Decide) -> None:
        """22 lost against 8 gained of 5,000 is damage, but below 1 pp: PASS, and the damage is named."""
        verdict = decide({"t": answers(4_500, lost=22, gained=8, wrong=470)})
        assert verdict.decision == "PASS"
        assert any("inside the margin" in warning for warning in verdict.warnings)

    def test_tasks_are_pooled_by_items(self, decide: Decide) -> None:
        """Two tasks of 200 that alone cannot pass do so together."""
        verdict = decide({"s": answers(200), "t": answers(200)})
        assert verdict.decision == "PASS"
        assert {task.decision for task in verdict.tasks} == {"INCONCLUSIVE"}
        assert (verdict.pooled.n, verdict.pooled.name) == (400, "all")

    def test_one_ruined_task_fails_the_gate_whatever_the_pool_says(self, decide: Decide) -> None:
        """A pool of 10,000 hides 25 lost items; the task that lost a quarter of its own does not."""
        verdict = decide({"large": answers(9_900), "small": answers(75, lost=25)})
        assert verdict.pooled.decision == "PASS"
        assert verdict.decision == "FAIL"
        assert "small" in verdict.reason

    def test_many_tasks_are_not_many_chances_to_fail(self, decide: Decide) -> None:
        """5 lost of 100 has p = .018 alone; as the worst of ten it has ten times that, by Holm's rule."""
        alone = decide({"t0": answers(95, lost=5)}).tasks[0]
        verdict = decide({"t0": answers(95, lost=5)} | {f"t{n}": answers(1_000) for n in range(1, 10)})
        worst = verdict.tasks[0]
        assert alone.decision == "FAIL"
        assert worst.p_bad == pytest.approx(min(1, 10 * alone.p_bad))
        assert verdict.decision == "PASS"

    def test_a_ruined_task_does_not_shield_the_next(self, decide: Decide) -> None:
        """By Holm's rule, 5 lost of 100 (p = .029) fail beside a task that failed, not beside one just as doubtful."""
        worn, ruined = answers(95, lost=5), answers(75, lost=25)
        alone = decide({"worn": worn}).tasks[0].p_bad
        assert alone < 0.05 < 2 * alone
        beside_ruined = decide({"worn": worn, "ruined": ruined}).tasks
        assert [task.decision for task in beside_ruined] == ["FAIL", "FAIL"]
        assert beside_ruined[0].p_bad == pytest.approx(alone)
        beside_its_like = decide({"worn": worn, "another": worn}).tasks
        assert [task.decision for task in beside_its_like] == ["INCONCLUSIVE", "INCONCLUSIVE"]

    def test_a_task_may_have_a_margin_of_its_own(self, decide: Decide) -> None:
        """8 of 100 lost is more than 1 pp and not more than 20."""
        tasks = {"t": answers(92, lost=8), "u": answers(9_000)}
        assert decide(tasks).decision == "FAIL"
        assert decide(tasks, margins={"t": 0.2, "u": None}).decision == "PASS"

    def test_multiple_choice_is_read_from_log_probabilities(self, decide: Decide) -> None:
        """Answers are the likeliest choices, chance is one in four."""
        base = [choice(n, 1) for n in range(400)]
        candidate = [choice(n, 2 if n < 40 else 1) for n in range(400)]
        verdict = decide({"t": (base, candidate)})
        assert (verdict.decision, verdict.pooled.lost) == ("FAIL", 40)
        assert (verdict.flips[0].base_answer, verdict.flips[0].candidate_answer) == ("1", "2")

    def test_every_flip_is_listed_lost_ones_first(self, decide: Decide) -> None:
        """With task, document, prompt, target and both answers."""
        verdict = decide({"t": answers(300, lost=1, gained=1)})
        assert [(flip.lost, flip.doc_id) for flip in verdict.flips] == [(True, 300), (False, 301)]
        assert verdict.flips[0].prompt == "ask 300"
        assert (verdict.flips[0].base_answer, verdict.flips[0].candidate_answer) == ("yes", "no 300")

    def test_a_policy_that_lacks_power_is_told(self, decide: Decide, by_score: pytest.MonkeyPatch) -> None:
        """At 9% flips, 500 items hardly ever pass even a candidate without any drop."""
        by_score.undo()
        verdict = decide({"t": answers(455, lost=22, gained=23)})
        assert verdict.pooled.power < 0.3
        assert any("the policy wants" in warning for warning in verdict.warnings)

    def test_the_confidence_is_not_rounded_up(self, tmp_path: Path) -> None:
        """1 - alpha of 0.1% is 99.9%, not 100%."""
        runs = [
            write_ours(tmp_path / name, {"t": rows}, model=name) for name, rows in zip("ab", answers(990), strict=True)
        ]
        assert "at least 99.9% confidence" in gate(*runs, policy=Policy(alpha=0.001)).reason

    def test_items_that_would_do_are_more_than_there_are(self, decide: Decide, by_score: pytest.MonkeyPatch) -> None:
        """Who has enough items and no verdict has a candidate that lost some; fewer items are no advice."""
        by_score.undo()
        verdict = decide({"t": answers(3_900, lost=40, gained=10, wrong=50)})
        assert verdict.decision == "INCONCLUSIVE"
        assert verdict.pooled.needed is not None
        assert verdict.pooled.needed < 4_000
        assert "would mostly do" in verdict.reason

    def test_a_verdict_is_json(self, decide: Decide) -> None:
        """Everything a machine needs, with a version of its shape."""
        content = json.loads(json.dumps(decide({"t": answers(299)}).as_dict()))
        assert (content["schema"], content["decision"], content["pooled"]["drop"]) == (1, "PASS", 0)


class TestSameModel:
    """The same model twice measures noise; it is never a verdict."""

    def test_it_is_refused_unless_asked_for(self, decide: Decide) -> None:
        """Two runs of one model would pass every gate."""
        with pytest.raises(Incomparable, match=r"the same model twice.*`same_model=True`"):
            decide({"t": answers(400)}, models="aa")

    def test_it_is_never_a_pass(self, decide: Decide) -> None:
        """Even 400 identical answers: INCONCLUSIVE, exit 4, with the flips that there were."""
        verdict = decide({"t": answers(397, lost=1, gained=2)}, models="aa", same_model=True)
        assert (verdict.decision, verdict.exit_code, verdict.same_model) == ("INCONCLUSIVE", 4, True)
        assert "3 of 400" in verdict.reason
        assert verdict.warnings == ()

    def test_two_models_are_no_noise(self, decide: Decide) -> None:
        """--aa on two models is a mistake."""
        with pytest.raises(Incomparable, match="two models"):
            decide({"t": answers(400)}, same_model=True)

    def test_noise_that_is_none_is_named(self, decide: Decide) -> None:
        """30 lost and none gained between two runs of one model is no chance."""
        verdict = decide({"t": answers(370, lost=30)}, models="aa", same_model=True)
        assert "more than chance" in verdict.warnings[0]

    def test_identical_outputs_of_nobody_knows_whom_are_refused(self, tmp_path: Path) -> None:
        """A shared cache gives both models the same answers to the last bit, and every gate would pass."""
        rows, _ = answers(400)
        base, candidate = (write_plain(tmp_path / name, {"t": rows}) for name in "ab")
        with pytest.raises(Incomparable, match="cache"):
            gate(base, candidate)
        assert gate(base, candidate, same_model=True).decision == "INCONCLUSIVE"

    def test_one_name_twice_without_hashes_gets_a_note(self, tmp_path: Path) -> None:
        """lm-eval records names alone: the same one twice may be one model with another batch size."""
        sides = answers(900, lost=1, gained=1)
        runs = [write_plain(tmp_path / name, {"t": rows}) for name, rows in zip("ab", sides, strict=True)]
        verdict = gate(*runs)
        assert verdict.decision == "PASS"
        assert any("both runs name the model some/model" in warning for warning in verdict.warnings)

    def test_log_probabilities_that_are_identical_in_one_task_get_a_note(self, decide: Decide) -> None:
        """A cache may have answered for one task alone."""
        rows = [choice(n, 1) for n in range(400)]
        verdict = decide({"cached": (rows, rows), "t": answers(400, lost=1)})
        assert any("cached: every log-probability" in warning for warning in verdict.warnings)

    def test_identical_outputs_of_two_known_models_get_a_note(self, decide: Decide) -> None:
        """A lossless conversion does that."""
        assert any("last bit" in warning for warning in decide({"t": answers(400)}).warnings)


class TestNotComparable:
    """What asked different things is not compared."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arguments": {"gen_args_0": {"arg_0": "other words"}}}, "in other words"),
            ({"target_hash": sha("no")}, "in other words"),
            ({"doc_hash": sha("other")}, "other items"),
            ({"filter": "strict"}, "another filter"),
            ({"metrics": ["em"], "em": 1.0}, "another metric"),
        ],
    )
    def test_other_prompts_items_and_scores(self, changes: dict[str, Any], message: str, decide: Decide) -> None:
        """Documents, every word of the prompts, targets, metric and filter must be the same."""
        rows, _ = answers(300)
        other = [row | changes for row in rows]
        with pytest.raises(Incomparable, match=message):
            decide({"t": (rows, other)})

    def test_one_changed_prompt_of_many_is_enough(self, decide: Decide) -> None:
        """And the document is named."""
        rows, _ = answers(300)
        other = [sample(n, right=True, prompt="Ask" if n == 17 else "ask") for n in range(300)]
        with pytest.raises(Incomparable, match=r"1 of 300 .* document 17"):
            decide({"t": (rows, other)})

    def test_an_item_more(self, decide: Decide) -> None:
        """A document that stands once in one run and twice in the other is another item."""
        rows, _ = answers(300)
        with pytest.raises(Incomparable, match=r"other items.*found 301"):
            decide({"t": (rows, [*rows, dict(rows[0]) | {"doc_id": 300}])})

    def test_a_run_of_ours_and_one_of_lm_evals(self, tmp_path: Path) -> None:
        """They note other settings; the message says so and what to do."""
        rows, other = answers(300, lost=1)
        runs = write_ours(tmp_path / "a", {"t": rows}), write_plain(tmp_path / "b", {"t": other})
        with pytest.raises(Incomparable, match=r"another tool.*expected no .*both with lm_eval"):
            gate(*runs)

    def test_another_limit(self, decide: Decide) -> None:
        """Half of the items are not the items."""
        rows, _ = answers(300)
        with pytest.raises(Incomparable, match="150 in common"):
            decide({"t": (rows, rows[:150])})

    def test_other_settings(self, tmp_path: Path) -> None:
        """Shots, versions and generation settings as lm-eval noted them."""
        base, candidate = answers(300, lost=1)
        runs = [
            write_plain(tmp_path / "a", {"t": base}),
            write_plain(tmp_path / "b", {"t": candidate}, **{"n-shot": {"t": 0}}),
        ]
        with pytest.raises(Incomparable, match="shots"):
            gate(*runs)

    def test_other_tokenizers(self, tmp_path: Path) -> None:
        """The same text cut into other tokens is another prompt."""
        rows, _ = answers(300)
        base = write_ours(tmp_path / "a", {"t": rows})
        candidate = write_ours(tmp_path / "b", {"t": rows}, model="b", tokenizer="u")
        with pytest.raises(Incomparable, match="tokenizers"):
            gate(base, candidate)

    def test_other_tasks(self, tmp_path: Path) -> None:
        """All tasks of both, or those that are named."""
        rows, _ = answers(300)
        base = write_ours(tmp_path / "a", {"t": rows, "u": rows})
        candidate = write_ours(tmp_path / "b", {"t": rows, "v": rows}, model="b")
        with pytest.raises(Incomparable, match="u, v"):
            gate(base, candidate)
        assert gate(base, candidate, policy=Policy(tasks={"t": None})).decision == "PASS"
        with pytest.raises(Incomparable, match="lacks tasks"):
            gate(base, candidate, policy=Policy(tasks={"u": None}))
        with pytest.raises(UsageError, match="has no task w"):
            gate(base, candidate, policy=Policy(tasks={"w": None}))

    def test_documents_that_a_benchmark_holds_twice_are_paired_in_order(self, decide: Decide) -> None:
        """Real benchmarks repeat a few documents; they are items like others."""
        rows = [sample(n, right=True, doc_hash=sha(n // 2), prompt="x", arguments={}) for n in range(300)]
        assert decide({"t": (rows, rows)}).pooled.n == 300


class TestNothingToLose:
    """A baseline at chance, and outputs that say nothing."""

    def test_a_baseline_that_has_nothing_right(self, decide: Decide) -> None:
        """No candidate could fail."""
        with pytest.raises(Incomparable, match="nothing to lose"):
            decide({"t": answers(0, wrong=400)})

    def test_a_baseline_within_the_margin_of_nothing(self, decide: Decide) -> None:
        """2 of 400 right: a candidate without any answer would have dropped by half a point."""
        with pytest.raises(Incomparable, match="nothing to lose"):
            decide({"t": answers(1, lost=1, wrong=398)})

    def test_multiple_choice_at_chance(self, decide: Decide) -> None:
        """One in four right of four choices is guessing."""
        rows = [choice(n, n % 4) for n in range(400)]
        other = [choice(n, (n + 1) % 4) for n in range(400)]
        with pytest.raises(Incomparable, match="chance"):
            decide({"t": (rows, other)})

    def test_one_task_at_chance_is_named(self, decide: Decide) -> None:
        """It would only thin the pool."""
        guesses = [choice(n, n % 4) for n in range(100)]
        with pytest.raises(Incomparable, match="in guessed "):
            decide({"t": answers(400, lost=1), "guessed": (guesses, guesses)})

    def test_a_small_task_at_chance_gets_a_note(self, decide: Decide) -> None:
        """Of a few items nobody knows."""
        guesses = [choice(n, n % 4) for n in range(20)]
        verdict = decide({"t": answers(400, lost=1), "guessed": (guesses, guesses)})
        assert any("guessed: the baseline is at chance, 25.0% of 20" in warning for warning in verdict.warnings)

    def test_a_candidate_at_chance_fails(self, decide: Decide) -> None:
        """A ruined model is a verdict, not an error."""
        assert decide({"t": answers(1, lost=299)}).decision == "FAIL"

    @pytest.mark.parametrize("side", [0, 1])
    def test_log_probabilities_that_are_all_the_same(self, side: int, decide: Decide) -> None:
        """What a server without echo gives: every choice 0, accuracy at chance, and no error from anyone."""
        good = [choice(n, 1) for n in range(400)]
        hollow = [choice(n, 0, [0.0, 0.0, 0.0, 0.0]) for n in range(400)]
        with pytest.raises(HarnessFault, match=r"say nothing.*400 of 400"):
            decide({"t": (hollow, good) if side == 0 else (good, hollow)})

    def test_empty_answers(self, decide: Decide) -> None:
        """A server that answers nothing is broken; that says nothing of the model."""
        good, _ = answers(400)
        empty = [row | {"resps": [[" "]], "filtered_resps": [""], "exact_match": 0.0} for row in good]
        with pytest.raises(HarnessFault, match="candidate"):
            decide({"t": (good, empty)})


class TestReading:
    """Files of runs are not believed."""

    def test_what_lm_eval_wrote_is_read(self, tmp_path: Path) -> None:
        """Folder above, folder of the model, results file: all name the run."""
        rows, _ = answers(3, wrong=2)
        folder = write_plain(tmp_path, {"t": rows})
        home = folder / "some__model"
        for place in (folder, home, home / f"results_{TIME}.json"):
            run = read_run(place)
            assert (run.model, run.model_hash, run.tasks["t"].accuracy) == ("some/model", None, 0.6)
            assert run.tasks["t"].settings["shots"] == 5

    def test_rows_of_other_filters_are_passed_over(self, tmp_path: Path) -> None:
        """GSM8K has a row for `strict-match` and one for `flexible-extract`; the first filter counts."""
        rows = [sample(n, right=f == "strict", filter=f) for n in range(5) for f in ("strict", "flexible")]
        folder = write_plain(tmp_path, {"t": rows}, **{"n-samples": {"t": {"effective": 5}}})
        task = read_run(folder).tasks["t"]
        assert (task.filter, task.right, len(task.items)) == ("strict", 5, 5)

    def test_in_memory_types_are_read_as_those_on_the_disk(self, tmp_path: Path) -> None:
        """Numbers and booleans in `resps` mean what their strings mean, to the same digest."""
        text = choice(0, 1)
        plain = text | {"resps": [[[float(pair[0][0]), pair[0][1] == "True"]] for pair in text["resps"]]}
        first, second = (
            read_run(write_plain(tmp_path / name, {"t": [row]})).tasks["t"].items[0]
            for name, row in (("a", text), ("b", plain))
        )
        assert first == second
        assert first.choices == 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[:-20], "cut off"),
            (lambda text: text.replace('"doc_id": 2, "doc"', '"doc_id": 2 "doc"'), "line 3"),
            (lambda text: text.replace('"exact_match": 1.0', '"exact_match": NaN', 1), "NaN"),
            (lambda text: text.replace('"exact_match": 1.0', '"exact_match": 0.5', 1), "0 or 1"),
            (lambda text: text.replace('"exact_match": 1.0', '"exact_match": null', 1), "0 or 1"),
            (lambda text: text.replace(', "exact_match": 1.0', "", 1), "0 or 1"),
            (lambda text: text.replace('[["yes"]]', "[" * 900 + "]" * 900, 1), "nested too deep"),
            (lambda text: text.replace('"exact_match": 1.0', '"exact_match": "1"', 1), "0 or 1"),
            (lambda text: text.replace('"doc_id": 1,', '"doc_id": 0,'), "document 0 stands twice"),
            (lambda text: text.replace('"doc_id": 1,', '"doc_id": -1,'), "doc_id"),
            (lambda text: text.replace('"doc_hash"', '"dochash"'), "doc_hash"),
            (lambda text: text.replace('"metrics": ["exact_match"]', '"metrics": []'), "metrics"),
            (lambda text: text.replace('"resps": [["yes"]]', '"resps": "yes"'), "resps"),
            (lambda _: "", "holds no sample"),
            (lambda _: "[1]\n", "not a JSON object"),
            (lambda text: text + text, "stands twice"),
            (
                lambda text: text + text.splitlines()[0].replace('"doc_id": 0', '"doc_id": 99') + "\n",
                "6 expected 5|found 6",
            ),
            (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "found 4"),
            (lambda text: text.replace('"yes"', '"\\ud800"', 1), "line 1"),
        ],
    )
    def test_a_bad_file_of_samples_is_refused(self, change: Callable[[str], str], message: str, tmp_path: Path) -> None:
        """Truncated, mixed, doubled, graded, not a number, not samples: one line that names the file."""
        rows, _ = answers(5)
        folder = write_plain(tmp_path, {"t": rows})
        path = folder / "some__model" / f"samples_t_{TIME}.jsonl"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        with pytest.raises(MalformedResults, match=message) as caught:
            read_run(folder)
        assert path.name in str(caught.value)

    def test_a_log_probability_too_large_for_a_float_is_none(self, tmp_path: Path) -> None:
        """An integer of 400 digits is read as text, not into a traceback."""
        row = choice(0, 1) | {"resps": [[[10**400, "True"]], [["-1", "False"]]]}
        item = read_run(write_plain(tmp_path, {"t": [row]})).tasks["t"].items[0]
        assert item.choices is None

    @pytest.mark.parametrize("ours", [True, False])
    def test_a_metric_of_which_less_is_better_is_refused(self, tmp_path: Path, *, ours: bool) -> None:
        """`pct_stereotype` of CrowS-Pairs is 0 or 1, and 1 is not right."""
        rows, _ = answers(5)
        note = {"higher_is_better": {"t": {"exact_match": False}}}
        if ours:
            folder = write_ours(tmp_path, {"t": rows})
            (folder / "results.json").write_text(json.dumps(note), encoding="utf-8")
        else:
            folder = write_plain(tmp_path, {"t": rows}, **note)
        with pytest.raises(MalformedResults, match="less exact_match is better"):
            read_run(folder)

    def test_results_without_a_task_are_refused(self, tmp_path: Path) -> None:
        """Samples that no results name are nobody's."""
        with pytest.raises(MalformedResults, match="names no task"):
            read_run(write_plain(tmp_path, {"t": answers(5)[0]}, **{"n-samples": {}}))

    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path: Path) -> None:
        """lm-eval's samples lie beside its results."""
        home = write_plain(tmp_path / "run", {"t": answers(5)[0]}) / "some__model"
        path = home / f"samples_t_{TIME}.jsonl"
        path.rename(tmp_path / "elsewhere.jsonl")
        path.symlink_to(tmp_path / "elsewhere.jsonl")
        with pytest.raises(MalformedResults, match="leaves the folder") as caught:
            read_run(home)
        assert "follow_links" not in str(caught.value)  # nobody could say it

    def test_samples_of_several_runs_are_not_mixed(self, tmp_path: Path) -> None:
        """Where a folder holds two runs, one of them has to be named."""
        rows, _ = answers(5)
        folder = write_plain(tmp_path, {"t": rows})
        home = folder / "some__model"
        for path in list(home.iterdir()):
            path.with_name(path.name.replace("09-44", "10-00")).write_bytes(path.read_bytes())
        with pytest.raises(MalformedResults, match="holds 2 runs"):
            read_run(folder)
        assert read_run(home / f"results_{TIME}.json").tasks

    def test_missing_samples_are_missed(self, tmp_path: Path) -> None:
        """A task of the results without its file, or with no file at all."""
        rows, _ = answers(5)
        folder = write_plain(tmp_path, {"t": rows, "u": rows})
        (folder / "some__model" / f"samples_u_{TIME}.jsonl").unlink()
        with pytest.raises(MalformedResults, match=r"some tasks.*u"):
            read_run(folder)
        (folder / "some__model" / f"samples_t_{TIME}.jsonl").unlink()
        with pytest.raises(MalformedResults, match="log_samples"):
            read_run(folder)

    def test_a_run_of_ours_that_was_edited_is_refused(self, tmp_path: Path) -> None:
        """The manifest has the digest of every file."""
        rows, _ = answers(5)
        folder = write_ours(tmp_path / "a", {"t": rows})
        path = folder / "samples_t.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("0.0", "1.0").replace("no 4", "yes"), encoding="utf-8")
        assert read_run(folder).tasks["t"].right == 5
        path.write_text(path.read_text(encoding="utf-8").replace('"yes"', '"Yes"', 1), encoding="utf-8")
        with pytest.raises(MalformedResults, match="changed since"):
            read_run(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, "another version"),
            ({"tasks": {}}, "no task"),
            ({"tasks": []}, "no object"),
            ({"model_hash": "x"}, "no SHA-256"),
            ({"tasks": {"t": {"file": "../b/samples_t.jsonl", "sha256": "0"}}}, "not a plain file name"),
            ({"tasks": {"t": {"file": "missing.jsonl", "sha256": "0"}}}, "missing.jsonl"),
        ],
    )
    def test_a_manifest_that_lies_is_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        """Paths stay in the folder, hashes are hashes, versions are known."""
        folder = write_ours(tmp_path / "a", {"t": answers(5)[0]})
        path = folder / "k2quant_eval.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
        with pytest.raises(MalformedResults, match=message):
            read_run(folder)

    def test_what_is_no_run_is_refused(self, tmp_path: Path) -> None:
        """Nothing there, an empty folder, another file, an unfinished run, a pipe."""
        (tmp_path / "note.txt").write_text("x", encoding="utf-8")
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "k2quant_eval_request.json").write_text("{}", encoding="utf-8")
        for name, message in (("missing", "not there"), (".", "no finished run"), ("note.txt", "no results file")):
            with pytest.raises(MalformedResults, match=message):
                read_run(tmp_path / name)
        with pytest.raises(MalformedResults, match="it resumes"):
            read_run(tmp_path / "begun")
        home = write_plain(tmp_path / "p", {"t": answers(5)[0]}) / "some__model"
        (home / f"samples_t_{TIME}.jsonl").unlink()
        os.mkfifo(home / f"samples_t_{TIME}.jsonl")
        with pytest.raises(MalformedResults, match="not a regular file"):
            read_run(home)

    def test_every_error_is_one_of_evaluations(self) -> None:
        """One except clause catches them all."""
        assert all(issubclass(kind, EvaluationError) for kind in (MalformedResults, Incomparable, HarnessFault))


class TestGroups:
    """A policy may name what lm-eval calls a group."""

    def _runs(self, tmp_path: Path) -> tuple[Path, Path]:
        groups = {"g": ["h", "t"], "h": ["u", "g"], "t": [], "odd": "t"}  # one within another, and round in a circle
        tasks = {"t": answers(92, lost=8), "u": answers(9_000), "v": answers(300, lost=9)}
        base, candidate = (
            write_plain(tmp_path / name, {task: rows[side] for task, rows in tasks.items()}, group_subtasks=groups)
            for side, name in enumerate("ab")
        )
        return base, candidate

    def test_a_group_stands_for_its_tasks(self, tmp_path: Path) -> None:
        """Those of groups within it too; others are left out."""
        verdict = gate(*self._runs(tmp_path), policy=Policy(tasks={"g": None}))
        assert {task.name for task in verdict.tasks} == {"t", "u"}

    def test_a_task_of_a_group_may_have_a_margin_of_its_own(self, tmp_path: Path) -> None:
        """8 of 100 lost is not more than 20%, whichever of the two the policy names first."""
        runs = self._runs(tmp_path)
        for tasks in ({"g": None, "t": 0.2}, {"t": 0.2, "g": None}):
            margins = {task.name: task.margin for task in gate(*runs, policy=Policy(tasks=tasks)).tasks}
            assert margins == {"t": 0.2, "u": 0.01}
        assert {task.margin for task in gate(*runs, policy=Policy(tasks={"g": 0.1})).tasks} == {0.1}

    def test_what_is_no_group_is_no_task(self, tmp_path: Path) -> None:
        """A name that neither has is an error."""
        with pytest.raises(UsageError, match="has no task odd"):
            gate(*self._runs(tmp_path), policy=Policy(tasks={"odd": None}))


class TestCommand:
    """`k2quant eval gate`."""

    def _run(self, folder: Path, tasks: tuple[Rows, Rows], *options: str) -> Result:
        runs = [write_ours(folder / name, {"t": rows}, model=name) for name, rows in zip("ab", tasks, strict=True)]
        return CliRunner().invoke(main, ["eval", "gate", *map(str, runs), *options])

    @pytest.mark.parametrize(
        ("tasks", "code", "word"),
        [
            (answers(299), 0, "PASS"),
            (answers(200, lost=99), 3, "FAIL"),
            (answers(100), 4, "INCONCLUSIVE"),
        ],
    )
    def test_the_exit_code_is_the_verdict(self, tasks: tuple[Rows, Rows], code: int, word: str, tmp_path: Path) -> None:
        """0, 3 and 4, with the word first on stdout."""
        done = self._run(tmp_path, tasks)
        assert done.exit_code == code
        assert done.stdout.startswith(f"{word}: ")

    @pytest.mark.parametrize("columns", [80, 60])
    def test_a_verdict_fits_the_terminal(self, columns: int, tmp_path: Path) -> None:
        """At 80 columns and at 60 no line is longer; the verdict stands first, in its colour."""
        runs = [
            write_ours(tmp_path / name, dict.fromkeys("ts", rows), model=name * 90)
            for name, rows in zip("ab", answers(200, lost=99), strict=True)
        ]
        env = {"COLUMNS": str(columns), "FORCE_COLOR": "1"}
        done = CliRunner().invoke(main, ["eval", "gate", *map(str, runs)], env=env)
        red = "\x1b[31m\x1b[1mFAIL\x1b[0m"
        assert done.stdout.startswith(f"{red}: ")
        assert done.stdout.count(red) == 4
        assert max(map(len, re.sub("\x1b[^m]*m", "", done.stdout).splitlines())) <= columns
        assert (
            "\x1b"
            not in CliRunner().invoke(main, ["eval", "gate", *map(str, runs)], env=env | {"NO_COLOR": "1"}).stdout
        )

    def test_the_flips_that_are_left_out_are_where_the_verdict_says(self, tmp_path: Path) -> None:
        """The page where one was written; else how to get it."""
        runs = answers(200, lost=12)
        assert "and 2 more; -o DIR writes a page with them" in self._run(tmp_path, runs).stdout
        folder = tmp_path / "gate"
        assert f"and 2 more, in {folder / 'gate.html'}\n" in self._run(tmp_path, runs, "-o", str(folder)).stdout

    def test_margins_are_given_in_points(self, tmp_path: Path) -> None:
        """100 items without a flip show a drop below 3 pp, not below 2."""
        assert self._run(tmp_path, answers(100), "--margin", "3pp").exit_code == 0
        assert self._run(tmp_path, answers(100), "--margin", "2pp").exit_code == 4

    def test_a_policy_file_stands_alone(self, tmp_path: Path) -> None:
        """What was reviewed is not changed by an option in passing."""
        policy = tmp_path / "gate.yaml"
        policy.write_text("margin: 3pp\n", encoding="utf-8")
        assert self._run(tmp_path, answers(100), "--policy", str(policy)).exit_code == 0
        done = self._run(tmp_path, answers(100), "--policy", str(policy), "--margin", "9pp")
        assert done.exit_code == 2
        assert "leave the options out" in done.stderr

    def test_json_is_on_stdout_alone(self, tmp_path: Path) -> None:
        """A machine reads all of stdout."""
        done = self._run(tmp_path, answers(299), "--json")
        assert json.loads(done.stdout)["decision"] == "PASS"

    def test_a_hostile_answer_does_not_reach_the_terminal(self, tmp_path: Path) -> None:
        """Escape codes in answers and prompts are printed as text."""
        base, candidate = answers(300, lost=1)
        bad = [row | {"resps": [["\x1b[2J"]], "filtered_resps": ["\x1b[2J"]} for row in candidate]
        done = self._run(tmp_path, (base, bad))
        assert "\x1b" not in done.output
        assert "\\x1b[2J" in done.output

    def test_hostile_names_do_not_reach_the_terminal(self, tmp_path: Path) -> None:
        """Escape codes and newlines in the names of model and tasks are printed as text, in errors as well."""
        runs = []
        for name, rows in zip("ab", answers(300, lost=1), strict=True):
            folder = write_ours(tmp_path / name, {"t": rows, "u": rows}, model=name)
            path = folder / "k2quant_eval.json"
            manifest = json.loads(path.read_text(encoding="utf-8"))
            manifest["model"] = "\x1b[31m\nPASS"
            manifest["tasks"] = {"\x1b[2J": manifest["tasks"]["t"], "u": manifest["tasks"]["u"]}
            path.write_text(json.dumps(manifest), encoding="utf-8")
            runs.append(str(folder))
        for options in ([], ["--tasks", "v"]):
            done = CliRunner().invoke(main, ["eval", "gate", *runs, *options], color=True)
            assert "\x1b" not in re.sub("\x1b\\[33m\x1b\\[1mINCONCLUSIVE\x1b\\[0m", "", done.output)
            assert "\\x1b[2J" in done.output
            assert "\nPASS" not in done.output

    def test_errors_are_one_line(self, tmp_path: Path) -> None:
        """No traceback, exit 1."""
        done = CliRunner().invoke(main, ["eval", "gate", str(tmp_path / "a"), str(tmp_path / "b")])
        assert done.exit_code == 1
        assert done.stderr.startswith("k2quant: ")
        assert len(done.stderr.splitlines()) == 1

    def test_github_gets_a_summary_and_annotations(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The summary goes to the file that GitHub names, annotations to the output, and the report where -o says."""
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
        done = self._run(tmp_path, answers(200, lost=99), "--github", "-o", str(tmp_path / "gate"))
        assert done.exit_code == 3
        lines = done.stdout.splitlines()
        stop = next(place for place, line in enumerate(lines) if line.startswith("::stop-commands::"))
        assert any(line.startswith("::error title=") for line in lines[:stop])
        assert lines[-1] == f"::{lines[stop].rpartition(':')[2]}::"
        assert "FAIL" in (tmp_path / "summary.md").read_text(encoding="utf-8")
        assert {path.name for path in (tmp_path / "gate").iterdir()} == {
            "gate.html",
            "gate.md",
            "gate.xml",
            "gate.json",
        }

    @pytest.mark.parametrize("tasks", ["", ",", "t,", "t,,t"])
    def test_no_name_is_no_task(self, tasks: str, tmp_path: Path) -> None:
        """An empty variable of a script does not mean all tasks."""
        done = self._run(tmp_path, answers(299), "--tasks", tasks)
        assert (done.exit_code, "--tasks" in done.stderr) == (2, True)
