"""What the gate of items with repeats is held to, and its section on the page."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from suites.gate.repeats import ALPHA, EDGES, KINDS, MARGINS, POPULATIONS, REPEATS, RULES
from suites.gate.report import BARS, Row, Show, passing, points, rate, table, text, whole
from suites.gate.rules import ceiling

SECTION = """
# Items that are asked several times

`{command}`

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}. {seconds:.0f} s; seed {seed}.
{again}
An item's difference x is the share of its repeats that the candidate has right, less the baseline's; the item is the
cluster. Populations of 2,000 items, each with a chance of being right, from which items are drawn with replacement, so
that the truth is known; {resamples:,} resamples of each cell. "Certain": 80% of the items are always right, the others
never. "5% uncertain": a coin decides 5% of the items. "30% uncertain": 15% are right with chance .7 and 15% with .3.
"Beta": chances are beta-distributed around .8, with this correlation between two answers to one item. The drop is
"one-way" (some items are lost for good), "everywhere" (each item is a little less likely) or "mixed" (one-way, and 4%
of the items swap their chances among each other). Sizes, repeats and margins: 100, 300, 1,000 and 2,000 items; 2, 4 and
8; 1 and 2 pp. The rules, by when they pass a candidate:

- k2quant: Gaffke's p of "the drop is at least the margin" is at most alpha. Its level is a theorem (Vlassis and Thomas,
  arXiv 2607.08415) for items drawn independently; these cells test the theorem's use and the numerics.
- betting: a wealth of 1 / alpha, at any time, by bets on x in a random order. Its level is proven too.
- cluster t: the t interval of the items' x. cluster score: a normal score with the variance of x about the margin (as
  Obuchowski, Statistics in Medicine 17:1495, 1998).
- majority: the exact test of items that at least half of their repeats have right: another question.
- repeats as items: the exact test, as if each repeat were an item.
- one repeat: the exact test of one repeat alone, as if the others had not been paid for.

{bars}

## How often a drop of the margin passes

The largest share over all cells of a kind of population; the ceiling is {ceiling:.4f}, alpha and two standard errors.

{levels}

In how many of the {level_count} cells a rule is above the ceiling:

{over}

The same, where nothing flips but what is lost ("certain", "one-way"). There the level of k2quant is known by
enumeration, "exact"; shares of {resamples:,} resamples lie around it.

{edges}

## What repeats and methods are worth: P(PASS) without a drop, 1,000 items, 1 pp

"One-way" and "everywhere" are the same here: both models are equally likely right on every item. P(PASS) of "cluster
t", "cluster score" and "repeats as items" is that of rules that break their level elsewhere.

{power}

## Half the margin, and twice the margin, 1,000 items, 1 pp

P(PASS) at half the margin, P(FAIL) at twice the margin.

{other}

## Planned power

Items that `plan` names at a margin of 1 pp for a power of .8, the power it names and what ten times as many resamples
gave; of items of which some flip for good and of some a coin decides both models' answers.

{planned}

## What it would cost to judge single answers by this bound

Items for a power of .8 with one answer to each: by the exact test, which the gate keeps there, and by Gaffke's bound.

{single}
"""

AGAIN = """
Majority, repeats as items, one repeat and the last table judge single answers by the exact test. They were measured
anew, on the same resamples, when that test had changed: `{command}`, load {load:.1f}; {versions}; commit
{commit}{dirty}. {seconds:.0f} s.
"""

LEVELS: dict[str, Show] = {
    "population": text("population"),
    "repeats": whole("repeats"),
    **{rule: rate(rule, 3) for rule in RULES},
    "FAIL": rate("fails", 3),
}

POWER: dict[str, Show] = {
    "population": text("population"),
    "drop": text("kind"),
    "repeats": whole("repeats"),
    **{rule: passing(rule) for rule in RULES},
}

OTHER: dict[str, Show] = {
    "population": text("population"),
    "drop": text("kind"),
    "repeats": whole("repeats"),
    "PASS at half": rate("half", 3),
    "cluster t": rate("half_t", 3),
    "FAIL at twice": rate("twice", 3),
}

EDGE: dict[str, Show] = {
    "n": whole("n"),
    "margin pp": points("margin"),
    "repeats": whole("repeats"),
    "passes without flips": lambda row: "yes" if row["without"] == 1 else "no",
    "exact": rate("level", 4),
    **{rule: passing(rule) for rule in RULES},
}

PLANNED: dict[str, Show] = {
    "flips %": points("flips"),
    "correlation": text("correlation"),
    "repeats": whole("repeats"),
    "items": whole("items"),
    "plan": rate("plan", 3),
    "sampled": rate("sampled", 3),
}

SINGLE: dict[str, Show] = {
    "margin pp": points("margin"),
    "flips %": points("flips"),
    "exact test": whole("exact"),
    "Gaffke's bound": whole("bound"),
    "more items": lambda row: f"{row['bound'] / row['exact'] - 1:.1%}",
}


def bars(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what repeats are held to, and the worst that was measured."""
    bad = [cell for cell in found["cells"] if cell["drop"] >= cell["margin"] and cell["group"] != "edge"]
    good = [cell for cell in found["cells"] if cell["drop"] <= cell["margin"]]
    yield _worst("repeats: false accepts", [cell["passes"]["k2quant"] for cell in bad], found["resamples"])
    yield _worst("repeats: false FAILs", [cell["fails"] for cell in good], found["resamples"])
    over = max(row["level"] for row in found["edges"]) - ALPHA
    yield {
        "what": f"repeats: edges without flips, exact, {len(found['edges'])} cells",
        "bar": "alpha",
        "measured": f"alpha {over:+.5f} in the worst cell",
        "met": over <= 1e-9,
    }
    gaps = [abs(row["plan"] - row["sampled"]) for row in found["planned"]]
    yield {
        "what": f"repeats: power against the plan, {len(gaps)} cells",
        "bar": "within 3 points",
        "measured": f"{100 * max(gaps):.2f} points at most",
        "met": max(gaps) <= 0.03,
    }


