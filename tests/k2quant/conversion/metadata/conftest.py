"""A small Kimi K3, with every kind of tensor that the released one has, by its names and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint

HIDDEN, LATENT, INNER, EXPERTS, HEADS = 128, 64, 96, 3, 4
LAYER = "language_model.model.layers.{}."
MOE = LAYER + "block_sparse_moe."

TEXT: dict[str, Any] = {
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "architectures": ["KimiLinearForCausalLM"],
    "attn_res_block_size": 12,
    "first_k_dense_replace": 1,
    "hidden_act": "situ",
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "kv_lora_rank": 32,
    "latent_moe_use_norm": True,
    "linear_attn_config": {
        "full_attn_layers": [3],
        "gate_lower_bound": -5.0,
        "head_dim": 32,
        "kda_layers": [1, 2],
        "num_heads": HEADS,
        "short_conv_kernel_size": 4,
        "use_full_rank_gate": True,
    },
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "model_type": "kimi_linear",
    "moe_intermediate_size": INNER,
    "moe_layer_freq": 1,
    "num_experts": EXPERTS,
    "num_experts_per_token": 2,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 2,
    "q_lora_rank": 64,
    "routed_expert_hidden_size": LATENT,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
"""`text_config`, smaller; what K3 takes from transformers' defaults is left out."""

CONFIG: dict[str, Any] = {
    "architectures": ["KimiK3ForConditionalGeneration"],
    "model_type": "kimi_k3",
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "vision_config": {"mm_hidden_size": 32, "vt_hidden_size": 32},
}

MXFP4_BLOCK: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "mxfp4-pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "scale_dtype": "torch.uint8",
                "strategy": "group",
                "symmetric": True,
                "type": "float",
                "zp_dtype": None,
            },
        }
    },
    "format": "mxfp4-pack-quantized",
    "global_compression_ratio": None,
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
        "re:.*vision_tower.*",
        "re:.*mm_projector.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""The block of K3's release, word for word; it stands in `text_config` alone."""

_MATRICES: dict[str, tuple[int, ...]] = {
    **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "g", "o")},
    "self_attn.b_proj.weight": (HEADS, HIDDEN),
    "self_attn.f_a_proj.weight": (32, HIDDEN),
    "self_attn.f_b_proj.weight": (HIDDEN, 32),
}
_KDA: dict[str, tuple[int, ...]] = {
    "self_attn.A_log": (32,),
    "self_attn.dt_bias": (HIDDEN,),
    "self_attn.o_norm.weight": (32,),
    **{f"self_attn.{name}_conv1d.weight": (HIDDEN, 1, 4) for name in "qkv"},
}
"""Those in float32."""
_MLA: dict[str, tuple[int, ...]] = {
    "self_attn.q_a_proj.weight": (64, HIDDEN),
    "self_attn.q_a_layernorm.weight": (64,),
    "self_attn.q_b_proj.weight": (192, 64),
    "self_attn.kv_a_proj_with_mqa.weight": (40, HIDDEN),
    "self_attn.kv_a_layernorm.weight": (32,),
    "self_attn.kv_b_proj.weight": (256, 32),
    "self_attn.g_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
}
_EVERY: dict[str, tuple[int, ...]] = {
    **{f"{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")},
    **{f"{name}_norm.weight": (HIDDEN,) for name in ("mlp_res", "self_attention_res")},
    **{f"{name}_proj.weight": (1, HIDDEN) for name in ("mlp_res", "self_attention_res")},
}
_MIXTURE: dict[str, tuple[int, ...]] = {
    "block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
    "block_sparse_moe.routed_expert_down_proj.weight": (LATENT, HIDDEN),
    "block_sparse_moe.routed_expert_norm.weight": (LATENT,),
    "block_sparse_moe.routed_expert_up_proj.weight": (HIDDEN, LATENT),
    "block_sparse_moe.shared_experts.gate_proj.weight": (2 * INNER, HIDDEN),
    "block_sparse_moe.shared_experts.up_proj.weight": (2 * INNER, HIDDEN),
    "block_sparse_moe.shared_experts.down_proj.weight": (HIDDEN, 2 * INNER),
}
_DENSE: dict[str, tuple[int, ...]] = {
    "mlp.gate_proj.weight": (192, HIDDEN),
    "mlp.up_proj.weight": (192, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, 192),
}
_OUTSIDE: dict[str, tuple[int, ...]] = {
    "language_model.lm_head.weight": (64, HIDDEN),
    "language_model.model.embed_tokens.weight": (64, HIDDEN),
    "language_model.model.norm.weight": (HIDDEN,),
    "language_model.model.output_attn_res_norm.weight": (HIDDEN,),
    "language_model.model.output_attn_res_proj.weight": (1, HIDDEN),
    "mm_projector.proj.0.weight": (64, 64),
    "mm_projector.post_norm.weight": (HIDDEN,),
    "vision_tower.encoder.blocks.0.wqkv.weight": (96, 32),
    "vision_tower.patch_embed.pos_emb.weight": (4, 4, 32),
}
EXPERT: dict[str, tuple[int, int]] = {"w1": (INNER, LATENT), "w2": (LATENT, INNER), "w3": (INNER, LATENT)}
"""Rows and columns of an expert's matrices."""


