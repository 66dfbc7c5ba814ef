"""Write the layout of the real Kimi-K2-Instruct without its weights: a trillion parameters to plan with, in a few MB.

    python examples/k2_layout.py K2-layout
    k2quant inspect K2-layout
    k2quant convert --to int4 --dry-run K2-layout K2-INT4

Names, dtypes, shapes and shards are those of moonshotai/Kimi-K2-Instruct: 61 layers, 384 experts, block FP8, 61 shards.
Each shard has a true header; behind it lies a hole that reads as zeros and takes no disk, on a file system that knows
sparse files. It is for looking and for dry runs: there is nothing in it to convert, and copying it may fill a disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path

from k2quant.ground.release import EXPERTS, HIDDEN, INNER, INSTRUCT_CONFIG, attention_shapes

LAYERS: int = INSTRUCT_CONFIG["num_hidden_layers"]
BLOCK: int = INSTRUCT_CONFIG["quantization_config"]["weight_block_size"][0]
WIDTH = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
"""Bytes of an element."""

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors spells it, shape."""


def quantised(base: str, rows: int, columns: int) -> Iterator[Tensor]:
    """Yield a matrix `[rows, columns]` in block FP8: its codes, and a scale for each block, cut blocks too."""
    yield f"{base}.weight", "F8_E4M3", (rows, columns)
    yield f"{base}.weight_scale_inv", "F32", (ceil(rows / BLOCK), ceil(columns / BLOCK))


def gated(base: str, inner: int) -> Iterator[Tensor]:
    """Yield gate, up and down of an MLP that is `inner` wide."""
    yield from quantised(f"{base}.gate_proj", inner, HIDDEN)
    yield from quantised(f"{base}.up_proj", inner, HIDDEN)
    yield from quantised(f"{base}.down_proj", HIDDEN, inner)


def decoder(layer: int) -> Iterator[Tensor]:
    """Yield the tensors of a decoder layer."""
    base = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{base}.{norm}.weight", "BF16", (HIDDEN,)
    for norm, size in (("q_a_layernorm", "q_lora_rank"), ("kv_a_layernorm", "kv_lora_rank")):
        yield f"{base}.self_attn.{norm}.weight", "BF16", (INSTRUCT_CONFIG[size],)
    for name, (rows, columns) in attention_shapes(INSTRUCT_CONFIG).items():
        yield from quantised(f"{base}.self_attn.{name}", rows, columns)
    yield f"{base}.self_attn.rotary_emb.inv_freq", "BF16", (56,)  # a stray buffer that the release has
    if layer < INSTRUCT_CONFIG["first_k_dense_replace"]:
        yield from gated(f"{base}.mlp", INSTRUCT_CONFIG["intermediate_size"])
        return
    yield f"{base}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
    yield f"{base}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
    yield from gated(f"{base}.mlp.shared_experts", INNER)
    for expert in range(EXPERTS):
        yield from gated(f"{base}.mlp.experts.{expert}", INNER)


def shard(layer: int) -> Iterator[Tensor]:
    """Yield the tensors of a shard: a layer each, the embedding in the first one, norm and head in the last."""
    words = (INSTRUCT_CONFIG["vocab_size"], HIDDEN)
    if layer == 0:
        yield "model.embed_tokens.weight", "BF16", words
    yield from decoder(layer)
    if layer == LAYERS - 1:
        yield "model.norm.weight", "BF16", (HIDDEN,)
        yield "lm_head.weight", "BF16", words


def write_shard(path: Path, tensors: list[Tensor]) -> int:
    """Write a safetensors file with a true header and a hole for its data, and return the bytes of the data."""
    header: dict[str, object] = {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + WIDTH[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return begin


def write_layout(folder: Path) -> int:
    """Write shards, index and config to a new folder, and return the bytes that the tensors would take."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(LAYERS):
        name = f"model-{layer + 1}-of-{LAYERS}.safetensors"
        tensors = list(shard(layer))
        total += write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys((tensor[0] for tensor in tensors), name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(INSTRUCT_CONFIG, indent=2))
    return total


def main() -> None:
    """Write the layout to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it; must not be there yet")
    folder = parser.parse_args().folder
    try:
        total = write_layout(folder)
    except OSError as error:
        sys.exit(f"{folder}: {error.strerror}")
    kept = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    sys.stdout.write(f"{folder}: the layout of {total / 1e12:.2f} TB in {kept / 1e6:.0f} MB on the disk, no weights\n")


if __name__ == "__main__":
    main()
