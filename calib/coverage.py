"""How the tokens of a calibration spread over the experts: who saw how many, whether they suffice, what is missing.

A router gives each token to a few experts, and not evenly. What an expert's own tokens can tell of its matrices depends
on how many they are, beside the mean of its layer and beside the width of its inputs. The marks are those of tools that
people know, and of measurements; each says where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from k2quant.calib.stats.layout import PARTS, Part
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats

THIN, THINNEST = 0.10, 0.05
"""Shares of a layer's mean below which an expert is thin; Model-Optimizer's `.moe.html` marks them pink and red."""
TIERS = (0.25, 1.0, 4.0)
"""Tokens over the width d of an input: below d/4 an expert's own second moments of pairs of columns tell little, below
d they have no full rank, and from 4 d on more of them change little (errors of GPTQ by tokens, synthetic inputs)."""
UNSEEN = 3.0
"""What happens nowhere in T tries has, with 95 % confidence, a chance of at most 3/T (the rule of three)."""


def _missing(tokens: int, seen: float, width: int) -> int:
    """Return how many more tokens bring an expert from `tokens` of the `seen` to `width`; see `LayerLoad.needed`."""
    return max(ceil(seen * width / (tokens or UNSEEN) - seen), 0) if tokens < width else 0


@dataclass(frozen=True, slots=True, eq=False)
class LayerLoad:
    """How many tokens each routed expert of one layer saw."""

    layer: int
    tokens: NDArray[np.int64]
    """[E]: tokens whose router chose the expert."""
    weight: NDArray[np.float64]
    """[E]: sum over them of p^2, the router's weights as the experts get them."""
    top_k: int
    """Experts that a token goes to."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def seen(self) -> float:
        """Tokens that the layer's router saw."""
        return int(self.tokens.sum()) / self.top_k

    @property
    def mean(self) -> float:
        """Tokens of an expert in the mean."""
        return int(self.tokens.sum()) / len(self.tokens)

    @property
    def shares(self) -> NDArray[np.float64]:
        """[E]: tokens in multiples of the mean; zeros where the layer saw none."""
        return self.tokens / (self.mean or 1.0)

    @property
    def empty(self) -> tuple[int, ...]:
        """The experts without a token."""
        return tuple(int(expert) for expert in np.flatnonzero(self.tokens == 0))

    @property
    def worst(self) -> int:
        """The expert with the fewest tokens, the first of several."""
        return int(self.tokens.argmin())

    @property
    def entropy(self) -> float:
        """Entropy of the load over that of an even one: from 0, one expert has all, to 1; 1 where there is no load."""
        shares = self.tokens[self.tokens > 0] / max(int(self.tokens.sum()), 1)
        if len(self.tokens) < 2 or not len(shares):
            return 1.0
        return min(abs(float((shares * np.log(shares)).sum())) / log(len(self.tokens)), 1.0)  # abs: no -0.0

    def thin(self, mark: float = THIN) -> int:
        """Count the experts that have fewer tokens than this share of the mean; those without one are among them."""
        return int((self.shares < mark).sum()) if self.mean else len(self.tokens)

    def below(self, least: float) -> int:
        """Count the experts that have fewer tokens than this."""
        return int((self.tokens < least).sum())

    def needed(self, width: int) -> int:
        """Return how many more tokens of such data bring the worst expert to `width` tokens, at the measured load.

        Of an expert without a token only a lower bound can be told: its share is at most `UNSEEN` over the tokens seen.
        """
        return _missing(int(self.tokens[self.worst]), self.seen, width)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartCoverage:
    """How the tokens of one part of the data spread."""

    part: Part
    layers: tuple[LayerLoad, ...]
    """Those with routed experts, in order."""
    hidden: int
    """Width of the input of gate and up."""
    inner: int
    """Width of the input of down."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def experts(self) -> int:
        """Routed experts of all layers."""
        return sum(len(load.tokens) for load in self.layers)

    @property
    def empty(self) -> int:
        """Experts without a token."""
        return sum(len(load.empty) for load in self.layers)

    @property
    def seen(self) -> float:
        """Tokens that each layer's router saw, the fewest of all layers."""
        return min((load.seen for load in self.layers), default=0.0)

    @property
    def worst(self) -> LayerLoad | None:
        """The layer with the expert that has the fewest tokens; None without layers."""
        return min(self.layers, key=lambda load: int(load.tokens[load.worst]), default=None)

    @property
    def uneven(self) -> LayerLoad | None:
        """The layer whose load has the lowest entropy; None without layers."""
        return min(self.layers, key=lambda load: load.entropy, default=None)

    @property
    def median(self) -> float:
        """Tokens of the median expert of all layers."""
        return float(np.median(np.concatenate([load.tokens for load in self.layers]))) if self.layers else 0.0

    def thin(self, mark: float = THIN) -> int:
        """Count the experts that have fewer tokens than this share of their layer's mean."""
        return sum(load.thin(mark) for load in self.layers)

    def below(self, least: float) -> int:
        """Count the experts that have fewer tokens than this."""
        return sum(load.below(least) for load in self.layers)

    def needed(self, width: int) -> int:
        """Return how many more tokens of such data bring every expert to `width` tokens; see `LayerLoad.needed`."""
        return max((load.needed(width) for load in self.layers), default=0)

    def needed_by(self, part: float, width: int) -> int:
        """Return how many more tokens of such data bring this part of all experts to `width` tokens, at their loads.

        As in `needed`, what is told of experts without a token is a lower bound.
        """
        if not self.layers:
            return 0
        tokens = np.sort(np.concatenate([load.tokens for load in self.layers]))
        left_out = min(int((1 - part) * len(tokens) + 1e-9), len(tokens) - 1)  # 5% of 100 are 5
        return _missing(int(tokens[left_out]), self.seen, width)

    def tiers(self, width: int) -> tuple[int, ...]:
        """Count the experts with no token, then those below each of `TIERS` times the width, then the rest."""
        marks = [1, *(tier * width for tier in TIERS)]
        below = [0, *(self.below(mark) for mark in marks), self.experts]
        return tuple(after - before for before, after in pairwise(below))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it; share of the mean and n/d are a quotient of what stands there."""
        widths = {"gate_up": self.hidden, "down": self.inner}
        return {
            "tokens": self.seen,
            "width": widths,
            "experts": self.experts,
            "empty": self.empty,
            "thin": {f"{mark:g}": self.thin(mark) for mark in (THIN, THINNEST)},
            "tiers": {name: list(self.tiers(width)) for name, width in widths.items()},
            "median": self.median,
            "tokens_needed": {name: self.needed(width) for name, width in widths.items()},
            "needed_is_lower_bound": bool(self.empty),
            "layers": [_layer_json(load, widths) for load in self.layers],
        }


def _layer_json(load: LayerLoad, widths: Mapping[str, int]) -> dict[str, Any]:
    return {
        "layer": load.layer,
        "least": int(load.tokens.min()),
        "median": float(np.median(load.tokens)),
        "mean": load.mean,
        "most": int(load.tokens.max()),
        "empty": list(load.empty),
        "entropy": load.entropy,
        "worst": load.worst,
        "tokens_needed": {name: load.needed(width) for name, width in widths.items()},
        "tokens": load.tokens.tolist(),
        "sum_p2": load.weight.tolist(),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coverage:
    """How the tokens of a calibration spread over the routed experts."""

    train: PartCoverage
    validation: PartCoverage

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {part.part: part.as_json() for part in (self.train, self.validation)}

    def lines(self) -> list[str]:
        """Return what it says in a few lines of plain text; none for a model without routed experts."""
        train = self.train
        if train.worst is None or train.uneven is None:
            return []
        tokens, uneven = train.worst.tokens, train.uneven
        least = int(tokens[train.worst.worst])
        reached = (
            f"{counted(train.experts, 'expert')} in {counted(len(train.layers), 'layer')}: {train.empty:,} without a "
            f"token, {train.thin(THINNEST):,} below {THINNEST:.0%} and {train.thin():,} below {THIN:.0%} of the mean"
        )
        spread = (
            f"tokens of an expert: median {train.median:,.0f}, least {least:,} (expert {train.worst.worst} of layer "
            f"{train.worst.layer}); inputs have {train.hidden:,} columns, {train.inner:,} of down_proj"
        )
        even = f"entropy of the load: lowest {uneven.entropy:.3f}, in layer {uneven.layer}"
        return [reached, spread, even, needed(train)]


def needed(part: PartCoverage) -> str:
    """Say how many more tokens would give each expert as many as its input has columns."""
    more = part.needed(part.hidden)
    if not more:
        return f"each expert has at least {part.hidden:,} tokens, as many as its input has columns"
    least = "at least " if part.empty else ""
    return (
        f"for {part.hidden:,} tokens of each expert, as many as its input has columns: {least}{more:,} tokens more of "
        "such data"
    )


def coverage_of(stats: Stats) -> Coverage:
    """Return how the tokens of a calibration spread over the experts.

    Raises:
        CheckpointError: a layer's file is not what was written.
    """
    found: dict[Part, list[LayerLoad]] = {part: [] for part in PARTS}
    model = stats.manifest.model
    for layer in stats.layers:
        for part, loads in found.items():  # one after the other: a layer's file is read once
            counts = stats.load(layer, part)
            if counts is not None:
                loads.append(LayerLoad(layer, *counts, model.top_k))
    train, validation = (
        PartCoverage(part=part, layers=tuple(loads), hidden=model.hidden, inner=model.inner)
        for part, loads in found.items()
    )
    return Coverage(train=train, validation=validation)
