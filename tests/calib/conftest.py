"""Folders of statistics that nobody measured, rows of random tokens, and a small model to be measured or solved."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

from k2quant.calib.collecting import memory
from k2quant.calib.inputs import Part, Samples
from k2quant.calib.stats.digests import Digests
from k2quant.calib.stats.layout import PARTS, Input, inputs
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.calib.stats.writing import (
    HessianWriter,
    LayerStats,
    Measured,
    calibrating,
    finish,
    write_layer,
    write_outside,
)
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.data.learning import Census
from k2quant.ground import names
from k2quant.ground.release import EXPERTS, INSTRUCT_CONFIG, attention_shapes
from tiny import write_model

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


class MadeUp:
    """Writes folders of statistics below a folder; the same call writes the same bytes."""

    def __init__(self, home: Path) -> None:
        """Keep where."""
        self.home = home

    def manifest(self, *, hessians: bool = False, **config: Any) -> Manifest:
        """Return what a calibration of a model of `CONFIG`, with changes, says of itself."""
        data = {
            name: DataPart(
                hashes=tuple(hashlib.sha256(f"{name} {n}".encode()).hexdigest() for n in range(count // 60)),
                tokens=count,
                rows=count // 20,
                digest=hashlib.sha256(name.encode()).hexdigest(),
            )
            for name, count in TOKENS.items()
        }
        return Manifest(
            model=Model.of(CONFIG | config),
            data=data,
            hessians=hessians,
            settings={"samples": 30, "length": 20},
            version="0.0",
        )

    def layer(self, manifest: Manifest, layer: int, *, empty: int | None = None) -> LayerStats:
        """Return moments of all inputs of a layer; expert `empty` has had no token."""
        random = np.random.default_rng(layer)
        found: dict[Any, Measured] = {}
        for part in PARTS:
            tokens = manifest.data[part].tokens
            routed = _counts(random, manifest.model, tokens, empty)
            for one in inputs(manifest.model, layer):
                found[one.name, part] = _measured(random, one, tokens if one.experts is None else routed)
        return found

    def write(
        self,
        name: str = "stats",
        manifest: Manifest | None = None,
        *,
        empty: int | None = None,
        digests: Digests | None = None,
    ) -> Path:
        """Write a finished folder, or go on where a run was stopped; the digests are those of nothing, by default."""
        folder, said = self.home / name, manifest or self.manifest()
        known = dict(digests or {"model.embed_tokens": {"weight": "0badcafe"}})
        of_layers = [{base: known.pop(base) for base in list(known) if names.layer(base) == n} for n in range(100)]
        with calibrating(folder, said) as done:
            for layer in range(said.model.layers):
                if layer not in done:
                    stats = self.layer(said, layer, empty=empty)
                    crcs = hessians_of(folder, layer, said.model, stats) if said.hessians else None
                    own = of_layers[layer] if digests is not None else digests_of(said.model, layer)
                    write_layer(folder, layer, stats, own, hessians=crcs)
            write_outside(folder, known)
            finish(folder, said)
        return folder

    def stats(self, *given: Any, **named: Any) -> Stats:
        """Write a folder, as `write` does, and open it."""
        return open_stats(self.write(*given, **named))


def _counts(random: np.random.Generator, model: Model, tokens: int, empty: int | None) -> NDArray[np.int64]:
    """Return how many tokens reach each expert, if each has `top_k` of them and one expert has none."""
    others = [expert for expert in range(model.experts) if expert != empty]
    chosen = [random.choice(others, model.top_k, replace=False) for _ in range(tokens)]
    return np.bincount(np.concatenate(chosen), minlength=model.experts).astype(np.int64)


def _measured(random: np.random.Generator, one: Input, tokens: NDArray[np.int64] | int) -> Measured:
    seen = np.asarray(tokens) > 0
    squares = random.chisquare(1, one.shape(one.width)).astype(np.float32) * seen[..., None]
    weight = np.asarray(tokens) * (1.0 if one.experts is None else 0.25)
    largest = np.sqrt(squares.max(axis=-1)) * np.float32(3)
    mean = np.sqrt(squares) * random.uniform(-0.9, 0.9, squares.shape).astype(np.float32)
    return Measured(squares, weight, np.asarray(tokens), largest, mean)


def digests_of(model: Model, layer: int) -> Digests:
    """Return digests, which belong to nothing, of every projection of a layer."""
    attention = [f"self_attn.{name}_proj" for name in ("q_a", "q_b", "kv_b", "o")] + ["self_attn.kv_a_proj_with_mqa"]
    owners = ["mlp.shared_experts", *(f"mlp.experts.{n}" for n in range(model.experts))]
    rest = owners if layer >= model.first_routed else ["mlp"]
    matrices = attention + [f"{owner}.{name}_proj" for owner in rest for name in ("gate", "up", "down")]
    return {
        f"model.layers.{layer}.{name}": {"weight": f"{layer:04x}{n:04x}", "weight_scale_inv": f"{n:08x}"}
        for n, name in enumerate(matrices)
    }


def hessians_of(folder: Path, layer: int, model: Model, stats: LayerStats) -> dict[str, list[str]]:
    """Write diagonal Hessians that fit the moments of a layer; none of an expert without tokens."""
    writer = HessianWriter(folder, layer, model)
    for (name, part), one in stats.items():
        if one.mean_square.ndim == 1:
            writer.write(name, part, np.diag(one.mean_square))
        else:
            for expert in np.flatnonzero(one.tokens).tolist():
                writer.write(name, part, np.diag(one.mean_square[expert]), expert=expert)
    return writer.finish()


@pytest.fixture
def made_up(ram: Path) -> MadeUp:
    """Give what writes folders of statistics below a folder of the test's own."""
    return MadeUp(ram)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """Give the same for a whole file, whose tests change none of what it writes."""
    return MadeUp(tmp_path_factory.mktemp("standing"))


