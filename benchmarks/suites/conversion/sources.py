"""Write slices of a Kimi K2 checkpoint with real shapes, as block-FP8, BF16 and INT4, without k2quant.

Usage: sources.py FOLDER EXPERTS EXPERTS_PER_SHARD FORMAT...

Layer 1 with EXPERTS routed experts, the router, the norms and `kv_a_proj_with_mqa` (576 rows): about 1% of the weights
lie outside the experts, as in the whole model. FOLDER gets one checkpoint for each format. The formats hold the same
weights: N(0, 0.02) rounded to BF16, then amax/448 for each 128x128 block, or amax/7 for each group of 32.

A few random matrices stand for all experts, each rolled by whole blocks of rows, so that a slice is written at the
speed of the disk. The safetensors files are written as plain bytes. Needs torch and numpy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BLOCK = 128
GROUP = 32
BASES = 3
"""Random matrices for each shape."""
HIDDEN, EXPERT, LATENT, ROUTED = 7168, 2048, 576, 384
SHAPES = {"gate_proj": (EXPERT, HIDDEN), "up_proj": (EXPERT, HIDDEN), "down_proj": (HIDDEN, EXPERT)}
EXPERT_WEIGHTS = 3 * EXPERT * HIDDEN
CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": ROUTED,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "max_position_embeddings": 131072,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
INT4_WEIGHTS: dict[str, object] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": GROUP,
    "num_bits": 4,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}
QUANTIZATION: dict[str, dict[str, object] | None] = {
    "bf16": None,
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "int4": {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": INT4_WEIGHTS,
            }
        },
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a stored matrix, as bytes."""

    suffix: str
    """What follows the name of the module, such as `.weight_scale_inv`."""
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    """The bytes, one row of the matrix (or of its scales) after the other."""
    step: int
    """Rows that belong to one block of 128 rows of weights; 0 for a tensor that is never rolled."""

    def pieces(self, blocks: int) -> list[memoryview]:
        """Return the bytes rolled by whole blocks of rows."""
        first = blocks * self.step
        return [piece.data for piece in (self.rows[first:], self.rows[:first]) if piece.size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file: a part under its full name."""

    name: str
    part: Part
    blocks: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.part.rows.nbytes


def part(suffix: str, dtype: str, tensor: torch.Tensor, step: int) -> Part:
    """View a tensor as rows of bytes."""
    rows = tensor.contiguous().view(torch.uint8).reshape(tensor.shape[0], -1).numpy()
    return Part(suffix=suffix, dtype=dtype, shape=tuple(tensor.shape), rows=rows, step=step)


def store_bf16(weight: torch.Tensor) -> list[Part]:
    """Store BF16 `[N, K]` as it is."""
    return [part(".weight", "BF16", weight, BLOCK)]


def store_fp8(weight: torch.Tensor) -> list[Part]:
    """Store BF16 `[N, K]` as e4m3fn codes and one float32 scale, amax/448, for each 128x128 block."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -rows % BLOCK))
    blocks = padded.view(-1, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows].to(torch.float8_e4m3fn)
    return [part(".weight", "F8_E4M3", codes, BLOCK), part(".weight_scale_inv", "F32", scale, 1)]


def store_int4(weight: torch.Tensor) -> list[Part]:
    """Store BF16 `[N, K]` as packed codes and one BF16 scale, amax/7, for each group of 32 columns."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(dim=2) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
    nibbles = (codes + 8).view(torch.uint8).view(weight.shape)
    words = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return [
        part(".weight_packed", "I32", words, BLOCK),
        part(".weight_scale", "BF16", scale, BLOCK),
        part(".weight_shape", "I32", shape, 0),
    ]


STORE = {"bf16": store_bf16, "fp8": store_fp8, "int4": store_int4}


def around(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Draw BF16 weights from N(0, 0.02)."""
    return (torch.randn(*shape, generator=random) * 0.02).bfloat16()


def small_entries(random: torch.Generator, form: str) -> list[Entry]:
    """Return what is not an expert: kv_a (quantised only in FP8), router, norms."""
    layer = "model.layers.1"
    latent = around(random, LATENT, HIDDEN)
    stored = store_fp8(latent) if form == "fp8" else store_bf16(latent)
    entries = [Entry(name=f"{layer}.self_attn.kv_a_proj_with_mqa{item.suffix}", part=item) for item in stored]
    plain = {
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
        f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
        f"{layer}.mlp.gate.weight": around(random, ROUTED, HIDDEN),
        f"{layer}.mlp.gate.e_score_correction_bias": torch.randn(ROUTED, generator=random),
    }
    for name, tensor in plain.items():
        dtype = "F32" if tensor.dtype == torch.float32 else "BF16"
        entries.append(Entry(name=name, part=part("", dtype, tensor, 0)))
    return entries


def expert_entries(bases: dict[tuple[int, int], list[list[Part]]], expert: int) -> Iterator[Entry]:
    """Yield one expert's tensors, each matrix rolled by its own number of blocks."""
    for place, (projection, shape) in enumerate(SHAPES.items()):
        turn = 2 * expert + place
        blocks = turn // BASES % (shape[0] // BLOCK)
        for item in bases[shape][turn % BASES]:
            name = f"model.layers.1.mlp.experts.{expert}.{projection}{item.suffix}"
            yield Entry(name=name, part=item, blocks=blocks)


def write_file(path: Path, entries: list[Entry]) -> None:
    """Write one safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": entry.part.dtype,
            "shape": list(entry.part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.part.pieces(entry.blocks):
                file.write(piece)


def write_checkpoint(folder: Path, form: str, experts: int, experts_per_shard: int) -> None:
    """Write shards, index and config of one slice in one format."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(1)
    shapes = sorted(set(SHAPES.values()))
    bases = {shape: [STORE[form](around(random, *shape)) for _ in range(BASES)] for shape in shapes}
    starts = range(0, experts, experts_per_shard)
    weight_map: dict[str, str] = {}
    total = 0
    for number, start in enumerate(starts, 1):
        entries = small_entries(random, form) if number == 1 else []
        for expert in range(start, min(start + experts_per_shard, experts)):
            entries += expert_entries(bases, expert)
        name = f"model-{number}-of-{len(starts)}.safetensors"
        write_file(folder / name, entries)
        weight_map |= dict.fromkeys((entry.name for entry in entries), name)
        total += sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    quantization = QUANTIZATION[form]
    config = CONFIG | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    """Write the slices that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("experts", type=int)
    parser.add_argument("experts_per_shard", type=int)
    parser.add_argument("formats", nargs="+", choices=sorted(STORE))
    given = parser.parse_args()
    for form in given.formats:
        write_checkpoint(given.folder / form, form, given.experts, given.experts_per_shard)


if __name__ == "__main__":
    main()
