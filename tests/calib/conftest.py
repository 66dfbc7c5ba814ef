"""Folders of statistics that nobody measured, for tests of what reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.calib.stats.digests import Digests
from k2quant.calib.stats.layout import PARTS, Input, inputs
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.writing import (
    HessianWriter,
    LayerStats,
    Measured,
    calibrating,
    finish,
    write_layer,
    write_outside,
)

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-6,
}
"""Keys of config.json of a K2 with two layers, the first of them dense."""

TOKENS = {"train": 600, "validation": 60, "test": 60}


def manifest_of(config: dict[str, Any], **changes: Any) -> Manifest:
    """Return what a calibration of a model with this config says of itself."""
    data = {
        name: DataPart(
            hashes=tuple(hashlib.sha256(f"{name} {n}".encode()).hexdigest() for n in range(count // 60)),
            tokens=count,
            rows=count // 20,
            digest=hashlib.sha256(name.encode()).hexdigest(),
        )
        for name, count in TOKENS.items()
    }
    known: dict[str, Any] = {
        "model": Model.of(config),
        "data": data,
        "settings": {"samples": 30, "length": 20},
        "version": "0.0",
    }
    return Manifest(**known | changes)


def counts(random: np.random.Generator, model: Model, tokens: int, empty: int | None) -> np.ndarray[Any, Any]:
    """Return how many tokens reach each expert, if each token has `top_k` of them and one expert has none."""
    open_ = [expert for expert in range(model.experts) if expert != empty]
    chosen = [random.choice(open_, model.top_k, replace=False) for _ in range(tokens)]
    return np.bincount(np.concatenate(chosen), minlength=model.experts).astype(np.int64)


def measured(random: np.random.Generator, one: Input, tokens: np.ndarray[Any, Any] | int) -> Measured:
    """Return moments that could be those of one input."""
    seen = np.asarray(tokens) > 0
    squares = random.chisquare(1, one.shape(one.width)).astype(np.float32) * seen[..., None]
    largest = np.sqrt(squares.max(axis=-1)) * np.float32(3)
    weight = np.asarray(tokens) * (0.25 if one.experts is not None else 1.0)
    return Measured(squares, weight, np.asarray(tokens), largest)


def layer_stats(random: np.random.Generator, manifest: Manifest, layer: int, empty: int | None = None) -> LayerStats:
    """Return moments of all inputs of a layer; one expert may have had no token."""
    found: dict[Any, Measured] = {}
    for part in PARTS:
        tokens = manifest.data[part].tokens
        routed = counts(random, manifest.model, tokens, empty)
        for one in inputs(manifest.model, layer):
            found[one.name, part] = measured(random, one, tokens if one.experts is None else routed)
    return found


def hessians_of(folder: Path, layer: int, model: Model, stats: LayerStats) -> dict[str, list[str]]:
    """Write diagonal Hessians that fit the moments."""
    writer = HessianWriter(folder, layer, model)
    for (name, part), one in stats.items():
        for expert, squares in enumerate(np.atleast_2d(one.mean_square)):
            if one.mean_square.ndim == 1 or np.atleast_1d(one.tokens)[expert]:
                writer.write(name, part, np.diag(squares), expert=expert if one.mean_square.ndim == 2 else None)
    return writer.finish()


def digests_for(layer: int) -> Digests:
    """Return digests that belong to nothing."""
    return {f"model.layers.{layer}.self_attn.o_proj": {"weight": f"{layer:08x}"}}


def write(folder: Path, manifest: Manifest, *, seed: int = 0, empty: int | None = None, restart: bool = False) -> None:
    """Write a folder of statistics, or go on where a run was stopped."""
    with calibrating(folder, manifest, restart=restart) as done:
        for layer in range(manifest.model.layers):
            if layer not in done:
                stats = layer_stats(np.random.default_rng((seed, layer)), manifest, layer, empty)
                crcs = hessians_of(folder, layer, manifest.model, stats) if manifest.hessians else None
                write_layer(folder, layer, stats, digests_for(layer), hessians=crcs)
        write_outside(folder, {"model.embed_tokens": {"weight": "0badcafe"}})
        finish(folder, manifest)


@pytest.fixture
def stats_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a finished folder of statistics: of `CONFIG` with changes, expert `empty` without a token."""

    def made(name: str = "stats", *, empty: int | None = None, hessians: bool = False, **config: Any) -> Path:
        write(tmp_path / name, manifest_of(CONFIG | config, hessians=hessians), empty=empty)
        return tmp_path / name

    return made