LENGTH = 24


def rows(seed: int, count: int, vocabulary: int) -> Part:
    """Return rows of random tokens; the first holds two texts, the last one ends in padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (count, LENGTH), generator=draw)
    positions = torch.arange(LENGTH).repeat(count, 1)
    positions[0, 10:] -= 10
    real = torch.ones(count, LENGTH, dtype=torch.bool)
    real[-1, -5:] = False
    positions[-1, -5:] = 0
    digest = hashlib.sha256(tokens.numpy().tobytes() + positions.numpy().tobytes()).hexdigest()
    hashes = (hashlib.sha256(f"{seed}".encode()).hexdigest(),)
    return Part(tokens=tokens, positions=positions, real=real, hashes=hashes, digest=digest)


def samples(vocabulary: int, *, seed: int = 0, wanted: int = 12) -> Samples:
    """Return rows of all parts."""
    parts = [rows(3 * seed + number, count, vocabulary) for number, count in enumerate((12, 4, 2))]
    return Samples(
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        wanted=wanted,
        duplicates=0,
        reasoning="split",
        census=Census(),
        unread="",
    )


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Samples]:
    """Give the function that makes rows."""
    return samples


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A K2 of two layers in BF16, one of them with eight experts."""
    folder = tmp_path_factory.mktemp("tiny") / "K2-Tiny"
    write_model(folder)
    return open_checkpoint(folder)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces of a row and segments of two, so that even a small pass has several of each."""
    monkeypatch.setattr(memory, "PIECE_TOKENS", LENGTH)
    monkeypatch.setattr(memory, "SEGMENT_TOKENS", 2 * LENGTH)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Give the function that returns every file of a folder, by its name below it."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def _texts(part: Part) -> Iterator[Tensor]:
    """Yield each text of the rows by itself, without padding."""
    for tokens, positions, real in zip(part.tokens, part.positions, part.real, strict=True):
        count = int(real.sum())
        starts = [*(positions[:count] == 0).nonzero().flatten().tolist(), count]
        yield from (tokens[start:stop][None] for start, stop in itertools.pairwise(starts))


Seen = dict[str, list[tuple[Tensor, Tensor]]]
"""Of each matrix: what it multiplies, `[M, K]`, and how much each row counts."""


def _by_hand(model: Any, part: Part) -> Seen:
    """Run texts through a loaded model, one by one, and note what every matrix multiplies."""
    seen: Seen = defaultdict(list)
    state = model.state_dict()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("_proj") or "kv_a_proj" in last:
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen[name].append((given[0].flatten(0, -2), torch.ones(given[0].numel())))
            )
        if last == "experts":
            module.register_forward_pre_hook(lambda _, given, name=name: _route(seen, state, name, *given))
    with torch.no_grad():
        for tokens in _texts(part):
            model(tokens)
    return seen


def _route(seen: Seen, state: dict[str, Tensor], name: str, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Note what a layer's experts multiply, from what the router gave them."""
    seen[name].append((x, torch.ones(len(x))))
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        p = weights[token, slot]
        gate, up = (x[token] @ state[f"{name}.{expert}.{part}_proj.weight"].T for part in ("gate", "up"))
        seen[f"{name}.{expert}.gate_proj"].append((x[token], p**2))
        seen[f"{name}.{expert}.up_proj"].append((x[token], p**2))
        seen[f"{name}.{expert}.down_proj"].append((silu(gate) * up, p**2))


@pytest.fixture(scope="session")
def by_hand() -> Callable[[Any, Part], Seen]:
    """Give the function that runs texts through a loaded model, and returns what each matrix multiplies."""
    return _by_hand


def _entries() -> Iterator[TensorEntry]:
    """Yield the matrices of K2's first two layers and its embedding in BF16."""
    shapes = {"model.embed_tokens": (163840, 7168)}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}": shape for name, shape in attention_shapes(INSTRUCT_CONFIG).items()}
        experts = [f"experts.{number}." for number in range(EXPERTS)] if layer else []
        for mlp, width in [(each, 2048) for each in experts] or [("", 18432)]:
            shapes |= {f"{prefix}.mlp.{mlp}{name}_proj": (width, 7168) for name in ("gate", "up")}
            shapes[f"{prefix}.mlp.{mlp}down_proj"] = (7168, width)
    for name, (rows, columns) in shapes.items():
        yield TensorEntry(f"{name}.weight", "BF16", (rows, columns), "model.safetensors", 0, 2 * rows * columns)


@pytest.fixture(scope="session")
def k2_headers() -> Checkpoint:
    """K2 as its headers would describe it; there are no files."""
    tensors = {entry.name: entry for entry in _entries()}
    return Checkpoint(Path("/nowhere"), {}, tensors, (), INSTRUCT_CONFIG)
