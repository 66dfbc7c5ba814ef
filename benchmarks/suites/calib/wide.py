"""One MoE layer as wide as K2's, in FP8, with as many experts as asked for, and the passes over it that are timed.

Usage: python -m suites.calib.wide stream|collect SOURCE STATS MEMORY

Prints, as JSON, the seconds of a pass over the rows of `SOURCE/rows.jsonl` and how many tokens they have; imports are
left out. `stream` is a plain `stream_forward`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.ground.release import EXPERTS as ALL_EXPERTS
from k2quant.ground.release import HIDDEN, INNER, INSTRUCT_CONFIG, TOP, attention_shapes
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.grids import BLOCK
from k2quant.kernels.codecs.values import float_to_bf16
from k2quant.nano import vocabulary
from suites.calib import samples

if TYPE_CHECKING:
    from k2quant.calib.inputs import Samples

EXPERTS = 64
"""Of the layer that is converted, 3 GB."""
FEW = 16
"""Of the layer that is passed through; a token has eight."""
DOCUMENTS = 100
LENGTH = 512
"""Tokens of a row."""
MEMORY = 4_000_000_000
ROUNDS = 2
"""Of whole commands, after one that warms up."""

LAYERS = 60
"""Of K2 that have routed experts."""
TOKENS = 512 * 2048
"""Of the calibration that is projected, as `k2quant calibrate` has it by default."""
NODE_CORES = 64
FLOP_A_TOKEN = 2 * TOP * 3 * HIDDEN * INNER
"""Of a token in the routed experts of one layer."""
H200_FLOPS = 4e14
"""Assumed: 40% of an H200's 989 TFLOP/s in dense BF16."""
DISK = 2e9
"""Assumed: bytes a second from the disk; all of K2's FP8 are read once."""
K2_BYTES = 1.03e12


def weights(experts: int) -> int:
    """Return the weights of the routed experts."""
    return 3 * experts * HIDDEN * INNER


def written(folder: Path, experts: int) -> Path:
    """Return a checkpoint of one layer with so many experts; it is written if it is not there yet."""
    if not (folder / "config.json").exists():
        changed = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": experts}
        config = INSTRUCT_CONFIG | changed | {"vocab_size": vocabulary.SIZE}
        config |= {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS, "pad_token_id": vocabulary.PAD}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in vocabulary.files().items():
            (folder / name).write_bytes(content)
        samples.write_draw(folder / "rows.jsonl", 0, 0, DOCUMENTS)
        write_checkpoint(folder, dict(_shards(experts, config)), config)
    return folder


def _shards(experts: int, config: dict[str, Any]) -> Iterator[tuple[str, Shard]]:
    """Yield a shard for every 16 experts, and one with all else. All experts have the same random weights."""
    generator = np.random.default_rng(0)
    projections = {
        name: _fp8(generator, shape)
        for name, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items()
    }
    layer = "model.layers.0"
    for first in range(0, experts, 16):
        shard: Shard = {}
        for expert in range(first, min(first + 16, experts)):
            for name, parts in projections.items():
                shard |= _named(f"{layer}.mlp.experts.{expert}.{name}_proj", parts)
        yield f"experts-{first}.safetensors", shard
    rest: Shard = {}
    for name, shape in attention_shapes(config).items():
        rest |= _named(f"{layer}.self_attn.{name}", _fp8(generator, shape))
    for name, parts in projections.items():
        rest |= _named(f"{layer}.mlp.shared_experts.{name}_proj", parts)
    norms = {
        "model.norm": HIDDEN,
        f"{layer}.input_layernorm": HIDDEN,
        f"{layer}.post_attention_layernorm": HIDDEN,
        f"{layer}.self_attn.q_a_layernorm": config["q_lora_rank"],
        f"{layer}.self_attn.kv_a_layernorm": config["kv_lora_rank"],
    }
    rest |= {f"{name}.weight": ("BF16", np.full(width, 0x3F80, np.uint16)) for name, width in norms.items()}
    wide = {"model.embed_tokens": vocabulary.SIZE, "lm_head": vocabulary.SIZE, f"{layer}.mlp.gate": experts}
    rest |= {f"{name}.weight": ("BF16", _random(generator, (rows, HIDDEN))) for name, rows in wide.items()}
    rest[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", np.zeros(experts, np.float32))
    yield "rest.safetensors", rest


def _random(generator: np.random.Generator, shape: tuple[int, int]) -> Any:
    return float_to_bf16(generator.standard_normal(shape, np.float32) * np.float32(0.02))


def _fp8(generator: np.random.Generator, shape: tuple[int, int]) -> Shard:
    codes = np.empty(shape, np.uint8)
    scale = np.empty([math.ceil(side / block) for side, block in zip(shape, BLOCK, strict=True)], np.float32)
    cpu.fp8.encode(_random(generator, shape), BLOCK, codes, scale)
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scale)}


