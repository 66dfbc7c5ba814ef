"""Repeats: populations of items, each right with a chance of its own, asked several times; and what rules make of it.

An item is right with chance p from the baseline and q from the candidate, in every repeat anew. The populations are
finite and their drop is the mean of p - q, so that the truth is known; items are drawn with replacement.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.eval.statistics.binomial import probability
from k2quant.eval.statistics.dirichlet import chance_of_none
from k2quant.eval.statistics.paired import acceptance
from k2quant.eval.statistics.repeats_planning import Differences, assumed, items_for, power_of
from suites.gate.rules import student

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Bools = NDArray[Any]

ALPHA = 0.05
REPEATS = (2, 4, 8)
SIZES = (100, 300, 1000, 2000)
MARGINS = (0.01, 0.02)
EDGES = {0.01: (268, 298, 299), 0.02: (133, 148, 149)}
"""Items where the score test, and then the exact one, begins to pass without any flip."""
ITEMS = 2000  # of each population
_MIXED = 0.04  # share of items that swap their chances among each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of candidate, asked so often about so many items, behind one margin."""

    group: str
    population: str
    """How hard the items are."""
    kind: str
    """How the drop comes about."""
    n: int
    repeats: int
    margin: float
    drop: float


def _beta(correlation: float) -> Floats:
    """Return chances with a mean near .8 and this correlation between two answers to one item."""
    both = (1 - correlation) / correlation
    return np.random.default_rng(1).beta(0.8 * both, 0.2 * both, ITEMS)


def _shares(*kinds: tuple[float, float]) -> Floats:
    """Return chances, each for a share of the items, in a random order."""
    chances = np.concatenate([np.full(round(share * ITEMS), chance) for share, chance in kinds])
    return np.random.default_rng(2).permutation(chances)


POPULATIONS: dict[str, Callable[[], Floats]] = {
    "certain": lambda: _shares((0.8, 1.0), (0.2, 0.0)),
    "5% uncertain": lambda: _shares((0.78, 1.0), (0.17, 0.0), (0.05, 0.5)),
    "30% uncertain": lambda: _shares((0.65, 1.0), (0.05, 0.0), (0.15, 0.7), (0.15, 0.3)),
    "beta, .1": lambda: _beta(0.1),
    "beta, .5": lambda: _beta(0.5),
    "beta, .9": lambda: _beta(0.9),
}
"""How likely each item is right; of beta the correlation of two answers to one item."""


def _one_way(chances: Floats, drop: float) -> Floats:
    """Lose the first items for good, until their chances make up the drop."""
    before = np.concatenate(([0.0], np.cumsum(chances)[:-1]))
    share = np.clip((drop * len(chances) - before) / np.maximum(chances, 1e-300), 0, 1)
    found: Floats = chances * (1 - share)
    return found


def _everywhere(chances: Floats, drop: float) -> Floats:
    """Make every item less likely by the same part."""
    found: Floats = chances * (1 - drop / chances.mean())
    return found


def _mixed(chances: Floats, drop: float) -> Floats:
    """Swap the chances of a few items among each other, and lose some others."""
    found = _one_way(chances, drop)
    last = round(_MIXED * len(chances))
    found[-last:] = np.random.default_rng(3).permutation(found[-last:])
    return found


