"""The checkpoints that the benchmark of models loads: nano-K2 and one layer of full size, in three formats.

The layer's formats are made by `k2quant convert` from BF16, and again BF16 from these: the same values as FP8 and INT4
hold, for transformers to say what the logits should be. transformers gets the same bytes through links, beside a
config.json that says `deepseek_v3` instead of `kimi_k2`, which it does not know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2quant.conversion.convert import convert
from k2quant.formats.known import FormatName
from suites.common import machine, measure
from suites.conversion import sources
from suites.conversion.sources import BASES, BLOCK, CONFIG, QUANTIZATION, SHAPES, STORE, Entry, Part, around, part

FORMATS: tuple[FormatName, ...] = ("bf16", "fp8", "int4")
LAYER_VOCABULARY = 2048
PER_SHARD = 20
"""Experts in one shard of the layer: 1.8 GB."""
DONE = "done.json"
Bases = dict[tuple[int, int], list[list[Part]]]
"""Random matrices by shape, as they are stored."""
TINY = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""What `--quick` makes of the layer; its ranks stay K2's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model in every format, in a folder of its own."""

    name: str
    folder: Path
    bf16: Path
    """The BF16 checkpoint; it may lie elsewhere."""

    def source(self, form: FormatName) -> Path:
        """Return the checkpoint in a format, as k2quant loads it."""
        return self.bf16 if form == "bf16" else self.folder / form

    def peer(self, form: FormatName) -> Path:
        """Return the same bytes for transformers."""
        return self.folder / f"peer-{form}"

    def reference(self, form: FormatName) -> Path:
        """Return the file of the logits that all are held to."""
        return self.folder / f"reference-{form}.npy"

    def record(self) -> dict[str, Any]:
        """Describe it for JSON."""
        config = json.loads((self.source("bf16") / "config.json").read_text())
        keys = (*CONFIG, "q_lora_rank")
        shape = {key: config[key] for key in keys if isinstance(config.get(key), int)}
        return {"shape": shape, "bytes": {form: measure.size(self.source(form)) for form in FORMATS}}


def nano(work: Path, given: Path | None) -> Model:
    """Return nano-K2 in all formats: a given BF16 checkpoint, or one that is trained now."""
    source = given or work / "nano-k2"
    if not (source / "config.json").exists():
        subprocess.run([sys.executable, "-m", "k2quant", "nano", str(source)], check=True, cwd=machine.ROOT)
    changed = max(path.stat().st_mtime_ns for path in source.iterdir())
    return _prepared(Model(name="nano", folder=work / "nano", bf16=source), [str(source), changed])


def layer(work: Path, experts: int, *, tiny: bool) -> Model:
    """Return the layer in all formats; it is written anew if it is not there."""
    made = Model(name="layer", folder=work / "layer", bf16=work / "layer" / "bf16")
    stamp = [experts, tiny]
    if _stamp(made.folder) != stamp:
        measure.remove(made.folder)
        write_layer(made.bf16, experts, CONFIG | (TINY if tiny else {}))
    return _prepared(made, stamp)


def _stamp(folder: Path) -> Any:
    file = folder / DONE
    return json.loads(file.read_text()) if file.exists() else None


def _prepared(made: Model, stamp: list[Any]) -> Model:
    """Convert a BF16 checkpoint and link what transformers reads, unless that is done."""
    if _stamp(made.folder) == stamp:
        return made
    made.folder.mkdir(parents=True, exist_ok=True)
    for file in (made.folder / DONE, *map(made.reference, FORMATS)):
        file.unlink(missing_ok=True)
    for form in FORMATS:
        if form != "bf16":
            convert(made.bf16, made.source(form), to=form, restart=True)
        link(made.source(form), made.peer(form))
    (made.folder / DONE).write_text(json.dumps(stamp))
    return made


def dequantized(made: Model, form: FormatName) -> Path:
    """Write BF16 from a quantised format and return it with links for transformers; the caller removes the parent."""
    back = made.folder / f"{form}-bf16"
    convert(made.source(form), back, to="bf16", restart=True)
    link(back, back / "peer")
    return back / "peer"


