"""Sizes of the tiny models that tests of training build."""

from __future__ import annotations

from typing import Any

from k2quant.nano import architecture

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
