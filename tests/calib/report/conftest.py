"""What tests of the page share: loads of layers as a router may send them, and the manifest that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from k2quant.calib.coverage import Coverage, LayerLoad, PartCoverage
from k2quant.calib.report.page import page
from k2quant.calib.stats.layout import Part
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.calib.stats.model import Model

HIDDEN, INNER = 64, 32

Pages = Callable[..., str]


def covered(layers: Sequence[Sequence[int]], name: Part = "train", top_k: int = 2) -> PartCoverage:
    """Return the coverage of layers 1, 2 and so on whose experts saw so many tokens."""
    loads = tuple(
        LayerLoad(layer, np.array(tokens, np.int64), np.array(tokens) / 4, top_k)
        for layer, tokens in enumerate(layers, 1)
    )
    return PartCoverage(part=name, layers=loads, hidden=HIDDEN, inner=INNER)


def manifest(**changes: Any) -> Manifest:
    """Return what a calibration may say of itself."""
    sizes = ("num_hidden_layers", "intermediate_size", "n_shared_experts", "num_attention_heads", "kv_lora_rank")
    config = dict.fromkeys((*sizes, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    config |= {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "n_routed_experts": 4, "num_experts_per_tok": 2}
    part = DataPart(hashes=("ab" * 32, "cd" * 32), tokens=100, rows=5, digest="ef" * 32)
    known: dict[str, Any] = {
        "model": Model.of(config),
        "data": {"train": part, "validation": part, "test": part},
        "settings": {"samples": 512, "length": 2048},
        "version": "0.0",
    }
    return Manifest(**known | changes)


@pytest.fixture
def drawn() -> Pages:
    """Return a function that draws the page of layers whose experts saw so many tokens."""

    def draw(*layers: Sequence[int], held: Sequence[Sequence[int]] | None = None, **changes: Any) -> str:
        validation = covered(layers if held is None else held, "validation")
        found = Coverage(train=covered(layers), validation=validation)
        return page(manifest(**changes), "12" * 32, found, changes.get("version", "STATS"))

    return draw
