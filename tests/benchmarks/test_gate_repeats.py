"""The proof of repeats: populations with known drops, rules that hold and rules that break, bars that can be missed."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.gate import repeats as gate_repeats
from suites.gate import repeats_report


def cell(**given: Any) -> gate_repeats.Cell:
    """Return a cell."""
    usual = {"group": "test", "population": "certain", "kind": "one-way", "n": 299, "repeats": 4, "margin": 0.01}
    return gate_repeats.Cell(**{**usual, "drop": 0.01, **given})


@pytest.mark.parametrize("kind", list(gate_repeats.KINDS))
@pytest.mark.parametrize("population", list(gate_repeats.POPULATIONS))
def test_the_drop_is_the_truth(population: str, kind: str) -> None:
    """Whatever the items are and however they are lost, the mean chance falls by the drop, and chances stay chances."""
    p = gate_repeats.POPULATIONS[population]()
    q = gate_repeats.KINDS[kind](p, 0.02)
    assert p.mean() - q.mean() == pytest.approx(0.02, abs=1e-12)
    assert q.min() >= 0
    assert q.max() <= 1
    assert p.mean() == pytest.approx(0.8, abs=0.05)


def test_classes_are_what_items_do() -> None:
    """The classes of an item's repeats have the shares that asking gives, and the drop as their mean."""
    random = np.random.default_rng(0)
    p, q = random.random(50), random.random(50)
    classes, shares = gate_repeats.class_shares(p, q, 3)
    assert (classes.sum(axis=1) == 3).all()
    lost = shares @ classes[:, 1] / 3
    gained = shares @ classes[:, 2] / 3
    assert lost - gained == pytest.approx(p.mean() - q.mean(), abs=1e-12)
    assert lost == pytest.approx((p * (1 - q)).mean(), abs=1e-12)
    one = {tuple(each): share for each, share in zip(*gate_repeats.class_shares(p[:1], q[:1], 1), strict=True)}
    assert one[0, 1, 0, 0] == pytest.approx(p[0] * (1 - q[0]))


def test_who_holds_the_level_and_who_does_not() -> None:
    """Nothing flips but what is lost: at the edge ours passes one in twenty, t and repeats as items one in six."""
    found = gate_repeats.measure(cell(), 3000, 1)["passes"]
    assert found["k2quant"] == pytest.approx(0.99**299, abs=0.012)
    assert found["one repeat"] == pytest.approx(0.99**299, abs=0.012)
    assert found["cluster t"] > 0.15
    assert found["repeats as items"] > 0.15
    assert found["betting"] <= 0.06
    assert gate_repeats.measure(cell(n=298), 500, 1)["passes"]["k2quant"] == 0


def test_what_judges_single_answers_is_measured_alone() -> None:
    """On the very resamples that all rules see."""
    for one in (cell(n=100), cell(population="beta, .5", kind="mixed", n=300, repeats=4)):
        whole, single = gate_repeats.measure(one, 200, 5)["passes"], gate_repeats.measure_single(one, 200, 5)
        assert single == {name: whole[name] for name in gate_repeats.SINGLE}


def test_more_repeats_win_where_answers_are_noise() -> None:
    """Without a drop repeats help where answers are drawn by chance; betting, as safe, wins less."""
    few, many = (
        gate_repeats.measure(cell(population="beta, .1", n=1000, margin=0.02, drop=0.0, repeats=repeats), 800, 2)
        for repeats in (2, 8)
    )
    assert many["passes"]["k2quant"] > few["passes"]["k2quant"] + 0.1
    assert many["passes"]["betting"] < many["passes"]["k2quant"]
    assert many["fails"] == 0


def test_a_plan_is_kept() -> None:
    """As many items as the plan names give the power it names, within five points of 600 resamples."""
    rows = list(gate_repeats.planned(600, 3))
    assert max(abs(row["plan"] - row["sampled"]) for row in rows) < 0.06


def results(**given: float) -> dict[str, Any]:
    """Return results of one cell at the margin, with a plan."""
    passes = dict.fromkeys(gate_repeats.RULES, 0.04) | {"k2quant": given.get("passes", 0.04)}
    one = {"group": "level", "drop": 0.01, "margin": 0.01, "passes": passes, "fails": given.get("fails", 0.03)}
    plan = {"plan": 0.8, "sampled": given.get("sampled", 0.81)}
    return {"cells": [one], "resamples": 2000, "planned": [plan], "edges": [{"level": given.get("level", 0.0495)}]}


@pytest.mark.parametrize("worse", [{}, {"passes": 0.07}, {"fails": 0.06}, {"sampled": 0.84}, {"level": 0.0501}])
def test_bars_can_be_missed(worse: dict[str, float]) -> None:
    """Each bar is met by what is good, and missed by the one number that is not."""
    missed = [bar for bar in repeats_report.bars(results(**worse)) if not bar["met"]]
    assert len(missed) == len(worse)


def test_the_section_has_every_table() -> None:
    """A line for each population and number of repeats, and for each edge."""
    rates = {"passes": dict.fromkeys(gate_repeats.RULES, 0.04), "fails": 0.03}
    cells = [dataclasses.asdict(each) | rates for each in gate_repeats.cells()]
    facts = {"command": "it", "cpu": "c", "cores": 1, "load": 0.5, "versions": {"numpy": "2"}, "commit": "abc"}
    found = facts | {"dirty": False, "seconds": 1.0, "seed": 0, "resamples": 2000, "cells": cells, "single": []}
    found |= {"planned": [], "bars": [], "edges": list(gate_repeats.edges())}
    text = repeats_report.section(found)
    assert "| 30% uncertain | 8 |" in text
    assert "anew" not in text
    told = repeats_report.section(found | {"again": facts | {"dirty": True, "seconds": 2.0, "load": 0.1}})
    assert "changed: `it`, load 0.1; numpy 2; commit\nabc, changed since. 2 s." in told
    assert "| 299 | 1.00 | 4 | no | 0.0495 |" in text  # (1 - margin) ** n
    assert "{" not in text
