"""The page of QAT's benchmark: it is what its results say, and answers right stand beside every share of a loss."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.qat import report as qat_report
from suites.qat import summaries as qat_statistics

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def facts() -> dict[str, Any]:
    """What the committed file holds."""
    found: dict[str, Any] = json.loads((RESULTS / "qat.json").read_text())
    return found


def test_the_page_is_what_its_results_say(facts: dict[str, Any]) -> None:
    """Written anew from the committed results, page and bars are the committed ones."""
    assert qat_report.page(facts) == (RESULTS / "qat.md").read_text()
    assert list(qat_report.bars(facts)) == facts["bars"]


def test_answers_stand_beside_every_share(facts: dict[str, Any]) -> None:
    """Wherever the page says what part of a loss came back, it says how many answers are right."""
    page = qat_report.page(facts)
    shares = [line for line in page.splitlines() if "of the loss" in line and "%" in line]
    assert len(shares) >= 5
    assert all("answers right, of" in line for line in shares)


def test_right_answers_are_those_of_the_arms(facts: dict[str, Any]) -> None:
    """The shares of the table are sums over the seeds of control and arm."""
    for row in qat_report.rows_of(facts):
        arms = {
            kind: [one for one in facts["arms"] if (one["kind"], one["bits"]) == (kind, row.bits)]
            for kind in ("control", row.kind)
        }
        assert row.accuracy == (
            qat_statistics.right(arms["control"], "unrounded"),
            qat_statistics.right(arms["control"], "rounded"),
            qat_statistics.right(arms[row.kind], "rounded"),
        )


def test_what_is_kept_gives_the_rows_back() -> None:
    """Rows, variants and the rest survive JSON, and a gap that is noise has no share in it either."""
    dice = [0.1, 0.3, 0.2, 0.4]

    def scored(loss: float) -> dict[str, Any]:
        return {"losses": [loss + one for one in dice], "right": 3, "count": 4}

    results = {
        (seed, kind, 2): {"rounded": scored(rounded), "unrounded": scored(1.0)}
        for seed in (0, 1, 2)
        for kind, rounded in (("control", 2.0 + seed), ("plain", 1.5), ("learned", 1.25))
    }
    kept = json.loads(json.dumps(qat_statistics.summary(results)))
    assert qat_report.rows_of(kept) == qat_statistics.rows(results, ["plain", "learned"], (2,))
    assert kept["rows"][0]["share"] is not None
    assert kept["variants"] == [{"bits": 2, "kind": "learned", "below_plain": pytest.approx([0.25, 0.25, 0.25])}]
    noisy = copy.deepcopy(results)
    noisy[0, "control", 2]["unrounded"]["losses"] = [0.0, 2.6, 0.0, 2.6]
    assert qat_report.rows_of(json.loads(json.dumps(qat_statistics.summary(noisy))))[0].share is None