KINDS: dict[str, Callable[[Floats, float], Floats]] = {
    "one-way": _one_way,
    "everywhere": _everywhere,
    "mixed": _mixed,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What many runs saw of one cell."""

    cell: Cell
    classes: Counts
    """Int64 `[classes, 4]`: of an item's repeats those right from both, lost, gained, wrong from both."""
    items: Counts
    """Int64 `[resamples, classes]`: how many items are of each class."""
    orders: np.random.Generator
    """For rules to which the order of items matters."""

    @property
    def differences(self) -> Counts:
        """What the items of each class differ by, in answers: int64 `[classes]`."""
        return self.classes[:, 2] - self.classes[:, 1]

    def of_difference(self) -> tuple[Counts, Counts]:
        """Return the differences from -repeats to repeats, and the items of each: `[resamples, differences]`."""
        values = np.arange(-self.cell.repeats, self.cell.repeats + 1)
        return values, self.items @ (self.differences[:, None] == values).astype(np.int64)


def draw(cell: Cell, resamples: int, seed: int) -> Seen:
    """Draw what runs see."""
    random = np.random.default_rng([seed, zlib.crc32(repr(cell).encode())])
    p = POPULATIONS[cell.population]()
    classes, shares = class_shares(p, KINDS[cell.kind](p, cell.drop), cell.repeats)
    return Seen(cell, classes, random.multinomial(cell.n, shares, resamples), random)


def class_shares(p: Floats, q: Floats, repeats: int) -> tuple[Counts, Floats]:
    """Return the classes of items, `[classes, 4]`, and the share of each, where each repeat is right with p, or q."""
    splits = itertools.product(range(repeats + 1), repeat=3)
    classes = np.array([(*split, repeats - sum(split)) for split in splits if sum(split) <= repeats])
    chances = np.stack((p * q, p * (1 - q), q * (1 - p), (1 - p) * (1 - q)))
    ways = [math.factorial(repeats) / math.prod(map(math.factorial, each)) for each in classes.tolist()]
    shares = np.array(ways) * np.prod(chances[None] ** classes[:, :, None], axis=1).mean(axis=1)
    return classes, shares / shares.sum()


def _gaffke(values: Floats, items: Counts, margin: float) -> Floats:
    weights = np.append(values, -1.0) + margin
    rows, place = np.unique(items, axis=0, return_inverse=True)
    return chance_of_none(weights, np.column_stack((rows, np.ones(len(rows)))))[place.ravel()]


def ours(seen: Seen) -> Bools:
    """Gaffke's p of "the drop is at least the margin" at most alpha."""
    values, items = seen.of_difference()
    return _gaffke(values / seen.cell.repeats, items, seen.cell.margin) <= ALPHA


def ours_fails(seen: Seen) -> Bools:
    """Gaffke's p of "the drop is at most the margin" at most alpha: FAIL."""
    values, items = seen.of_difference()
    return _gaffke(-values / seen.cell.repeats, items, -seen.cell.margin) <= ALPHA


def within(lost: Counts, gained: Counts, n: int, margin: float) -> Bools:
    """Return which of these counts of single answers pass the exact test."""
    passes: Bools = lost <= acceptance(n, margin, ALPHA)[lost + gained]
    return passes


def naive(seen: Seen) -> Bools:
    """The exact test, as if every repeat were an item of its own."""
    lost, gained = seen.items @ seen.classes[:, 1], seen.items @ seen.classes[:, 2]
    return within(lost, gained, seen.cell.n * seen.cell.repeats, seen.cell.margin)


def majority(seen: Seen) -> Bools:
    """The exact test of the items that at least half of their repeats have right."""
    base, candidate = (2 * (seen.classes[:, 0] + seen.classes[:, side]) >= seen.cell.repeats for side in (1, 2))
    lost, gained = seen.items @ (base & ~candidate), seen.items @ (candidate & ~base)
    return within(lost, gained, seen.cell.n, seen.cell.margin)


def first_alone(seen: Seen) -> Bools:
    """The exact test of the first repeat alone: what the others are worth."""
    one = seen.orders.binomial  # of an item's repeats, the first is any
    lost = np.zeros(len(seen.items), dtype=np.int64)
    gained = np.zeros_like(lost)
    for items, (_, down, up, _) in zip(seen.items.T, seen.classes, strict=True):
        share = down / seen.cell.repeats
        some = one(items, share)
        lost += some
        gained += one(items - some, min(1.0, up / max(seen.cell.repeats - down, 1)))
    return within(lost, gained, seen.cell.n, seen.cell.margin)


def _moments(seen: Seen) -> tuple[Floats, Floats]:
    """Return the mean difference of items and the mean of its square, `[resamples]`."""
    x = seen.differences / seen.cell.repeats
    return seen.items @ x / seen.cell.n, seen.items @ x**2 / seen.cell.n


def wald(seen: Seen) -> Bools:
    """The t interval of the items' mean differences, at alpha on its one side."""
    mean, square = _moments(seen)
    n = seen.cell.n
    error = np.sqrt(np.maximum(square - mean**2, 0) / (n - 1))
    return mean - student(1 - ALPHA, n - 1) * error >= -seen.cell.margin


def clustered_score(seen: Seen) -> Bools:
    """A normal score of the items' differences, with their variance about the margin (Obuchowski, Stat. Med. 1998)."""
    mean, square = _moments(seen)
    margin = seen.cell.margin
    about = square + 2 * margin * mean + margin**2
    return (mean + margin) * math.sqrt(seen.cell.n) >= 1.6448536269514722 * np.sqrt(about)


def betting(seen: Seen) -> Bools:
    """A wealth of 1 / alpha at any time, by bets on the items' differences in a random order (`eval.md` 5.7)."""
    x = _in_order(seen) + seen.cell.margin
    most = 0.99 / (1 - seen.cell.margin)
    wealth, top = np.zeros(len(x)), np.zeros(len(x))
    mean, square = np.full(len(x), seen.cell.margin), np.full(len(x), 0.05)  # as if one item had been seen
    for place in range(x.shape[1]):
        bet = np.clip(mean / np.maximum(square, 1e-12), 0, most)
        wealth += np.log1p(bet * x[:, place])
        top = np.maximum(top, wealth)
        mean += (x[:, place] - mean) / (place + 2)
        square += (x[:, place] ** 2 - square) / (place + 2)
    return top >= -math.log(ALPHA)


def _in_order(seen: Seen) -> Floats:
    """Return the items' differences in a random order, `[resamples, n]`."""
    x = (seen.differences / seen.cell.repeats).astype(np.float32)
    found = np.stack([np.repeat(x, items) for items in seen.items])
    return seen.orders.permuted(found, axis=1).astype(np.float64)


RULES: dict[str, Callable[[Seen], Bools]] = {
    "k2quant": ours,
    "betting": betting,
    "cluster t": wald,
    "cluster score": clustered_score,
    "majority": majority,
    "repeats as items": naive,
    "one repeat": first_alone,
}
"""By the name in the tables."""
SINGLE = ("majority", "repeats as items", "one repeat")
"""Those that judge single answers, by the exact test."""


def cells() -> Iterator[Cell]:
    """Yield the cells: the margin as drop everywhere, other drops at 1,000 items, and the edges."""
    for margin, repeats, population, kind in itertools.product(MARGINS, REPEATS, POPULATIONS, KINDS):
        common: dict[str, Any] = {"population": population, "kind": kind, "repeats": repeats, "margin": margin}
        for n in SIZES:
            yield Cell(group="level", n=n, drop=margin, **common)
        for times in (0.5, 2) if kind == "everywhere" else (0, 0.5, 2):
            yield Cell(group="power", n=1000, drop=times * margin, **common)
    for margin, sizes in EDGES.items():
        for n, repeats in itertools.product(sizes, REPEATS):
            edge: dict[str, Any] = {
                "population": "certain",
                "kind": "one-way",
                "n": n,
                "repeats": repeats,
                "margin": margin,
            }
            yield Cell(group="edge", drop=margin, **edge)
            yield Cell(group="edge", drop=0.0, **edge)


def measure(cell: Cell, resamples: int, seed: int) -> dict[str, Any]:
    """Return what the rules did on resamples of a cell."""
    seen = draw(cell, resamples, seed)
    shown = {key: getattr(cell, key) for key in Cell.__dataclass_fields__}
    passes = {name: float(rule(seen).mean()) for name, rule in RULES.items()}
    return {**shown, "resamples": resamples, "passes": passes, "fails": float(ours_fails(seen).mean())}


def measure_single(cell: Cell, resamples: int, seed: int) -> dict[str, float]:
    """Return what the rules of `SINGLE` did on the very resamples of `measure`: cheap, for when their test changes."""
    seen = draw(cell, resamples, seed)
    _in_order(seen)  # of the random numbers, betting has taken its own before them
    return {name: float(RULES[name](seen).mean()) for name in SINGLE}


def edges() -> Iterator[dict[str, Any]]:
    """Yield the level of ours where each item is right for good or lost for good: by enumeration of the losses."""
    for margin, sizes in EDGES.items():
        for n in sizes:
            lost = np.arange(n + 1)
            passes = _gaffke(np.array([-1.0, 0.0]), np.stack((lost, n - lost), axis=1), margin) <= ALPHA
            yield {"n": n, "margin": margin, "level": float(probability(lost, n, margin) @ passes)}


def planned(resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield, for shares of flips and correlations, the items that a plan names and what resamples of as many give.

    The items are those that the plan assumes: some flip for certain, some are coins, the others never flip.
    """
    for flips, correlation, repeats in itertools.product((0.02, 0.06), (0.1, 0.5, 0.9), REPEATS):
        differences = assumed(flips, correlation, repeats)
        n = items_for(differences, 0.01, ALPHA, 0.8)
        if n is None:
            msg = f"no plan for {differences}"
            raise AssertionError(msg)
        yield {
            "flips": flips,
            "correlation": correlation,
            "repeats": repeats,
            "items": n,
            "plan": power_of(differences, n, 0.01, ALPHA),
            "sampled": _power_of_assumed(flips, correlation, repeats, n, resamples, seed),
        }


def _power_of_assumed(flips: float, correlation: float, repeats: int, n: int, resamples: int, seed: int) -> float:
    sure, coins = flips * correlation, 2 * flips * (1 - correlation)
    kinds = ((1.0, 0.0, sure / 2), (0.0, 1.0, sure / 2), (0.5, 0.5, coins), (1.0, 1.0, 1 - sure - coins))
    classes, first = class_shares(np.ones(1), np.ones(1), repeats)
    shares = np.zeros_like(first)
    for p, q, share in kinds:
        shares += share * class_shares(np.array([p]), np.array([q]), repeats)[1]
    random = np.random.default_rng([seed, n, repeats])
    cell = Cell(group="", population="", kind="", n=n, repeats=repeats, margin=0.01, drop=0.0)
    return float(ours(Seen(cell, classes, random.multinomial(n, shares, resamples), random)).mean())


def single_answers() -> Iterator[dict[str, Any]]:
    """Yield what the exact test of single answers wins over Gaffke's: items for a power of .8, and levels of p."""
    from k2quant.eval import plan

    for margin, flips in itertools.product(MARGINS, (0.005, 0.01, 0.02, 0.04, 0.1)):
        exact, bound = plan(margin=margin, flips=flips).items, items_for(Differences(flips, 1.0), margin, ALPHA, 0.8)
        yield {"margin": margin, "flips": flips, "exact": exact, "bound": bound}
