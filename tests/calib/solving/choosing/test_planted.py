"""Experts with few tokens, planted so that the true error is known: never worse than rounding, and better where it can.

The limit is 1.02 of rounding's error on the true distribution. The worst of these is 0.96.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from k2quant.calib.solving.choosing import settle
from k2quant.calib.solving.deciding import ways
from k2quant.calib.solving.deciding.drawing import believed
from k2quant.calib.solving.settings import Settings

LIMIT = 1.02
TOKENS = (0, 8, 32, 128, 512)
SEEDS = range(4)

Plant = Callable[..., Any]
Weights = Callable[..., Tensor]


@pytest.mark.parametrize("layer", [True, False], ids=["gate and up", "down"])
@pytest.mark.parametrize("kind", ["alike", "strange", "independent", "uneven"])
def test_no_expert_is_worse_than_rounded(plant: Plant, gaussian: Weights, kind: str, layer: bool) -> None:  # noqa: FBT001
    """Whatever an expert sees, and however little of it, it loses no more on its true inputs than plain rounding."""
    found = {}
    for tokens in TOKENS:
        for seed in SEEDS:
            planted, weights = plant(kind, tokens, layer=layer, seed=seed), gaussian(seed)
            shipped = settle({"gate_proj": weights}, planted.evidence, Settings())["gate_proj"]
            plain = planted.error(weights, ways.plain(weights, 4).values)
            found[tokens, seed] = planted.error(weights, shipped.values) / plain
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize(
    ("kind", "layer", "tokens"), [("alike", True, 32), ("uneven", False, 128), ("strange", True, 32)]
)
def test_caution_costs_little(plant: Plant, gaussian: Weights, kind: str, layer: bool, tokens: int) -> None:  # noqa: FBT001
    """Where few tokens, or the layer, say enough, an expert is solved, and loses much less than at searched scales."""
    planted, weights = plant(kind, tokens, layer=layer), gaussian(1)
    shipped = settle({"down_proj": weights}, planted.evidence, Settings())["down_proj"]
    assert shipped.facts["method"] == "gptq"
    searched = ways.searched(weights, believed(planted.evidence), "imatrix", 4)
    assert planted.error(weights, shipped.values) < 0.85 * planted.error(weights, searched.values)


def test_an_expert_without_tokens_is_searched_by_its_layer(plant: Plant, gaussian: Weights) -> None:
    """It is never solved, no weight of it becomes zero, and its layer's moments choose its scales."""
    planted, weights = plant("alike", 0, layer=True), gaussian(2)
    shipped = settle({"up_proj": weights}, planted.evidence, Settings())["up_proj"]
    facts = shipped.facts
    assert (facts["method"], facts["reason"], facts["seen"], facts["tokens"]) == ("imatrix", "no token came", 0, 0)
    assert facts["measure"] == "validation, blended"
    assert shipped.values.abs().amax(1).min() > 0.02
    assert planted.error(weights, shipped.values) < 0.8 * planted.error(weights, ways.plain(weights, 4).values)


def test_a_down_projection_without_tokens_is_searched_for_least_squares(plant: Plant, gaussian: Weights) -> None:
    """Nothing is known of its input, held-out tokens neither: it ships with the scales of `mse`."""
    planted, weights = plant("alike", 0, layer=False), gaussian(3)
    shipped = settle({"down_proj": weights}, planted.evidence, Settings())["down_proj"]
    assert torch.equal(shipped.scales, ways.searched(weights, None, "mse", 4).scales)
    assert (shipped.facts["method"], shipped.facts["measure"]) == ("mse", "weights")
    assert 0.8 < shipped.facts["relative"] < 0.95
