"""The proof of the gate: its rules against published rates, and bars that can be missed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from scipy.stats import t  # type: ignore[import-untyped]  # it has no types

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.gate import cells as gate_cells
from suites.gate import report as gate_report
from suites.gate import rules as gate_rules
from suites.gate import sharper as gate_sharper


def passes(n: int, accuracy: float, flips: float, drop: float, **other: float) -> dict[str, float]:
    """Return how often each rule passes such a candidate."""
    cell = gate_cells.of_kind("test", "it", n, 0.01, flips=flips, drop=drop, accuracy=accuracy, **other)
    found: dict[str, float] = gate_cells.measure(cell, 20_000, 1)["passes"]
    return found


@pytest.mark.parametrize(
    ("cell", "known"),
    [
        ((1319, 0.92, 0.04, 0.01), {"score test": 0.050, "McNemar p > alpha": 0.480, "unpaired 2 SE": 0.983}),
        ((1319, 0.92, 0.04, 0.02), {"McNemar p > alpha": 0.023, "unpaired 2 SE": 0.663, "llm-compressor 0.95": 1.0}),
        ((1000, 0.75, 0.10, 0.05), {"llm-compressor 0.95": 0.184, "vLLM rtol .08": 0.745, "vLLM absolute .08": 0.982}),
    ],
)
def test_known_rates(cell: tuple[int, float, float, float], known: dict[str, float]) -> None:
    """The rules pass as often as 200,000 resamples elsewhere said."""
    found = passes(*cell)
    assert {rule: found[rule] for rule in known} == pytest.approx(known, abs=0.012)


def test_wald_passes_on_no_evidence() -> None:
    """A t interval of [0, 0] is within any margin: it passes a third of candidates at the margin, ours none."""
    found = passes(100, 0.8, 0.01, 0.01, alpha=0.05)
    assert found["Wald/t (nel gate)"] == pytest.approx(0.366, abs=0.012)
    assert found["k2quant"] == 0


@pytest.mark.parametrize("freedom", [29, 99, 1318])
def test_student(freedom: int) -> None:
    """The series of Student's quantile is right to 1e-5."""
    assert gate_rules.student(0.975, freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-5)  # no scipy there


def test_sampled_is_exact() -> None:
    """Resamples pass and fail as often as enumeration says."""
    cell = gate_cells.of_kind("test", "it", 500, 0.02, flips=0.06, drop=0.03)
    found = gate_cells.measure(cell, 20_000, 2)
    assert found["passes"]["k2quant"] == pytest.approx(found["exact_pass"], abs=0.006)
    assert found["fails"] == pytest.approx(found["exact_fail"], abs=0.012)


def results(**worse: float) -> dict[str, Any]:
    """Return results of one cell of each kind, with some values changed."""
    cell = {"alpha": 0.05, "resamples": 2000, "drop": 0.01, "margin": 0.01, "group": "grid", "flags": 0.0}
    cell |= {"fails": 0.04, "exact_pass": 0.049, "exact_fail": 0.04, "passes": {"k2quant": worse.pop("passes", 0.05)}}
    same = cell | {"group": "A/A", "drop": 0.0, "planned": 0.05}
    edge = {"level": 0.05, "fail_level": 0.05, "alpha": 0.05} | worse
    return {"cells": [cell | worse, same], "edges": [edge]}


def test_bars_can_be_missed() -> None:
    """A rate above its ceiling misses its bar, and one far from the exact one another; no other bar is missed."""
    assert all(bar["met"] for bar in gate_report.bars(results()))
    for key, value, what in (
        ("passes", 0.0598, "false accepts, sampled"),
        ("fails", 0.06, "false FAILs, sampled"),
        ("exact_pass", 0.0501, "false accepts, exact"),
        ("level", 0.068, "edges"),
    ):
        missed = [bar["what"] for bar in gate_report.bars(results(**{key: value})) if not bar["met"]]
        others = [each for each in missed if not each.startswith(("sampled against exact", what))]
        assert missed[0].startswith(what)
        assert not others
    assert not list(gate_report.bars(results(exact_fail=0.01)))[-1]["met"]


def test_cells_sum_to_one() -> None:
    """Every cell of the grid is possible: no share below nothing, the drop as said."""
    for cell in (*gate_cells.grid(), *gate_cells.published(), *gate_cells.few_flips()):
        shares = np.array([cell.lost, cell.gained, cell.accuracy - cell.lost, 1 - cell.accuracy - cell.gained])
        assert (shares >= 0).all(), cell
        assert cell.drop == pytest.approx(cell.lost - cell.gained)


def test_restricted_shares_meet_their_bars_and_could_miss_them() -> None:
    """The comparison of a few items holds its level and loses nothing; with a gamma of a tenth of alpha it loses."""
    found = [gate_sharper.compared(149, 0.02, 0.05, upper=upper) for upper in (False, True)]
    assert all(bar["met"] for bar in gate_sharper.bars(found))
    worse = [gate_sharper.compared(149, 0.02, 0.05, upper=False, gamma=5e-3)]
    assert [bar["met"] for bar in gate_sharper.bars(worse)] == [True, False, False]
    over = [found[0] | {"level": 0.0501}]
    assert [bar["met"] for bar in gate_sharper.bars(over)] == [False, True, True]


def test_a_curve_that_lacks_an_outcome_is_shown() -> None:
    """One of 250 items at alpha .1 does: its p over all shares lies within gamma below alpha."""
    found = gate_sharper.compared(250, 0.05, 0.1, upper=True)
    assert (found["lost"], found["gained"] > 1) == (1, True)
    assert not gate_sharper.bars([found])[2]["met"]
    facts = {"cpu": "", "cores": 1, "load": 0.0, "versions": {}, "commit": "", "dirty": False, "seconds": 1.0}
    results = facts | {"gamma": 1e-6, "bars": [], "gammas": [], "found": [], "wide": 2, "wide_sizes": [250]}
    shown = gate_sharper.page(results | {"losing": [found]})
    assert "| 250 | 5.00 | 0.1 | FAIL | 1 | 16 | 20.00 | 0.7055 | 0.6994 | -0.0061 |" in shown
    assert "1 of them lack an outcome" in " ".join(shown.split())
    assert "the right verdict changes by -0.0061." in " ".join(shown.split())
    assert "\nNone.\n" in gate_sharper.page(results | {"losing": []})
