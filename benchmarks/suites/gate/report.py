"""What the gate is held to, and the page of the proof."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from suites.gate.rules import RULES, ceiling

PAGE = """# The gate of `k2quant eval`: how often it is wrong, and what other rules do in its place

Written by `benchmarks/gate.py`; do not edit. `{command}`

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}. {seconds:.0f} s,
of which {scoring:.0f} s for the answers{kept}; seed {seed}.

{items:,} held-out items of nano-K2 ({accuracy:.1%} right in BF16), scored whole and with each damage. A cell is a kind
of candidate, a number of items and a margin; {resamples:,} resamples are drawn of each, with replacement, so that the
drop over all items is the exact truth. "Exact" is the same by enumeration of every outcome. alpha is 0.05 unless said
otherwise. The rules, by when they pass a candidate:

- k2quant: the exact p of "the drop is at least the margin" is at most alpha.
- score test: the same by Tango's Z and the normal quantile.
- Wald/t (nel gate): the upper end of the paired drop's t interval at 1 - alpha, two-sided and without clusters, is
  within the margin. So its own ceiling is half of alpha.
- McNemar: its exact one-sided p is not significant.
- unpaired 2 SE: the accuracies are within two standard errors of their difference, as if of different items.
- llm-compressor: recovery, after rounding to 2 decimals, is at least 0.95.
- vLLM: at least 0.92 of, or at most 0.08 below, a constant, which here is the baseline's true accuracy.

## Bars

{bars}

## Planted damage behind a gate of 1 pp and 1,319 items

P(PASS), P(FAIL) and P(INCONCLUSIVE) are exact. "Flag" is how often McNemar's detector warns.
INT2 to INT4: rounding to the nearest code, groups of 32. One scale, or the first scale of every row, of one expert's
`down_proj` 16 times too large. Swapped nibbles: routed experts in INT4, all weights of one of them swapped with their
neighbours. No router bias, no shared expert: zeros in all layers. A/A: the same weights twice.

{plants}

## Candidates that must not pass: the margin is the plant's own drop

Share of resamples that pass; the ceiling for k2quant is {ceiling:.4f}, alpha and two standard errors.

{boundary}

## As CIs have it

A: 1,319 items, accuracy .92, 4% flips. B: 1,000 items, accuracy .75, 10% flips. Where the drop is the margin or more, a
PASS is a mistake.

{published}

## Few flips, at alpha .025

The drop is at the margin or above: .025 is the ceiling.

{few}

## The edges where nothing flips

Largest level over all shares of flips, alpha .05: of PASS, of FAIL, and of the score test's PASS.

{edges}

## Planned power

Items that `plan` names for a power of 0.8, the power it names, and what resamples gave.

{planned}

## The same model twice

Flips, FAILs and flags of A/A pairs, of {resamples:,} resamples each.

{same}

## No drop, half the margin, the margin, twice the margin

"One-way": every flip is a loss. "Mixed": 4% more flips, half of them losses. PASS and FAIL are exact, with the sampled
ones in brackets.

{grid}
"""


Row = Mapping[str, Any]
"""A cell, an edge or a bar."""

Show = Callable[[Row], str]
"""Writes what stands in one column of a row's line."""


