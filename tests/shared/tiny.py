"""Tiny models, data and jobs that tests of training share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.nano import architecture, vocabulary, writing

DEEPSEEK = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
}
"""Options of transformers' `DeepseekV3Config`."""

NANO: dict[str, Any] = architecture.CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
"""The `config.json` of a nano-K2 with less of everything but layers."""


def write_model(folder: Path, seed: int = 0) -> None:
    """Write a K2 of 100,000 weights and two layers in BF16, with nano's tokenizer."""
    torch.manual_seed(seed)
    config = NANO | {"num_hidden_layers": 2}
    write_checkpoint(folder, writing._shards(architecture.build(config)), config)  # noqa: SLF001  nano writes its own
    for name, content in vocabulary.files().items():
        (folder / name).write_bytes(content)


def write_data(path: Path, count: int = 40) -> None:
    """Write texts that follow a rule: each letter is one, two or three behind the last."""
    texts = ["".join(chr(97 + (7 * i + j * (1 + i % 3)) % 26) for j in range(24)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def job_content(folder: Path, output: str = "run", **changes: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of a job of four steps on what lies in a folder, with changes to its sections."""
    content: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": str(folder / output),
        "data": {"path": str(folder / "data.jsonl"), "length": 32, "held_out": 4},
        "training": {"steps": 4, "batch": 4, "evaluate_every": 2, "least_tokens": 0},
        "optimizer": {"rate": 1e-3},
        "saving": {"every": 2},
    }
    for name, change in changes.items():
        content[name] = {**content.get(name, {}), **change}
    return content
