"""The simulation of many machines: its laws, what it says of a run that was measured, and the page made of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.conversion.machines import cases, overhead, report
from suites.conversion.machines.simulation import Leg, Station, Work, bound, simulate

RESULTS = ROOT / "benchmarks" / "results"


def work(shards: list[float], machines: int, line: float = 1.0, filer: float = 3.0, cores: int = 2) -> Work:
    """Return work that passes a shared file system, a line and some cores of half a byte a second each."""
    legs = [
        Leg(Station("file system", filer), shared=True),
        Leg(Station("line", line), shared=False),
        Leg(Station("cores", 0.5, cores), shared=False),
    ]
    return Work(shards, legs, machines, piece=1.0, window=8)


SHARDS = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=20)
RATES = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@settings(deadline=None)
@given(shards=SHARDS, machines=st.integers(1, 6), line=RATES, filer=RATES, cores=st.integers(1, 4))
def test_nothing_is_faster_than_what_rules(
    shards: list[float], machines: int, line: float, filer: float, cores: int
) -> None:
    """No station can do more than its rate; none was busy for longer than all the time, and each did all its work."""
    task = work(shards, machines, line, filer, cores)
    found = simulate(task)
    assert found.seconds >= max(bound(task).values()) * (1 - 1e-9)
    assert max(found.busy.values()) <= 1 + 1e-9
    for name, seconds in bound(task).items():
        assert found.busy[name] * found.seconds == pytest.approx(seconds)


@settings(deadline=None)
@given(shards=SHARDS, machines=st.integers(1, 5), line=RATES, filer=RATES)
def test_another_machine_makes_nothing_slower(shards: list[float], machines: int, line: float, filer: float) -> None:
    """But by what the last shards may lie worse: at most one that is left alone."""
    before, after = (simulate(work(shards, count, line, filer)).seconds for count in (machines, machines + 1))
    assert after <= before + max(simulate(work([shard], 1, line, filer)).seconds for shard in shards)


def test_one_machine_comes_near_the_bound_of_what_rules() -> None:
    """A long conversion is its slowest station's work, and the rest is its first and its last pieces."""
    for line, filer, rules in ((0.5, 8.0, "line"), (8.0, 0.5, "file system"), (8.0, 8.0, "cores")):
        task = work([50.0] * 8, 1, line, filer)
        found = simulate(task)
        assert found.rules == rules
        assert found.seconds <= max(bound(task).values()) + 10


def test_machines_add_up_where_each_brings_what_rules() -> None:
    """Four lines are four times one; a file system that is full is as fast for four machines as for one."""
    shards = [10.0] * 16
    one, four = (simulate(work(shards, count, 0.25, 100.0)).seconds for count in (1, 4))
    assert one / four == pytest.approx(4, rel=0.05)
    one, four = (simulate(work(shards, count, 100.0, 0.25)).seconds for count in (1, 4))
    assert one / four == pytest.approx(1, rel=0.05)


def measured() -> dict[str, Any]:
    """Return the results of the benchmark."""
    return cases.stored(RESULTS / "machines-overhead.json")


def test_it_agrees_with_the_run_that_was_measured() -> None:
    """Two nodes of one core: from the rate of a pool's threads, the time of the cluster, within 10%."""
    found = measured()
    cluster = sorted(run["work_s"] for run in found["runs"]["cluster"])
    expected = cases.predicted(found, cases.rates(found, 1e9))
    assert expected == pytest.approx(cluster[len(cluster) // 2], rel=report.AGREES)


def test_it_agrees_with_runs_through_a_line() -> None:
    """Two nodes whose source comes over one line of a known rate, which rules: within 10%."""
    found, rates = cases.stored(RESULTS / "machines-throttled.json"), cases.rates(measured(), 1e9)
    assert len(found["runs"]) == 2
    for run in found["runs"]:
        seconds = sorted(run["work_s"])[len(run["work_s"]) // 2]
        assert cases.through_a_line(found, rates, run["rate"]) == pytest.approx(seconds, rel=report.AGREES)


def test_the_overhead_is_that_of_medians_and_the_page_says_it() -> None:
    """And whether the bar was met."""
    found = measured()
    assert overhead.page(found) == (RESULTS / "machines-overhead.md").read_text()
    slow = {
        name: [run | {"work_s": run["work_s"] * factor} for run in found["runs"]["pool"]]
        for name, factor in (("pool", 1), ("cluster", 1.2))
    }
    assert overhead.overhead(found | {"runs": slow}) == pytest.approx(0.2)
    assert "**missed**" in overhead.page(found | {"runs": slow})


def test_the_page_is_made_of_its_results() -> None:
    """Every case of the table stands in them, and none is below its bound."""
    found = json.loads((RESULTS / "machines.json").read_bytes())
    assert report.page(found) == (RESULTS / "machines.md").read_text()
    assert len(found["rows"]) == len(list(cases.cases()))
    assert all(row["seconds"] >= row["bound"] * (1 - 1e-9) for row in found["rows"])
    for case in cases.cases():
        if case.machines > 1:
            fewer = report.row_of(found, case._replace(machines=1))
            assert report.row_of(found, case)["seconds"] <= fewer["seconds"]


def test_the_shards_are_those_of_k2() -> None:
    """1,029 GB in 61 shards; a case of the table comes out again."""
    shards = cases.k2_shards()
    assert (len(shards), round(sum(shards) / 1e9)) == (61, 1029)
    found = json.loads((RESULTS / "machines.json").read_bytes())
    case = cases.Case("bucket", 10, 16, 16)
    again, limit = cases.outcome(case, cases.Rates(**found["rates"]), shards)
    assert again.seconds == pytest.approx(report.row_of(found, case)["seconds"])
    assert limit == pytest.approx(report.row_of(found, case)["bound"])
