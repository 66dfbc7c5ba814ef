"""A checkpoint of 60 kB in two shards, to be served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_small(folder: Path, seed: int = 0) -> Path:
    """Write two routed experts, an embedding and a head in BF16, with a tokenizer's settings and a file in a folder."""
    experts = [
        f"model.layers.1.mlp.experts.{number}.{part}_proj.weight" for number in range(2) for part in ("gate", "up")
    ]
    names = (["model.embed_tokens.weight", *experts[:2]], [*experts[2:], "lm_head.weight"])
    rng = np.random.default_rng(seed)
    shards: dict[str, Shard] = {
        file: {name: ("BF16", rng.integers(0x3C00, 0x3E00, (64, 64), dtype=np.uint16)) for name in held}
        for file, held in zip(SHARDS, names, strict=True)
    }
    write_checkpoint(folder, shards, {"model_type": "kimi_k2", "torch_dtype": "bfloat16"})
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    (folder / "docs").mkdir()
    (folder / "docs" / "notes.txt").write_text("notes")
    return folder