def _worst(what: str, rates: list[float], resamples: int) -> dict[str, Any]:
    most = ceiling(ALPHA, resamples)
    return {
        "what": f"{what}, {len(rates)} cells",
        "bar": "alpha + 2 standard errors",
        "measured": f"{max(rates):.4f} of {most:.4f} in the worst cell",
        "met": max(rates) <= most,
    }


def section(found: dict[str, Any]) -> str:
    """Return the section of the page."""
    level = [cell for cell in found["cells"] if cell["group"] == "level"]
    most = ceiling(ALPHA, found["resamples"])
    over = {rule: sum(cell["passes"][rule] > most for cell in level) for rule in RULES}
    shown = {
        **_told(found),
        "again": AGAIN.format(**found["again"] | _told(found["again"])) if "again" in found else "",
        "ceiling": most,
        "level_count": len(level),
        "bars": table(BARS, found["bars"]),
        "levels": table(LEVELS, _levels(level)),
        "over": table({rule: whole(rule) for rule in RULES}, [over]),
        "edges": table(EDGE, _edges(found["cells"], found["edges"])),
        "power": table(POWER, _at(found["cells"], 0)),
        "other": table(OTHER, _other(found["cells"])),
        "planned": table(PLANNED, found["planned"]),
        "single": table(SINGLE, found["single"]),
    }
    return SECTION.format(**found | shown)


def _told(facts: dict[str, Any]) -> dict[str, str]:
    """Return what of a machine's facts is said in words."""
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "dirty": ", changed since" if facts["dirty"] else "",
    }


def _levels(cells: list[Row]) -> Iterator[Row]:
    for population, repeats in itertools.product(POPULATIONS, REPEATS):
        these = [cell for cell in cells if (cell["population"], cell["repeats"]) == (population, repeats)]
        worst = {rule: max(cell["passes"][rule] for cell in these) for rule in RULES}
        yield {"population": population, "repeats": repeats, "fails": max(cell["fails"] for cell in these), **worst}


def _edges(cells: Iterable[Row], exact: Iterable[Row]) -> Iterator[Row]:
    levels = {(row["margin"], row["n"]): row["level"] for row in exact}
    found = {(cell["margin"], cell["n"], cell["repeats"], cell["drop"] > 0): cell for cell in _of("edge", cells)}
    for margin, sizes in EDGES.items():
        for n, repeats in itertools.product(sizes, REPEATS):
            without = found[margin, n, repeats, False]["passes"]["k2quant"]
            yield {**found[margin, n, repeats, True], "without": without, "level": levels[margin, n]}


def _at(cells: Iterable[Row], times: float) -> list[Row]:
    return [cell for cell in _of("power", cells) if cell["margin"] == MARGINS[0] and cell["drop"] == times * MARGINS[0]]


def _other(cells: list[Row]) -> Iterator[Row]:
    half = {(cell["population"], cell["kind"], cell["repeats"]): cell for cell in _at(cells, 0.5)}
    twice = {(cell["population"], cell["kind"], cell["repeats"]): cell for cell in _at(cells, 2)}
    for key in itertools.product(POPULATIONS, KINDS, REPEATS):
        cell = {"population": key[0], "kind": key[1], "repeats": key[2], "twice": twice[key]["fails"]}
        passes = half[key]["passes"]
        yield cell | {"half": passes["k2quant"], "half_t": passes["cluster t"]}


def _of(group: str, cells: Iterable[Row]) -> list[Row]:
    return [cell for cell in cells if cell["group"] == group]
