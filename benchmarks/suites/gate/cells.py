"""Cells of the proof: a kind of candidate, a number of items and a margin; and what the rules do there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2quant.eval import plan
from k2quant.eval.statistics.exact import LargestChance, score_curve
from k2quant.eval.statistics.paired import acceptance, failing, power, rejection
from suites.gate.population import Pair
from suites.gate.rules import RULES, Seen, flagged, ours_fails

ALPHA = 0.05
SIZES = (100, 250, 500, 1319, 2500)
MARGINS = (0.01, 0.02)
MIXED = 0.04  # share of flips beyond those of the drop
SMALLEST, LARGEST = 0.002, 0.4  # true drops that make a margin
EDGES = ((268, 0.01), (298, 0.01), (299, 0.01), (133, 0.02), (148, 0.02), (149, 0.02), (598, 0.005))
"""Items and margins where the score test, and then the exact one, begins to pass without any flip."""
Z = 1.6448536269514722  # of alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of candidate behind one gate; all shares are 0 to 1 and true."""

    group: str
    name: str
    n: int
    margin: float
    alpha: float = ALPHA
    accuracy: float
    """Of the baseline."""
    lost: float
    gained: float

    @property
    def drop(self) -> float:
        """The true drop."""
        return self.lost - self.gained

    @property
    def flips(self) -> float:
        """The true share of flips."""
        return self.lost + self.gained


def of_kind(group: str, name: str, n: int, margin: float, *, flips: float, drop: float, **other: float) -> Cell:
    """Return a cell of a candidate that flips and drops so much."""
    lost, gained = (flips + drop) / 2, max(0.0, (flips - drop) / 2)
    return Cell(group=group, name=name, n=n, margin=margin, lost=lost, gained=gained, **({"accuracy": 0.8} | other))


def of_pair(group: str, pair: Pair, n: int, margin: float) -> Cell:
    """Return a cell of a candidate of the population."""
    accuracy = float(pair.base.mean())
    return Cell(group=group, name=pair.name, n=n, margin=margin, accuracy=accuracy, lost=pair.lost, gained=pair.gained)


def boundary(plants: list[Pair]) -> Iterator[Cell]:
    """Yield cells whose margin is the plant's true drop: what passes there passes by mistake."""
    for pair in plants:
        if SMALLEST < pair.drop < LARGEST:
            for n in SIZES:
                yield of_pair("plant at its own drop", pair, n, pair.drop)


def published() -> Iterator[Cell]:
    """Yield two cells as CIs have them, from no drop to a large one, for two margins."""
    for name, n, accuracy, flips, drops in (
        ("A", 1319, 0.92, 0.04, (0, 0.005, 0.01, 0.02, 0.03)),
        ("B", 1000, 0.75, 0.10, (0, 0.005, 0.01, 0.02, 0.03, 0.05)),
    ):
        for margin in MARGINS:
            for drop in drops:
                yield of_kind("CI", name, n, margin, flips=flips, drop=drop, accuracy=accuracy)


def few_flips() -> Iterator[Cell]:
    """Yield cells at alpha .025 where a Wald interval breaks: hardly any flips, the drop at the margin or above."""
    for n, margin, drop, flips in (
        (30, 0.01, 0.05, 0.05),
        (50, 0.02, 0.02, 0.02),
        (100, 0.01, 0.01, 0.01),
        (164, 0.01, 0.01, 0.02),
        (164, 0.01, 0.02, 0.02),
        (198, 0.01, 0.02, 0.04),
        (500, 0.01, 0.01, 0.02),
        (1319, 0.01, 0.01, 0.04),
    ):
        yield of_kind("few flips", f"d {flips:.0%}", n, margin, flips=flips, drop=drop, alpha=0.025)


def grid() -> Iterator[Cell]:
    """Yield cells of no drop, half the margin, the margin and twice it, with flips one way and both ways."""
    for margin in MARGINS:
        for n in (*SIZES, *(edge for edge, of in EDGES if of == margin)):
            for times in (0, 0.5, 1, 2):
                drop = times * margin
                yield of_kind("grid", "one-way", n, margin, flips=drop, drop=drop)
                yield of_kind("grid", "mixed", n, margin, flips=drop + MIXED, drop=drop)


def same(again: list[Pair]) -> Iterator[Cell]:
    """Yield cells of the A/A pairs."""
    for pair in again:
        for n in SIZES:
            yield of_pair("A/A", pair, n, 0.01)


def plants_at_one_point(plants: list[Pair]) -> Iterator[Cell]:
    """Yield a cell for each plant, at the size of GSM8K."""
    for pair in plants:
        yield of_pair("plants", pair, 1319, 0.01)


def planned(pairs: list[Pair]) -> Iterator[tuple[Cell, float]]:
    """Yield cells of as many items as `plan` names, with the power that it names; for candidates that should pass."""
    for margin in MARGINS:
        for flips in (0.01, 0.02, 0.04, 0.06):
            yield _planned(of_kind("plan", f"lossless, {flips:.0%} flips", 1, margin, flips=flips, drop=0))
        for pair in pairs:
            if pair.drop < margin / 2:
                yield _planned(of_pair("plan", pair, 1, margin))


def _planned(cell: Cell) -> tuple[Cell, float]:
    found = plan(margin=cell.margin, flips=cell.flips, drop=cell.drop)
    if found.items is None or found.reached is None:
        msg = f"no plan for {cell}"
        raise AssertionError(msg)
    parts = {"lost": cell.lost, "gained": cell.gained, "accuracy": cell.accuracy}
    return Cell(group=cell.group, name=cell.name, n=found.items, margin=cell.margin, **parts), found.reached


def measure(cell: Cell, resamples: int, seed: int) -> dict[str, Any]:
    """Return what the rules did on resamples of a cell, and what ours does by enumeration."""
    random = np.random.default_rng([seed, zlib.crc32(repr(cell).encode())])
    kinds = [cell.lost, cell.gained, cell.accuracy - cell.lost, 1 - cell.accuracy - cell.gained]
    lost, gained, both, _ = random.multinomial(cell.n, np.maximum(kinds, 0) / np.maximum(kinds, 0).sum(), resamples).T
    seen = Seen(
        n=cell.n,
        margin=cell.margin,
        alpha=cell.alpha,
        accuracy=cell.accuracy,
        base=both + lost,
        lost=lost,
        gained=gained,
    )
    kind = (cell.n, cell.margin, cell.alpha, cell.flips, cell.drop)
    return {
        **{key: getattr(cell, key) for key in ("group", "name", "n", "margin", "alpha", "accuracy", "drop", "flips")},
        "resamples": resamples,
        "passes": {name: float(rule(seen).mean()) for name, rule in RULES.items()},
        "fails": float(ours_fails(seen).mean()),
        "flags": float(flagged(seen).mean()),
        "exact_pass": power(*kind),
        "exact_fail": failing(*kind),
    }


def edge(n: int, margin: float) -> dict[str, Any]:
    """Return the largest levels of ours and of the score test at an edge, over all shares of flips."""
    good, bad = LargestChance(n, margin, upper=False), LargestChance(n, margin, upper=True)
    return {
        "n": n,
        "margin": margin,
        "without_flips": bool(acceptance(n, margin, ALPHA)[0] == 0),
        "level": good.of(acceptance(n, margin, ALPHA)),
        "fail_level": bad.of(rejection(n, margin, ALPHA)),
        "score_level": good.of(score_curve(n, margin, Z)),
    }
