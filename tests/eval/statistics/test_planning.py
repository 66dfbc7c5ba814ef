"""How many items a gate needs, and whether that is what the gate then does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta  # type: ignore[import-untyped]  # it has no types

from k2quant.cli import main
from k2quant.errors import UsageError
from k2quant.eval.runs.items import Item, Key, Run, Task
from k2quant.eval.statistics import paired, planning
from k2quant.eval.statistics.exact import chance
from k2quant.eval.statistics.repeats_planning import plan_repeats
from k2quant.eval.statistics.restricted import critical_curve


class TestPlan:
    """Items for a margin."""

    @pytest.mark.parametrize(
        ("margin", "flips", "known"),
        [(0.03, 0.04, 323), (0.02, 0.04, 676), (0.01, 0.04, 2540), (0.01, 0.02, 1355), (0.005, 0.04, 9892)],
    )
    def test_known_sizes(self, margin: float, flips: float, known: int) -> None:
        """The numbers known for the score test are right to 3%: the exact test takes a little more, or at 2 pp less."""
        found = planning.plan(margin=margin, flips=flips)
        assert found.items is not None
        assert known * 0.98 <= found.items <= known * 1.03

    @pytest.mark.parametrize(("flips", "drop"), [(0.0, 0.0), (0.001, 0.0), (0.01, 0.0), (0.04, 0.01), (0.1, 0.0)])
    def test_keeps_its_word(self, flips: float, drop: float) -> None:
        """The gate's exact power with so many items is what the plan says, and not below what was wanted."""
        found = planning.plan(margin=0.03, flips=flips, drop=drop, power=0.7)
        assert found.items is not None
        assert found.reached is not None
        assert found.reached == pytest.approx(paired.power(found.items, 0.03, 0.05, flips, drop), abs=1e-12)
        assert found.reached >= 0.7
        assert paired.power(found.items * 104 // 100, 0.03, 0.05, flips, drop) >= 0.69

    def test_no_gross_waste(self) -> None:
        """Seven percent fewer items would not do."""
        found = planning.plan(margin=0.02, flips=0.04)
        assert found.items is not None
        assert paired.power(found.items * 93 // 100, 0.02, 0.05, 0.04) < 0.8

    @pytest.mark.parametrize(("margin", "least"), [(0.01, 299), (0.02, 149), (0.005, 598)])
    def test_without_flips(self, margin: float, least: int) -> None:
        """Where nothing flips, the exact edge is the plan."""
        found = planning.plan(margin=margin, flips=0.0)
        assert (found.items, found.reached, found.without_flips) == (least, 1.0, least)

    def test_too_many(self) -> None:
        """A candidate a hair below the margin needs more than ten million items: None."""
        found = planning.plan(margin=0.01, flips=0.04, drop=0.0099)
        assert (found.items, found.reached) == (None, None)
        assert json.loads(json.dumps(found.as_dict()))["items"] is None

    def test_the_chance_of_pass_of_a_million_items_takes_no_minutes(self) -> None:
        """It is the score test's there; exact power is summed over a million bounds."""
        begun = time.perf_counter()
        assert planning.chance_of_pass(1_000_000, 0.005, 0.05, 0.1) == pytest.approx(1.0)
        assert planning.chance_of_pass(1_319, 0.01, 0.05, 0.04) == paired.power(1_319, 0.01, 0.05, 0.04)
        assert time.perf_counter() - begun < 20

    @pytest.mark.parametrize("n", [4000, 6000])
    def test_score_power_is_near(self, n: int) -> None:
        """Above the size up to which plans are exact, the score test's power is that of the exact one to 0.005."""
        for flips in (0.01, 0.04, 0.1):
            wanted = planning._Wanted(0.01, 0.05, 0.8, flips, 0.0)  # noqa: SLF001  what plans rest on there
            assert wanted.score_power(n) == pytest.approx(paired.power(n, 0.01, 0.05, flips), abs=0.005)

    @pytest.mark.parametrize(
        "nonsense",
        [
            {"margin": 0.01, "flips": 0.04, "drop": 0.01},
            {"margin": 0.01, "flips": 0.002, "drop": 0.003},
            {"margin": 0.01, "flips": 1.1},
            {"margin": 0.0, "flips": 0.04},
            {"margin": 0.01, "flips": 0.04, "alpha": 0.6},
            {"margin": 0.01, "flips": 0.04, "alpha": 1e-17},
            {"margin": 1e-320, "flips": 0.04},
            {"margin": 0.01, "flips": 0.04, "power": 1.0},
            {"margin": 0.01, "flips": float("nan")},
        ],
    )
    def test_nonsense(self, nonsense: dict[str, float]) -> None:
        """A drop that may not pass, more drop than flips, and shares that are none are refused."""
        with pytest.raises(UsageError):
            planning.plan(**nonsense)


class TestFlipsLimit:
    """Upper confidence limit of a share of flips."""

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
    def test_is_clopper_pearson(self, n: int, part: float, confidence: float) -> None:
        """It is the quantile of a beta distribution."""
        count = round(part * n)
        expected = beta.ppf(confidence, count + 1, n - count) if count < n else 1.0
        assert planning.flips_limit(count, n, confidence=confidence) == pytest.approx(expected, abs=2e-9)

    @pytest.mark.parametrize(("count", "n"), [(3, 2), (-1, 5), (0, 0)])
    def test_nonsense(self, count: int, n: int) -> None:
        """More flips than items are refused."""
        with pytest.raises(UsageError, match="flips"):
            planning.flips_limit(count, n)


def run_of(right: list[bool], repeats: int = 1) -> Run:
    """Return a run of one task whose answers are right as said; those to one item stand together."""
    items = tuple(
        Item(
            key=Key(str(place // repeats), "prompt", "target"),
            doc_id=place // repeats,
            repeat=place % repeats,
            right=good,
            prompt="?",
            target="!",
            answer="",
            output_digest=str(good),
            choices=None,
            hollow=False,
        )
        for place, good in enumerate(right)
    )
    task = Task(name="sums", metric="acc", filter="none", items=items, settings={})
    return Run(folder=Path("run"), model="m", model_hash=None, tokenizer_hash=None, settings={}, tasks={"sums": task})


class TestCommand:
    """`k2quant eval plan`."""

    def run(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code and all output."""
        result = CliRunner().invoke(main, ["eval", "plan", *arguments])
        return result.exit_code, result.output

    def test_flips(self) -> None:
        """It prints the items of the plan, and the edge below which nothing passes."""
        code, text = self.run("--margin", "5pp", "--flips", "4%")
        expected = planning.plan(margin=0.05, flips=0.04)
        assert code == 0
        assert f"{expected.items:,}" in text
        assert "fewer than 59 items" in text

    def test_assumed(self) -> None:
        """Without a share of flips there is a line for each of five."""
        code, text = self.run("--margin", "5pp", "--json")
        plans = json.loads(text)["plans"]
        assert code == 0
        assert [each["flips"] for each in plans] == [0.01, 0.02, 0.04, 0.06, 0.1]
        assert [each["items"] for each in plans] == sorted(each["items"] for each in plans)

    def test_pilot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Flips of two runs are counted, and planned for as measured and at their upper limit."""
        runs = {"a": run_of([True] * 90 + [False] * 10), "b": run_of([False] * 2 + [True] * 91 + [False] * 7)}
        monkeypatch.setattr("k2quant.eval.runs.reading.read_run", lambda path: runs[path.name])
        code, text = self.run("--margin", "10pp", "--pilot", "a", "b", "--json")
        found = json.loads(text)
        assert code == 0
        assert (found["pilot"]["lost"], found["pilot"]["gained"], found["pilot"]["n"]) == (2, 3, 100)
        limit = planning.flips_limit(5, 100)
        assert [each["flips"] for each in found["plans"]] == [0.05, limit]
        assert "5.00% flipped, at most 10.23%" in self.run("--margin", "10pp", "--pilot", "a", "b")[1]

    def test_pilot_with_repeats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Runs that asked each item twice tell how alike repeats are, and are planned for with repeats."""
        # Of 100 items 4 are lost for good, and 8 come out by chance, as evenly as there is.
        base = [letter == "T" for letter in "TTTFFTFFTTTFFTFF"]
        candidate = [letter == "T" for letter in "TFTTFFTFTFFFTTTF"]
        runs = {
            "a": run_of([True] * 184 + base, 2),
            "b": run_of([False] * 8 + [True] * 176 + candidate, 2),
        }
        monkeypatch.setattr("k2quant.eval.runs.reading.read_run", lambda path: runs[path.name])
        code, text = self.run("--margin", "10pp", "--pilot", "a", "b", "--json")
        found = json.loads(text)
        assert code == 0
        assert found["pilot"]["n"] == 100
        assert found["pilot"]["flips"] == pytest.approx(0.04 + 0.08 * 0.5)
        assert found["pilot"]["correlation"] == pytest.approx(0.5)
        assert [each["repeats"] for each in found["plans"]] == [1, 2, 4, 8]
        assert {each["flips"] for each in found["plans"]} == {found["pilot"]["flips"]}
        shown = self.run("--margin", "10pp", "--pilot", "a", "b")[1]
        assert "8.00% of single answers flipped; an item's repeats correlate by 0.5" in " ".join(shown.split())
        given = self.run("--margin", "10pp", "--pilot", "a", "b", "--correlation", "1", "--json")[1]
        assert {each["correlation"] for each in json.loads(given)["plans"]} == {1.0}

    def test_repeats(self) -> None:
        """With repeats there is a line for each usual number and the one asked for, and what no repeats replace."""
        given = ("--margin", "2pp", "--flips", "6%", "--correlation", "0.3", "--repeats", "3")
        code, text = self.run(*given, "--json")
        plans = json.loads(text)["plans"]
        assert code == 0
        assert [each["repeats"] for each in plans] == [1, 2, 3, 4, 8]
        assert [each["items"] for each in plans] == sorted((each["items"] for each in plans), reverse=True)
        assert [each["answers"] for each in plans] == sorted(each["answers"] for each in plans)
        assert plans[0]["items"] == planning.plan(margin=0.02, flips=0.06).items
        shown = self.run(*given)[1]
        assert all(f"{each['items']:,}" in shown for each in plans)
        endless = plan_repeats(margin=0.02, flips=0.06, correlation=0.3, repeats=1_000_000).items
        assert endless is not None
        assert endless < plans[-1]["items"]
        assert f"with endless repeats it takes {endless:,} items" in " ".join(shown.split())

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--repeats", "4"),
            ("--repeats", "4", "--flips", "4%"),
            ("--correlation", "0.5"),
            ("--correlation", "1.5", "--flips", "4%"),
            ("--correlation", "nan", "--flips", "4%"),
            ("--correlation", "some", "--flips", "4%"),
            ("--correlation", "0.5", "--flips", "4%", "--drop", "0.2pp"),
            ("--correlation", "0.5", "--flips", "4%", "--repeats", "0"),
            ("--margin", "1pp", "--flips", "4%", "--drop", "2pp"),
            ("--margin", "much"),
            ("--flips", "4%", "--pilot", "a", "b"),
            ("--margin", "20pp", "--drop", "12pp"),
        ],
    )
    def test_nonsense(self, arguments: tuple[str, ...]) -> None:
        """What makes no sense ends with 2 and says why."""
        code, text = self.run(*arguments)
        assert code == 2
        assert "Traceback" not in text


def test_one_item_more_than_planned_is_not_too_many() -> None:
    """Where few items flip, power of an odd and an even number may differ; a plan has both.

    Where all shares of flips count it differs by eight points at 517 items, and not where the data have a say in them.
    """
    items = planning.plan(margin=0.01, flips=0.005).items
    assert items is not None
    assert min(paired.power(items + more, 0.01, 0.05, 0.005) for more in (0, 1)) >= 0.8
    unrestricted = critical_curve(517, 0.01, 0.05, upper=False, gamma=0.0)
    assert chance(unrestricted, 517, 0.005, 0.5) < 0.74
    assert paired.power(517, 0.01, 0.05, 0.005) > 0.8
