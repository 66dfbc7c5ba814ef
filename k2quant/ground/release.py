"""What Moonshot's releases say of themselves: sizes of Kimi-K2-Instruct, the pattern of our small models, and marks."""

from __future__ import annotations

from typing import Any

THINK_OPENS, THINK_CLOSES = "<think>", "</think>"
"""What K2-Thinking and later write before and behind their reasoning (chat_template.jinja of K2-Thinking)."""

INSTRUCT_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
"""Its config.json, without `auto_map`, which names code that lies beside it."""

EXPERTS: int = INSTRUCT_CONFIG["n_routed_experts"]
"""Routed experts of a layer."""

TOP: int = INSTRUCT_CONFIG["num_experts_per_tok"]
"""How many of them a token has."""

HIDDEN: int = INSTRUCT_CONFIG["hidden_size"]
"""Columns of a token: K of an expert's gate and up, N of its down."""

INNER: int = INSTRUCT_CONFIG["moe_intermediate_size"]
"""Width of a routed expert: N of gate and up, K of down."""


def attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return rows and columns `[N, K]` of the matrices of attention in a model with this config, in their order."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    key, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return {
        "q_a_proj": (config["q_lora_rank"], hidden),
        "q_b_proj": (heads * (key + rope), config["q_lora_rank"]),
        "kv_a_proj_with_mqa": (config["kv_lora_rank"] + rope, hidden),
        "kv_b_proj": (heads * (key + value), config["kv_lora_rank"]),
        "o_proj": (hidden, heads * value),
    }


def dense_shapes() -> tuple[tuple[int, int], ...]:
    """Return rows and columns of K2's dense weights: those of attention, then of its only layer without experts."""
    wide: int = INSTRUCT_CONFIG["intermediate_size"]
    return (*attention_shapes(INSTRUCT_CONFIG).values(), (wide, HIDDEN), (HIDDEN, wide))
