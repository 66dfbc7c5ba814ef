"""A small model with every kind of matrix, and statistics that fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import k2quant
from k2quant.calib.stats.digests import digests_of
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.ground import names
from k2quant.kernels.codecs.values import float_to_bf16

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
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

LOUD = "model.layers.0.self_attn.o_proj"
"""Has one weight in each group that is far larger than the rest, so that INT4 loses most of it."""

ATTENTION = {
    "q_a_proj": (32, 64),
    "q_b_proj": (64, 32),
    "kv_a_proj_with_mqa": (48, 64),
    "kv_b_proj": (64, 32),
    "o_proj": (64, 32),
}


def shapes(layer: int) -> dict[str, tuple[int, int]]:
    """Return the projections of a layer."""
    found = {f"self_attn.{name}": shape for name, shape in ATTENTION.items()}
    if layer < CONFIG["first_k_dense_replace"]:
        owners = {"mlp": CONFIG["intermediate_size"]}
    else:
        experts = [f"mlp.experts.{number}" for number in range(CONFIG["n_routed_experts"])]
        owners = dict.fromkeys(["mlp.shared_experts", *experts], CONFIG["moe_intermediate_size"])
    for owner, inner in owners.items():
        found |= {f"{owner}.gate_proj": (inner, 64), f"{owner}.up_proj": (inner, 64), f"{owner}.down_proj": (64, inner)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in found.items()}


def tensors(layer: int) -> Shard:
    """Return a layer's tensors, in BF16."""
    random = np.random.default_rng(layer)
    found: Shard = {}
    for base, shape in shapes(layer).items():
        values = random.standard_t(5, shape).astype(np.float32) * np.float32(0.05)
        if base == LOUD:
            values[:, ::32] *= 20
        found[f"{base}.weight"] = ("BF16", float_to_bf16(values))
    if layer >= CONFIG["first_k_dense_replace"]:
        router = random.standard_normal((CONFIG["n_routed_experts"], 64)).astype(np.float32)
        found[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", float_to_bf16(router))
    ones = np.full(64, 0x3F80, np.uint16)
    return found | {f"model.layers.{layer}.{name}_layernorm.weight": ("BF16", ones) for name in ("input", "post")}


def outside() -> Shard:
    """Return what stands outside the layers."""
    random = np.random.default_rng(99)
    embedding = float_to_bf16(random.standard_normal((300, 64)).astype(np.float32) * np.float32(0.1))
    found: Shard = {f"{name}.weight": ("BF16", embedding) for name in ("model.embed_tokens", "lm_head")}
    return found | {"model.norm.weight": ("F32", np.full(64, 1.001, np.float32))}


def write_model(folder: Path, *, more: int = 0) -> Path:
    """Write the model, with so many layers more than its config says, as those that predict further tokens are."""
    count = CONFIG["num_hidden_layers"] + more
    shards = {f"model-{layer + 1}-of-{count + 1}.safetensors": tensors(layer) for layer in range(count)}
    write_checkpoint(folder, {**shards, f"model-{count + 1}-of-{count + 1}.safetensors": outside()}, CONFIG)
    return folder


class Small(NamedTuple):
    """A model and its statistics."""

    source: Path
    stats: Path

    def weights(self) -> dict[str, StoredWeight]:
        """Return its weights by base."""
        return {weight.base: weight for weight in group_tensors(open_checkpoint(self.source).tensors).weights}


def write_stats(standing: Any, source: Path, name: str, *, layers: int = 100) -> Path:
    """Write statistics of a model of `CONFIG`, and of no more layers than these."""
    opened = open_checkpoint(source)
    weights = group_tensors(opened.tensors).weights
    digests = digests_of(opened, [each for each in weights if (names.layer(each.main.name) or 0) < layers])
    folder: Path = standing.write(name, standing.manifest(**CONFIG), digests=digests)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, standing: Any) -> Small:
    """A model of three layers in BF16. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("budget") / "K2-Small"
    write_model(folder)
    return Small(folder, write_stats(standing, folder, "stats"))


@pytest.fixture(scope="module")
def small_fp8(small: Small, standing: Any) -> Small:
    """The same in FP8, with statistics of its own."""
    folder = k2quant.convert(small.source, small.source.parent / "K2-FP8", "fp8").folder
    return Small(folder, write_stats(standing, folder, "stats-fp8"))


@pytest.fixture
def measured() -> Callable[..., Path]:
    """Give what writes statistics of a model of `CONFIG`."""
    return write_stats


@pytest.fixture
def written() -> Callable[..., Path]:
    """Give what writes such a model."""
    return write_model