def table(columns: Mapping[str, Show], rows: Iterable[Row]) -> str:
    """Return a Markdown table with these columns, a line for each row."""
    lines = [list(columns), ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(key: str) -> Show:
    """Show something as it is."""
    return lambda row: str(row[key])


def whole(key: str) -> Show:
    """Show a whole number."""
    return lambda row: f"{row[key]:,}"


def points(key: str) -> Show:
    """Show a share in percentage points."""
    return lambda row: f"{100 * row[key]:.2f}"


def rate(key: str, digits: int) -> Show:
    """Show a share of the resamples, or a chance."""
    return lambda row: f"{row[key]:.{digits}f}"


def passing(rule: str) -> Show:
    """Show the share of the resamples that pass by a rule."""
    return lambda row: f"{row['passes'][rule]:.3f}"


RULES_OF: dict[str, Show] = {
    "candidate": text("name"),
    "n": whole("n"),
    "margin pp": points("margin"),
    "drop pp": points("drop"),
    "flips %": points("flips"),
    "exact": rate("exact_pass", 4),
    **{rule: passing(rule) for rule in RULES},
}
"""Of cells: the share that passes by each rule."""

PLANTS: dict[str, Show] = {
    "damage": text("name"),
    "true drop pp": points("drop"),
    "flips %": points("flips"),
    "P(PASS)": rate("exact_pass", 3),
    "P(FAIL)": rate("exact_fail", 3),
    "P(INCONCLUSIVE)": lambda cell: f"{max(0.0, 1 - cell['exact_pass'] - cell['exact_fail']):.3f}",
    "flag": rate("flags", 3),
}

EDGES: dict[str, Show] = {
    "n": text("n"),
    "margin pp": points("margin"),
    "passes without flips": lambda row: "yes" if row["without_flips"] else "no",
    "PASS": rate("level", 4),
    "FAIL": rate("fail_level", 4),
    "score test": rate("score_level", 4),
}

PLANNED: dict[str, Show] = {
    "candidate": text("name"),
    "margin pp": points("margin"),
    "drop pp": points("drop"),
    "flips %": points("flips"),
    "items": whole("n"),
    "plan": rate("planned", 3),
    "sampled": passing("k2quant"),
}

SAME: dict[str, Show] = {
    "pair": text("name"),
    "n": whole("n"),
    "flips %": points("flips"),
    "drop pp": points("drop"),
    "FAIL": rate("fails", 4),
    "flag": rate("flags", 4),
    "PASS by numbers alone": passing("k2quant"),
}
"""Of A/A pairs."""

GRID: dict[str, Show] = {
    "flips": text("name"),
    "n": whole("n"),
    "margin pp": points("margin"),
    "drop pp": points("drop"),
    "PASS": lambda cell: f"{cell['exact_pass']:.4f} ({cell['passes']['k2quant']:.4f})",
    "FAIL": lambda cell: f"{cell['exact_fail']:.4f} ({cell['fails']:.4f})",
    "score test": passing("score test"),
    "Wald/t (nel gate)": passing("Wald/t (nel gate)"),
}

BARS: dict[str, Show] = {
    "what": text("what"),
    "bar": text("bar"),
    "measured": text("measured"),
    "": lambda bar: "met" if bar["met"] else "**missed**",
}


def bars(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the gate is held to, and the worst that was measured."""
    cells = results["cells"]
    bad = [cell for cell in cells if cell["drop"] >= cell["margin"] - 1e-12]
    good = [cell for cell in cells if cell["drop"] <= cell["margin"] + 1e-12]
    alike = [cell for cell in cells if cell["group"] == "A/A"]
    gaps = [abs(cell["passes"]["k2quant"] - cell["planned"]) for cell in cells if "planned" in cell]
    edge_rows = results["edges"]
    yield _levels("false accepts, sampled", [(cell["passes"]["k2quant"], cell) for cell in bad])
    yield _levels("false FAILs, sampled", [(cell["fails"], cell) for cell in good])
    yield _exact("false accepts, exact", [cell["exact_pass"] - cell["alpha"] for cell in bad])
    yield _exact("false FAILs, exact", [cell["exact_fail"] - cell["alpha"] for cell in good])
    yield _exact("edges without flips, worst share of flips", [row["level"] - row["alpha"] for row in edge_rows])
    yield _exact("the same, FAIL", [row["fail_level"] - row["alpha"] for row in edge_rows])
    yield {
        "what": f"power against `plan`, {len(gaps)} cells",
        "bar": "within 3 points",
        "measured": f"{100 * max(gaps):.2f} points at most",
        "met": max(gaps) <= 0.03,
    }
    yield _levels("A/A: FAIL", [(cell["fails"], cell) for cell in alike])
    yield _levels("A/A: McNemar's flag", [(cell["flags"], cell) for cell in alike])
    yield _agreement(cells)


def _levels(what: str, rates: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    over = [rate - ceiling(cell["alpha"], cell["resamples"]) for rate, cell in rates]
    rate, cell = rates[over.index(max(over))]
    return {
        "what": f"{what}, {len(rates)} cells",
        "bar": "alpha + 2 standard errors",
        "measured": f"{rate:.4f} of {ceiling(cell['alpha'], cell['resamples']):.4f} in the worst cell",
        "met": max(over) <= 0,
    }


def _agreement(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Hold what was sampled against what was enumerated; a normal number is beyond 4.5 once in 150,000."""
    pairs = [(cell["passes"]["k2quant"], cell["exact_pass"], cell["resamples"]) for cell in cells]
    pairs += [(cell["fails"], cell["exact_fail"], cell["resamples"]) for cell in cells]
    far = [
        abs(seen - true) / math.sqrt(true * (1 - true) / count) for seen, true, count in pairs if 0.001 < true < 0.999
    ]
    return {
        "what": f"sampled against exact rates from .001 to .999, {len(far)} rates",
        "bar": "within 4.5 standard errors",
        "measured": f"{max(far):.2f} at most, root mean square {math.hypot(*far) / math.sqrt(len(far)):.2f}",
        "met": max(far) <= 4.5,
    }


def _exact(what: str, over: list[float]) -> dict[str, Any]:
    return {
        "what": f"{what}, {len(over)} cells",
        "bar": "alpha",
        "measured": f"alpha {max(over):+.5f} in the worst cell",
        "met": max(over) <= 1e-9,
    }


def page(results: dict[str, Any]) -> str:
    """Return the page of results."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        groups.setdefault(cell["group"], []).append(cell)
    shown = {
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "dirty": ", changed since" if results["dirty"] else "",
        "kept": ", kept from an earlier run" if results["kept"] else "",
        "ceiling": ceiling(0.05, results["resamples"]),
        "bars": table(BARS, results["bars"]),
        "plants": table(PLANTS, groups["plants"]),
        "boundary": table(RULES_OF, groups["plant at its own drop"]),
        "published": table(RULES_OF, groups["CI"]),
        "few": table(RULES_OF, groups["few flips"]),
        "edges": table(EDGES, results["edges"]),
        "planned": table(PLANNED, groups["plan"]),
        "same": table(SAME, groups["A/A"]),
        "grid": table(GRID, groups["grid"]),
    }
    return PAGE.format(**results | shown)