def link(source: Path, folder: Path) -> None:
    """Make a folder with links to a checkpoint's files, and a config.json whose `model_type` transformers knows."""
    measure.remove(folder)
    folder.mkdir(parents=True)
    for path in (path for path in source.iterdir() if path.is_file()):
        if path.name == "config.json":
            config = json.loads(path.read_text()) | {"model_type": "deepseek_v3"}
            (folder / path.name).write_text(json.dumps(config, indent=1))
        else:
            (folder / path.name).symlink_to(path.resolve())


def write_layer(folder: Path, experts: int, shape: dict[str, Any], form: FormatName = "bf16") -> None:
    """Write one MoE layer of K2, between a small embedding and head.

    Weights are N(0, 0.02), the embedding N(0, 1), so that the tokens, not what attention has in common, choose the
    experts. As in `sources.py`, a few random matrices stand for all experts, each rolled by blocks of rows.

    Args:
        folder: where; it must not be there.
        experts: how many are routed to.
        shape: config of K2, possibly smaller.
        form: of the routed experts; everything else is BF16.
    """
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(1)
    config = shape | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "n_routed_experts": experts,
        "vocab_size": LAYER_VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if quantization := QUANTIZATION[form]:
        config["quantization_config"] = quantization
    shapes = {name: _shape(name, config) for name in SHAPES}
    store = STORE[form]
    bases = {shape: [store(around(random, *shape)) for _ in range(BASES)] for shape in set(shapes.values())}
    files = [list(_outside(random, config))]
    for first in range(0, experts, PER_SHARD):
        numbers = range(first, min(first + PER_SHARD, experts))
        files.append([entry for number in numbers for entry in _expert(bases, shapes, number)])
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(files, 1):
        name = f"model-{number}-of-{len(files)}.safetensors"
        sources.write_file(folder / name, entries)
        weight_map |= dict.fromkeys((entry.name for entry in entries), name)
    total = sum(entry.nbytes for entries in files for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _shape(name: str, config: dict[str, Any]) -> tuple[int, int]:
    inner, hidden = config["moe_intermediate_size"], config["hidden_size"]
    return (hidden, inner) if name == "down_proj" else (inner, hidden)


def _outside(random: torch.Generator, config: dict[str, Any]) -> Iterator[Entry]:
    """Yield what lies outside the routed experts."""
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    layer = "model.layers.0"
    projections = {
        "self_attn.q_a_proj": (query, hidden),
        "self_attn.q_b_proj": (heads * (nope + rope), query),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden),
        "self_attn.kv_b_proj": (heads * (nope + value), latent),
        "self_attn.o_proj": (hidden, heads * value),
        **{f"mlp.shared_experts.{name}": _shape(name, config) for name in SHAPES},
        "mlp.gate": (experts, hidden),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": query, "self_attn.kv_a_layernorm": latent}
    plain = {f"{layer}.{name}.weight": around(random, *shape) for name, shape in projections.items()}
    plain |= {f"{layer}.{name}.weight": torch.ones(size).bfloat16() for name, size in norms.items()}
    plain |= {"model.norm.weight": torch.ones(hidden).bfloat16()}
    plain |= {"lm_head.weight": around(random, LAYER_VOCABULARY, hidden)}
    plain |= {"model.embed_tokens.weight": torch.randn(LAYER_VOCABULARY, hidden, generator=random).bfloat16()}
    for name, tensor in plain.items():
        yield Entry(name=name, part=part("", "BF16", tensor, 0))
    bias = torch.zeros(experts)
    yield Entry(name=f"{layer}.mlp.gate.e_score_correction_bias", part=part("", "F32", bias, 0))


def _expert(bases: Bases, shapes: dict[str, tuple[int, int]], expert: int) -> Iterator[Entry]:
    """Yield one expert's matrices, each rolled by its own number of blocks."""
    for place, (projection, shape) in enumerate(shapes.items()):
        turn = 2 * expert + place
        for item in bases[shape][turn % BASES]:
            name = f"model.layers.0.mlp.experts.{expert}.{projection}{item.suffix}"
            yield Entry(name=name, part=item, blocks=turn // BASES % (shape[0] // BLOCK))
