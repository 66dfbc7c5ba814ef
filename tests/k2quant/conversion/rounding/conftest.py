"""A small K2 and statistics of it that nobody measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import k2quant
from k2quant.calib.stats.digests import digests_of
from k2quant.calib.stats.layout import PARTS, Input, Part, inputs
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.writing import HessianWriter, Measured, calibrating, finish, write_layer, write_outside
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.ground import names
from k2quant.kernels.codecs.values import float_to_bf16

HIDDEN, INNER, EXPERTS, LAYERS = 128, 256, 4, 2
CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2",
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": 0,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
TOKENS = 400
"""Of each part of the data; expert 3 of layer 1 gets ten of them."""

RARE = "model.layers.1.mlp.experts.3.down_proj"
EXPERT = "model.layers.{}.mlp.experts.{}.{}"

Squares = Callable[[Input, Part, NDArray[np.float32]], NDArray[np.float32]]
"""What becomes of the second moments that are made for an input and a part."""


def tensors(layer: int) -> Shard:
    """Return the tensors of a layer: experts and o_proj as block FP8, the router in BF16."""
    random = np.random.default_rng(layer)
    found: Shard = {}
    shapes = {f"model.layers.{layer}.self_attn.o_proj": (HIDDEN, 64)}
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[EXPERT.format(layer, expert, name)] = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
    for base, shape in shapes.items():
        values = float_to_bf16(random.standard_t(5, shape).astype(np.float32) * np.float32(0.02))
        stored = k2quant.quantize(values, "fp8")
        found |= {f"{base}.weight": ("F8_E4M3", stored.codes), f"{base}.weight_scale_inv": ("F32", stored.scale)}
    router = float_to_bf16(random.standard_normal((EXPERTS, HIDDEN)).astype(np.float32))
    return found | {f"model.layers.{layer}.mlp.gate.weight": ("BF16", router)}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A K2 of two layers with four experts, a shard each, in FP8. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("small") / "K2-Small"
    shards = {f"model-{layer + 1}-of-{LAYERS}.safetensors": tensors(layer) for layer in range(LAYERS)}
    write_checkpoint(folder, shards, CONFIG)
    return folder


@pytest.fixture(scope="session")
def small_bf16(small: Path) -> Path:
    """The same in BF16."""
    return k2quant.convert(small, small.parent / "K2-BF16", "bf16").folder


@pytest.fixture(scope="session")
def rounded(small: Path) -> Path:
    """The same in INT4, rounded to nearest."""
    return k2quant.convert(small, small.parent / "K2-INT4", "int4").folder


def spiky(one: Input, part: Part) -> NDArray[np.float32]:
    """Return second moments of columns as models have them: a few channels are far larger; alike in both parts."""
    seed = int.from_bytes(hashlib.sha256(one.name.encode()).digest()[:4], "little")
    shared = np.random.default_rng(seed).lognormal(0, 1.5, one.shape(one.width))
    own = np.random.default_rng((seed, PARTS.index(part))).lognormal(0, 0.1, one.shape(one.width))
    return (shared * own).astype(np.float32)


def counts(layer: int) -> NDArray[np.int64]:
    """Return how many tokens each expert had: of all two, if not the rare one's."""
    if layer != 1:
        return np.full(EXPERTS, TOKENS // 2, np.int64)
    return np.array([270, 260, 260, 10], np.int64)


class Making(NamedTuple):
    """What a folder of statistics is made of."""

    squares: Squares | None = None
    """None: as they are made."""
    hessians: bool = False
    config: dict[str, Any] = CONFIG


def write_stats(folder: Path, source: Path, making: Making) -> Path:
    """Write statistics of a source as a calibration would."""
    data = {
        name: DataPart(hashes=(hashlib.sha256(name.encode()).hexdigest(),), tokens=TOKENS, rows=4, digest="0" * 64)
        for name in ("train", "validation", "test")
    }
    model = Model.of(making.config)
    manifest = Manifest(model=model, data=data, hessians=making.hessians, settings={}, version="0")
    weights = group_tensors(open_checkpoint(source).tensors).weights
    with calibrating(folder, manifest):
        for layer in range(model.layers):
            found = {
                (one.name, part): _measured(one, part, layer, making) for one in inputs(model, layer) for part in PARTS
            }
            here = [weight for weight in weights if names.layer(weight.main.name) == layer]
            crcs = _hessians(folder, layer, model, found) if making.hessians else None
            write_layer(folder, layer, found, digests_of(open_checkpoint(source), here), hessians=crcs)
        write_outside(folder, {})
        finish(folder, manifest)
    return folder


def _measured(one: Input, part: Part, layer: int, making: Making) -> Measured:
    squares = spiky(one, part)
    if making.squares is not None:
        squares = making.squares(one, part, squares)
    tokens: Any = TOKENS if one.experts is None else counts(layer)
    return Measured(
        mean_square=squares,
        mean=np.sqrt(squares) * np.float32(0.5),
        weight=tokens * 0.5,
        tokens=tokens,
        largest=np.sqrt(squares.max(axis=-1)) * np.float32(4),
    )


def hessian_of(squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a matrix of second moments with these on its diagonal and every pair of columns half correlated."""
    root = np.sqrt(squares.astype(np.float64))
    found = 0.5 * np.outer(root, root).astype(np.float32)
    np.fill_diagonal(found, squares)
    return found


def _hessians(folder: Path, layer: int, model: Model, found: dict[Any, Measured]) -> dict[str, list[str]]:
    writer = HessianWriter(folder, layer, model)
    for (name, part), one in found.items():
        single = one.mean_square.ndim == 1
        for expert, squares in enumerate(np.atleast_2d(one.mean_square)):
            writer.write(name, part, hessian_of(squares), expert=None if single else expert)
    return writer.finish()


@pytest.fixture(scope="session")
def stats(small: Path) -> Path:
    """Statistics of the small K2."""
    return write_stats(small.parent / "stats", small, Making())


@pytest.fixture
def make_stats(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return what writes other statistics, of the small K2 or another source; see `Making`."""

    def made(source: Path = small, **making: Any) -> Path:
        return write_stats(tmp_path / "made-stats", source, Making(**making))

    return made


def outlying(one: Input, _part: Part, squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Let two columns of each group of a down_proj have inputs 20 times as large, in both parts."""
    if one.name.endswith("down_proj"):
        squares[..., 5::16] *= np.float32(400)
    return squares


@pytest.fixture(scope="session")
def few_large() -> Squares:
    """Give `outlying` to tests that make statistics of their own."""
    return outlying


@pytest.fixture(scope="session")
def outliers(small: Path) -> Path:
    """Statistics of the small K2 that make folds worth it."""
    return write_stats(small.parent / "outliers", small, Making(squares=outlying))
