"""What mlx-lm calls the tensors of a K2.

The names are those of its models `deepseek_v3`, as which K2 runs, and `kimi_k25`, which has that one inside (mlx-lm
0.32.2, models/deepseek_v3.py, models/kimi_k25.py, utils.py: `MODEL_REMAPPING`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2quant.errors import UnsupportedFormat
from k2quant.exports.places import Names
from k2quant.exports.shapes import BIAS, FILE, KV_B, ROUTER
from k2quant.exports.stacks import Engine

HALVES = ("embed_q", "unembed_out")
"""What becomes of `kv_b_proj`, in its place."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SAME = (
    "input_layernorm",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    KV_B,
    "self_attn.o_proj",
    "post_attention_layernorm",
    ROUTER,
    BIAS,
    *(f"{where}.{part}" for where in ("mlp", "mlp.shared_experts") for part in _PROJECTIONS),
)
_INSIDE = {name: name for name in _SAME} | {f"mlp.experts.{part}": f"mlp.switch_mlp.{part}" for part in _PROJECTIONS}
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")

_PREFIXES = {"kimi_k2": "", "deepseek_v3": "", "kimi_k25": "language_model."}
"""What names begin with, by the config's `model_type`."""


def engine_of(config: Mapping[str, Any]) -> Engine:
    """Return mlx-lm with its names of a model.

    Raises:
        UnsupportedFormat: it runs no such model, or not as config.json says.
    """
    kind = config.get("model_type")
    prefix = _PREFIXES.get(kind) if isinstance(kind, str) else None
    if prefix is None:
        expected = " or ".join(_PREFIXES)
        raise UnsupportedFormat("model_type", file=FILE, expected=expected, found=repr(kind)[:100])
    called = Names(f"{prefix}model.layers", {name: prefix + name for name in _OUTSIDE}, _INSIDE, bias="")
    vision = "mlx-lm runs the language model alone, and takes these away when it loads"
    return Engine("mlx-lm", called, as_which="mlx-lm's deepseek_v3, as which K2 runs,", vision=vision)