def _named(base: str, parts: Shard) -> Shard:
    return {f"{base}.{suffix}": part for suffix, part in parts.items()}


def read(source: Path) -> Samples:
    """Return the rows of a checkpoint's own documents."""
    from k2quant.calib.inputs import read_samples
    from k2quant.model.generation import load_tokenizer

    data = source / "rows.jsonl"
    return read_samples(data, load_tokenizer(source), samples=DOCUMENTS, length=LENGTH, vocabulary=vocabulary.SIZE)


def calibrated(source: Path, stats: Path) -> Path:
    """Return the statistics of a checkpoint; they are measured if they are not there yet."""
    from k2quant.calib import calibrate

    if not (stats / "k2quant_stats.json").exists():
        calibrate(source, stats, data=str(source / "rows.jsonl"), samples=2, length=LENGTH)
    return stats


def stream(source: Path, rows: Samples) -> None:
    """Run the rows through the model, plainly."""
    from k2quant.model import stream_forward

    parts = [(part.tokens.split(1), part.positions.split(1)) for part in (rows.train, rows.validation)]
    batches = [
        {"input_ids": tokens, "position_ids": positions}
        for part in parts
        for tokens, positions in zip(*part, strict=True)
    ]
    for _ in stream_forward(source, batches):
        pass


def collect(source: Path, rows: Samples, stats: Path, memory: int) -> None:
    """Run the rows through the model and collect."""
    from k2quant.calib import collecting
    from k2quant.checkpoint.reader import open_checkpoint

    collecting.collect(open_checkpoint(source), stats, rows, memory=memory)


def paper(found: dict[str, Any]) -> dict[str, float]:
    """Return what collecting would take for all of K2, in hours: arithmetic from stated numbers, nothing was run."""
    passes = found["passes"]
    token = passes["collect"]["median"] / passes["tokens"]
    flops = LAYERS * TOKENS * FLOP_A_TOKEN
    reading = K2_BYTES / DISK
    return {
        "this machine": LAYERS * TOKENS * token / 3600,
        "node": max(LAYERS * TOKENS * token * 2 / NODE_CORES, reading) / 3600,
        "one": max(flops / H200_FLOPS, reading) / 3600,
        "eight": max(flops / H200_FLOPS / 8, reading) / 3600,
        "disk": reading / 3600,
        "experts": ALL_EXPERTS,
        "compute one": flops / H200_FLOPS / 3600,
    }


def main(what: str, source: Path, stats: Path, memory: int) -> None:
    """Time a pass."""
    from k2quant.calib import collecting, inputs  # noqa: F401  so that importing is not timed
    from k2quant.model import stream_forward  # noqa: F401
    from k2quant.model.generation import silence

    silence()
    rows = read(source)
    begun = time.perf_counter()
    if what == "stream":
        stream(source, rows)
    else:
        collect(source, rows, stats, memory)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "tokens": rows.train.count + rows.validation.count}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
