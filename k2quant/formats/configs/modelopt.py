"""`quantization_config` as NVIDIA's ModelOpt has it, and its own file beside config.json.

Written as nvidia-modelopt 0.47 writes them (torch/export/convert_hf_config.py, `convert_hf_quant_config_format`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from k2quant.ground import names

METHOD = "modelopt"

FILE = "hf_quant_config.json"
"""ModelOpt's own file. Engines that find no block in config.json read this one."""

CACHE: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
"""`kv_cache_scheme` of an FP8 cache of keys and values."""

WITH_INPUTS, WEIGHTS_ONLY = "NVFP4", "W4A16_NVFP4"
"""`quant_algo` of NVFP4 weights: with quantised inputs, whose scale stands in the checkpoint, or with inputs as they are.
"""

_GROUP = 16

_PATTERNS = (
    ("*lm_head",),
    ("*self_attn*",),
    ("*.mlp.gate",),
    ("*.shared_experts*",),
    ("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.gate_up_proj", "*.mlp.down_proj"),
    ("*vision_tower*",),
    ("*mm_projector*",),
    ("*.eh_proj",),
    ("*.shared_head.head",),
)
"""Modules that K2's NVFP4 checkpoints leave as they are; each stands in the list if it is right for a checkpoint's
names."""


def block(quantised: Iterable[str], kept: list[str], *, inputs: bool) -> dict[str, Any]:
    """Return a quantization block.

    Args:
        quantised: the bases of the weights in NVFP4.
        kept: the bases of all other matrices.
        inputs: whether a scale of the inputs stands beside each weight.
    """
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _GROUP}
    return {
        "config_groups": {
            "group_0": {
                **({"input_activations": scheme} if inputs else {}),
                "weights": scheme,
                "targets": ["Linear"],
            }
        },
        "ignore": ignore_list(quantised, kept),
        "quant_algo": WITH_INPUTS if inputs else WEIGHTS_ONLY,
        "quant_method": METHOD,
    }


def companion(block: Mapping[str, Any]) -> bytes:
    """Return `hf_quant_config.json`, which says what a block says."""
    content = {
        "quantization": {
            "quant_algo": block["quant_algo"],
            "kv_cache_quant_algo": "FP8" if block.get("kv_cache_scheme") else None,
            "group_size": _GROUP,
            "exclude_modules": block["ignore"],
        }
    }
    return json.dumps(content, indent=4).encode() + b"\n"


def ignore_list(quantised: Iterable[str], kept: list[str]) -> list[str]:
    """Return a list that covers every matrix kept and no matrix quantised, as engines match it.

    vLLM (vllm/model_executor/layers/quantization/modelopt.py, `is_layer_excluded`) leaves a module out whose name a
    pattern matches as `fnmatch` does, or in which an entry is found anywhere; TensorRT-LLM matches patterns. Engines call
    fused matrices by names of their own, so patterns that cover those come first; what none of them covers stands by
    its full name.
    """
    quantised = list(quantised)
    chosen: list[str] = []
    rest = [base for base in kept if names.tensor_class(f"{base}.weight") != "embedding"]
    for patterns in _PATTERNS:
        left = [base for base in rest if not any(fnmatchcase(base, pattern) for pattern in patterns)]
        if len(left) < len(rest) and not any(fnmatchcase(base, each) for base in quantised for each in patterns):
            chosen += patterns
            rest = left
    return chosen + rest
