"""Write a slice of K2-Thinking in real widths, with weights by chance, and export it for mlx-lm; print what it took.

Usage: python benchmarks/suites/exports/mlx_slice.py FOLDER [EXPERTS]

FOLDER then holds `native` and `export`. One dense layer and two with EXPERTS experts (24 by default), 64 heads, and a
small vocabulary: 1.5 GB with 24.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.exports import export_mlx
from k2quant.ground.release import INSTRUCT_CONFIG, attention_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYERS = 3
HIDDEN, MOE, VOCABULARY = 7168, 2048, 4096

_BLOCK = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            "input_activations": None,
            "output_activations": None,
        }
    },
}


def _floats(random: np.random.Generator, *shape: int) -> tuple[str, NDArray[Any]]:
    bits = (random.standard_normal(shape, np.float32) * np.float32(0.02)).view(np.uint32)
    return "BF16", (bits >> 16).astype(np.uint16)


def _expert(random: np.random.Generator, base: str, rows: int, width: int) -> Shard:
    words = random.integers(-(2**31), 2**31, (rows, width // 8), dtype=np.int32)
    scale = np.full((rows, width // 32), 0x3B00, np.uint16) + random.integers(0, 99, (rows, width // 32), np.uint16)
    size = np.array([rows, width], np.int32)
    return {
        f"{base}.weight_packed": ("I32", words),
        f"{base}.weight_scale": ("BF16", scale),
        f"{base}.weight_shape": ("I32", size),
    }


def write(folder: Path, experts: int) -> None:
    """Write the slice."""
    random = np.random.default_rng(0)
    config = INSTRUCT_CONFIG | {
        "num_hidden_layers": LAYERS,
        "n_routed_experts": experts,
        "vocab_size": VOCABULARY,
        "intermediate_size": MOE,
        "quantization_config": _BLOCK,
    }
    shards: dict[str, Shard] = {}
    ends: Shard = {
        name: _floats(random, VOCABULARY, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    shards["model-ends.safetensors"] = {**ends, "model.norm.weight": _floats(random, HIDDEN)}
    for layer in range(LAYERS):
        before = f"model.layers.{layer}."
        here: Shard = {f"{before}{name}": _floats(random, HIDDEN) for name in _NORMS}
        here |= {
            f"{before}self_attn.{name}.weight": _floats(random, *s) for name, s in attention_shapes(config).items()
        }
        for name, width in (("q_a_layernorm", 1536), ("kv_a_layernorm", 512)):
            here[f"{before}self_attn.{name}.weight"] = _floats(random, width)
        inner = "mlp." if layer == 0 else "mlp.shared_experts."
        for part, shape in _PARTS.items():
            here[f"{before}{inner}{part}_proj.weight"] = _floats(random, *shape)
        if layer:
            here[f"{before}mlp.gate.weight"] = _floats(random, experts, HIDDEN)
            here[f"{before}mlp.gate.e_score_correction_bias"] = ("F32", np.zeros(experts, np.float32))
            for number in range(experts):
                for part, shape in _PARTS.items():
                    here |= _expert(random, f"{before}mlp.experts.{number}.{part}_proj", *shape)
        shards[f"model-layer-{layer}.safetensors"] = here
    write_checkpoint(folder, shards, config)


_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_PARTS = {"gate": (MOE, HIDDEN), "up": (MOE, HIDDEN), "down": (HIDDEN, MOE)}


def main() -> None:
    """Write, export, print."""
    home = Path(sys.argv[1])
    shutil.rmtree(home, ignore_errors=True)
    write(home / "native", int(sys.argv[2]) if len(sys.argv) > 2 else 24)
    begun = time.perf_counter()
    shutil.copytree(home / "native", home / "copy")
    copied = time.perf_counter() - begun
    shutil.rmtree(home / "copy")
    done = export_mlx(home / "native", home / "export")
    print(json.dumps({"bytes": done.report["bytes_read"], "copy_s": copied, "export_s": done.report["seconds"]}))


if __name__ == "__main__":
    main()
