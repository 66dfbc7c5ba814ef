"""The solver's rates: bars on both sides of their limit, and a page of the contestants that were there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.solving import rates

SHAPES = {"gate and up": ((64, 128), 2), "down": ((128, 64), 1)}
FACTS = {"cpu": "a CPU", "cores": 2, "load": 0.0, "versions": {"torch": "2"}, "commit": "c", "dirty": False}


def row(who: str, of: str, seconds: float, error: float | None = None) -> dict[str, Any]:
    """Return a row of the results."""
    return {"who": who, "of": of, "median": seconds, "least": seconds, "most": seconds, "cores": 1, "own": 1} | {
        "error": error
    }


def results(ours: float, error: float, cores: float, hessian: float) -> dict[str, Any]:
    """Return made-up results: the peer takes 3 s with an error of 100; a whole product takes 2 s."""
    found: dict[str, Any] = {
        "solves": [row("k2quant", "down", ours, error), row("llm-compressor", "down", 3, 100)],
        "hessians": [row("torch", "down", 2), row("k2quant", "down", hessian)],
        "chunk": row("k2quant", "chunk", 10) | {"cores": cores, "experts": 8},
        "threads": 2,
        "rounds": 1,
        "tokens": {"64": 5},
        "peers": [],
    }
    return found | {"bars": list(rates.bars(found))}


def test_bars_are_met_up_to_their_limit_and_missed_beyond() -> None:
    """Three times as fast, one part in a hundred of error, 85% of the cores, 1.3 times half a product."""
    assert [bar["met"] for bar in results(1, 101, 17, 1.3)["bars"]] == [True] * 4
    assert [bar["met"] for bar in results(1.01, 101.1, 16.9, 1.31)["bars"]] == [False] * 4


def test_the_page_shows_what_was_missed() -> None:
    """A bar that is missed stands there like one that is met."""
    page = rates.page(results(1, 102, 17, 1) | FACTS | {"command": "python -m x"})
    assert "1.0200 | **missed**" in page
    assert "3.00x | met" in page


def test_without_peers_ours_are_measured_alone(tmp_path: Path) -> None:
    """The same way, on matrices of any size, in processes of their own; no bar against a peer is claimed."""
    found = rates.compare(tmp_path, None, 1, shapes=SHAPES, tokens={128: 200, 64: 100}, rounds=1)
    assert [each["who"] for each in found["solves"]] == ["k2quant", "k2quant"]
    assert all(each["error"] > 0 for each in found["solves"])
    assert [bar["what"] for bar in found["bars"] if "llm" in bar["what"]] == []
    assert len(found["bars"]) == 3
