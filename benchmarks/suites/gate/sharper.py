"""What a restricted share of flips wins: the gate's rule beside the one that looks at all shares, by enumeration.

Example:
    PYTHONPATH=benchmarks python -m suites.gate.sharper
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2quant.eval.statistics.exact import LargestChance, chance
from k2quant.eval.statistics.restricted import GAMMA, critical_curve
from suites.common import machine
from suites.gate import report

SIZES, MARGINS, ALPHAS = (149, 299, 500, 1319), (0.01, 0.02), (0.05, 0.025)
FLIPS = (0.01, 0.02, 0.04, 0.1, 0.2)
GAMMAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
RESULTS = Path("benchmarks/results/gate-sharper.json")
CHOICE = (60, 149)
"""Items at which gamma was chosen."""
WIDE_SIZES, WIDE_MARGINS = (77, 164, 198, 250), (0.005, 0.01, 0.02, 0.03, 0.05)
WIDE_ALPHAS = (0.1, 0.05, 0.025, 0.01, 0.001, 0.0001)
"""Where outcomes are looked for that are lost: more margins and alphas than the bars have, at sizes that are cheap."""

PAGE = """# A sharper gate at the same level: what restricting the share of flips wins

Written by `PYTHONPATH=benchmarks python -m suites.gate.sharper`; do not edit. All is
enumerated, nothing sampled.

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}. {seconds:.0f} s.

An exact test takes the largest chance over the unknown share of flips. "All shares" takes it over all that there are,
"restricted" over those within their interval at 1 - gamma, and adds gamma to p. gamma is {gamma:g}.

## Bars

{bars}

## The choice of gamma

Curves are sets of outcomes that pass, or fail, at {choice} items, margins of 1 and 2 pp, alpha .05 and .025. "Lost"
are curves that lack an outcome that all shares have. Chances are of PASS without a drop, and of FAIL at twice the
margin, at 1, 2, 4, 10 and 20% flips. A large gamma loses outcomes whose p-value is just below alpha, a small one allows
more shares; the one taken loses nothing, with room for many items, where p-values lie closer together.

{gammas}

## Where an outcome is lost

No p is more than gamma above the one over all shares. So an outcome can be lost only where the latter lies within gamma
below alpha: by chance, in few curves. {wide} more were looked at, of {sizes} items, with
margins of 0.5 to 5 pp and alpha from .1 to .0001. {lacking} of them lack an outcome ("lost"; "won" are those that they
have besides). In the worst of their cells the chance of the right verdict changes by {least:+.4f}.

{losing}

## Chances of a verdict

PASS of a candidate without a drop, FAIL of one that drops twice the margin, and the largest level of the rule over all
shares of flips.

{rows}
"""


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def compared(n: int, margin: float, alpha: float, *, upper: bool, gamma: float = GAMMA) -> dict[str, Any]:
    """Return what both rules do with n items: chances at each share of flips, and the level of the restricted one."""
    kept, tried = (critical_curve(n, margin, alpha, upper=upper, gamma=each) for each in (0.0, gamma))
    won = (kept - tried) if upper else (tried - kept)
    drop = 2 * margin if upper else 0.0
    cells = []
    for flips in (each for each in FLIPS if each >= drop):
        losses = (flips + drop) / (2 * flips)
        old, new = (chance(curve, n, flips, losses, upper=upper) for curve in (kept, tried))
        cells.append({"flips": flips, "old": old, "new": new})
    return {
        "n": n,
        "margin": margin,
        "alpha": alpha,
        "verdict": "FAIL" if upper else "PASS",
        "gamma": gamma,
        "lost": int(-won.clip(max=0).sum()),
        "gained": int(won.clip(min=0).sum()),
        "level": LargestChance(n, margin, upper=upper).of(tried),
        "cells": cells,
    }


def comparisons(
    sizes: tuple[int, ...],
    gamma: float = GAMMA,
    *,
    margins: tuple[float, ...] = MARGINS,
    alphas: tuple[float, ...] = ALPHAS,
) -> Iterator[dict[str, Any]]:
    """Yield a comparison for each size, margin, alpha and verdict."""
    for n in sizes:
        for margin in margins:
            for alpha in alphas:
                tell(f"n {n}, margin {margin}, alpha {alpha}, gamma {gamma:g}")
                for upper in (False, True):
                    yield compared(n, margin, alpha, upper=upper, gamma=gamma)


def won(found: list[dict[str, Any]]) -> list[float]:
    """Return by how much the chance of the right verdict rises in each cell."""
    return [cell["new"] - cell["old"] for each in found for cell in each["cells"]]


def choice(gamma: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return what a gamma wins and loses."""
    found = list(comparisons(sizes, gamma))
    return {
        "gamma": gamma,
        "curves": len(found),
        "lost": sum(each["lost"] > 0 for each in found),
        "mean": sum(won(found)) / len(won(found)),
        "most": max(won(found)),
        "least": min(won(found)),
    }