def rest() -> Shard:
    """Return all tensors but the routed experts."""
    random = np.random.default_rng(7)
    shapes = dict(_OUTSIDE)
    floats: dict[str, tuple[int, ...]] = {}
    for layer in range(3):
        of_layer = _EVERY | (_MLA if layer == 2 else _MATRICES) | (_MIXTURE if layer else _DENSE)
        shapes |= {LAYER.format(layer) + name: shape for name, shape in of_layer.items()}
        floats |= {LAYER.format(layer) + name: shape for name, shape in (_KDA if layer < 2 else {}).items()}
        floats |= {MOE.format(layer) + "gate.e_score_correction_bias": (EXPERTS,)} if layer else {}
    found: Shard = {name: ("BF16", bf16(random, shape)) for name, shape in shapes.items()}
    return found | {name: ("F32", random.standard_normal(shape, np.float32)) for name, shape in floats.items()}


def bf16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return random BF16 values, as bits."""
    return (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def experts() -> dict[str, tuple[int, int]]:
    """Return rows and columns of every routed expert's matrix, by its base."""
    return {
        f"{MOE.format(layer)}experts.{number}.{name}": shape
        for layer in (1, 2)
        for number in range(EXPERTS)
        for name, shape in EXPERT.items()
    }


@pytest.fixture(scope="session")
def k3_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small K3 with its experts in BF16. Not to be changed by a test."""
    random = np.random.default_rng(8)
    folder = tmp_path_factory.mktemp("k3") / "K3-BF16"
    plain: Shard = {f"{base}.weight": ("BF16", bf16(random, shape)) for base, shape in experts().items()}
    write_checkpoint(folder, {"a.safetensors": rest(), "b.safetensors": plain}, CONFIG)
    return folder


@pytest.fixture(scope="session")
def k3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small K3 as it is released, in MXFP4: random codes, block exponents of 8 neighbours."""
    random = np.random.default_rng(9)
    folder = tmp_path_factory.mktemp("k3") / "K3"
    packed: Shard = {}
    for base, (rows, columns) in experts().items():
        codes = random.integers(0, 256, (rows, columns // 2), np.uint8)
        packed[f"{base}.weight_packed"] = ("U8", codes)
        packed[f"{base}.weight_scale"] = ("U8", random.integers(116, 124, (rows, columns // 32), np.uint8))
    config = CONFIG | {"text_config": TEXT | {"quantization_config": MXFP4_BLOCK}}
    write_checkpoint(folder, {"a.safetensors": rest(), "b.safetensors": packed}, config)
    return folder
