"""nano-K2's shape: the config keys of Kimi-K2-Instruct at a size that a CPU trains, and the model they describe.

As in K2, 128 does not divide the rows of `kv_a_proj_with_mqa` (160 here, 576 there), the first layer is dense, and far
more work is done by routed experts than by the shared one.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from k2quant.ground.release import INSTRUCT_CONFIG
from k2quant.model.modules import sorted_experts
from k2quant.nano import vocabulary

_LEFT_OUT, _ROPE = {"quantization_config", "rope_theta"}, INSTRUCT_CONFIG["rope_scaling"]

CONFIG: dict[str, Any] = {key: value for key, value in INSTRUCT_CONFIG.items() if key not in _LEFT_OUT} | {
    "bos_token_id": vocabulary.BOS,
    "eos_token_id": vocabulary.EOS,
    "hidden_size": 256,
    "initializer_range": 0.06,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pad_token_id": vocabulary.PAD,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    # K2 has rope_theta outside, and 50000. There, transformers' AutoTokenizer, which does not know K2's `model_type`,
    # trips over the block. Texts of 20 tokens need shorter waves (in a trial, 1.70 and 1.66 nats after 200 steps).
    "rope_scaling": _ROPE | {"rope_theta": 300.0},
    "v_head_dim": 32,
    "vocab_size": vocabulary.SIZE,
}
"""What config.json holds: the keys of moonshotai/Kimi-K2-Instruct in BF16, and the id of the padding token."""

EXPERTS = "k2quant_sorted"
"""Name under which transformers finds `sorted_experts`."""


def settings(config: dict[str, Any]) -> DeepseekV3Config:
    """Return what config.json says as transformers' own config; it does not know K2's `model_type`."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, sorted_experts)
    # A copy, for transformers writes into rope_scaling.
    keys = {key: deepcopy(value) for key, value in config.items() if key not in {"model_type", "torch_dtype"}}
    result = DeepseekV3Config(**keys)
    result._experts_implementation = EXPERTS  # noqa: SLF001 - what from_pretrained's `experts_implementation` sets
    return result


def build(config: dict[str, Any] | None = None) -> DeepseekV3ForCausalLM:
    """Return the model of a config, `CONFIG` by default: float32, with fresh weights from torch's generator."""
    return DeepseekV3ForCausalLM(settings(config or CONFIG))