def losing(sizes: tuple[int, ...]) -> tuple[int, list[dict[str, Any]]]:
    """Return how many curves of more margins and alphas were looked at, and those of them that lack an outcome."""
    found = list(comparisons(sizes, margins=WIDE_MARGINS, alphas=WIDE_ALPHAS))
    return len(found), [each for each in found if each["lost"]]


def bars(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the restricted rule is held to."""
    over = max(each["level"] - each["alpha"] for each in found)
    return [
        {
            "what": f"level over all shares of flips, {len(found)} curves",
            "bar": "alpha",
            "measured": f"alpha {over:+.6f} in the worst",
            "met": over <= 0,
        },
        {
            "what": f"chance of the right verdict, {len(won(found))} cells",
            "bar": "no less than over all shares",
            "measured": f"{min(won(found)):+.4f} to {max(won(found)):+.4f}",
            "met": min(won(found)) >= -1e-12,
        },
        {
            "what": f"outcomes that the rule decided over all shares, {len(found)} curves",
            "bar": "decided still",
            "measured": f"{sum(each['lost'] > 0 for each in found)} curves lack one",
            "met": not any(each["lost"] for each in found),
        },
    ]


GAMMA_COLUMNS: dict[str, report.Show] = {
    "gamma": lambda row: f"{row['gamma']:g}",
    "curves": report.text("curves"),
    "lost": report.text("lost"),
    "mean gain": lambda row: f"{row['mean']:+.4f}",
    "largest": lambda row: f"{row['most']:+.4f}",
    "smallest": lambda row: f"{row['least']:+.2g}",
}

COLUMNS: dict[str, report.Show] = {
    "n": report.whole("n"),
    "margin pp": report.points("margin"),
    "alpha": report.text("alpha"),
    "verdict": report.text("verdict"),
    "flips %": report.points("flips"),
    "all shares": report.rate("old", 4),
    "restricted": report.rate("new", 4),
    "won": lambda row: f"{row['new'] - row['old']:+.4f}",
    "level": lambda row: f"{row['level']:.5f}",
}


LOST_COLUMNS = {name: COLUMNS[name] for name in ("n", "margin pp", "alpha", "verdict")} | {
    "lost": report.text("lost"),
    "won": report.text("gained"),
    **{name: COLUMNS[name] for name in ("flips %", "all shares", "restricted")},
    "change": COLUMNS["won"],
}


def page(results: dict[str, Any]) -> str:
    """Return the page of results."""
    lost = [each | cell for each in results["losing"] for cell in each["cells"]]
    rows = [each | cell for each in results["found"] for cell in each["cells"]]
    shown = {
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "dirty": ", changed since" if results["dirty"] else "",
        "choice": " and ".join(map(str, CHOICE)),
        "bars": report.table(report.BARS, results["bars"]),
        "gammas": report.table(GAMMA_COLUMNS, results["gammas"]),
        "sizes": ", ".join(map(str, results["wide_sizes"])),
        "lacking": len(results["losing"]),
        "least": min((cell["new"] - cell["old"] for cell in lost), default=0.0),
        "losing": report.table(LOST_COLUMNS, lost) if lost else "None.",
        "rows": report.table(COLUMNS, rows),
    }
    return PAGE.format(**results | shown)


def main() -> None:
    """Compare, and write the results; exit 3 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few items alone")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go")
    given = parser.parse_args()
    begun = time.perf_counter()
    files = [f"eval/statistics/{name}.py" for name in ("binomial", "exact", "restricted", "tango")]
    results = machine.facts("PYTHONPATH=benchmarks python -m suites.gate.sharper", *files) | {"gamma": GAMMA}
    results["gammas"] = [choice(gamma, CHOICE[:1] if given.short else CHOICE) for gamma in GAMMAS]
    results["found"] = list(comparisons(SIZES[:1] if given.short else SIZES))
    sizes = WIDE_SIZES[:1] if given.short else WIDE_SIZES
    results["wide_sizes"] = sizes
    results["wide"], results["losing"] = losing(sizes)
    results["bars"] = bars(results["found"])
    results["seconds"] = time.perf_counter() - begun
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    given.json.with_suffix(".md").write_text(page(results))
    print(report.table(report.BARS, results["bars"]))
    if not all(bar["met"] for bar in results["bars"]):
        sys.exit(3)


if __name__ == "__main__":
    main()
