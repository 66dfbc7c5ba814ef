"""FP4's rates: all conversions and products run on small matrices, and bars are told on both sides of their limit."""

from __future__ import annotations

import sys
from typing import Any

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.fp4 import rates

FACTS = {"cpu": "a CPU", "cores": 2, "load": 0.0, "versions": {"torch": "2"}, "commit": "c", "dirty": False}


def made_up(share: float, times: float) -> dict[str, Any]:
    """Return results in which all rates are a share of their bars, and a product takes so many times INT4's time."""
    row = {"least": 1.0, "most": 1.0, "core": 1.0}
    conversions = [{"what": what, "median": bar * share} | row for what, bar in rates.LEAST.items()]
    product = {"shape": "8 x 32", "what": "NVFP4", "median": 1.0, "times": times} | row
    found: dict[str, Any] = {
        "conversions": [*conversions, {"what": "no bar", "median": 0.0} | row],
        "products": [product | {"what": "INT4"}, product],
        "threads": 2,
        "runs": 1,
        "rows": 8,
        "columns": 32,
        "panel": 4,
        "copies": 1,
    }
    return found | {"bars": list(rates.bars(found))}


def test_bars_are_met_up_to_their_limit_and_missed_beyond() -> None:
    """A rate that is its bar, and 1.3 times INT4's time, are met; a hundredth beside is not, and the page says so."""
    assert [bar["met"] for bar in made_up(1.0, 1.3)["bars"]] == [True] * 7
    missed = made_up(0.99, 1.31)
    assert [bar["met"] for bar in missed["bars"]] == [False] * 7
    assert rates.page(missed | FACTS | {"command": "python -m x"}).count("**missed**") == 7


def test_every_conversion_and_product_is_measured() -> None:
    """On a matrix of two blocks of FP8: each bar has its row, and every rate and time is above zero."""
    found = rates.measure(threads=1, runs=1, shape=(256, 128), shapes=((32, 64),), copies=1)
    assert set(rates.LEAST) <= {row["what"] for row in found["conversions"]}
    assert all(row["median"] > 0 and row["core"] > 0 for row in found["conversions"])
    assert [row["what"] for row in found["products"]] == ["INT4", "NVFP4", "MXFP4"]
    assert len(found["bars"]) == len(rates.LEAST) + 2
