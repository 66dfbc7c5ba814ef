"""The model that a config.json describes, as transformers builds it, and the checks that come before building it.

K2's `model_type: kimi_k2` is DeepSeek-V3's architecture under another name (README of MoonshotAI/Kimi-K2), which needs
no code of the checkpoint. K2.5 and later keep the language model's config in `text_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config

from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.config import QUANTIZATION_KEYS
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat

_REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
"""What transformers' DeepSeek-V3 and the kernels take for granted; K2's configs say so, and may leave it out."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
"""What a K2 config must name, lest a default of DeepSeek-V3 stand in for it."""

_VALUES = ("routed_scaling_factor", "rms_norm_eps", "norm_topk_prob", "first_k_dense_replace", "q_lora_rank")
"""What it must name besides, for the same reason."""

_LARGEST = 2**31
_NOT_FOR_MODELS = frozenset({"auto_map", "model_type", "architectures", "transformers_version"})


def architecture(checkpoint: Checkpoint) -> DeepseekV3Config:
    """Return the language model's config of a checkpoint, for transformers.

    Raises:
        CheckpointError: there is no config.json.
        MalformedFile: it lacks a size, holds nonsense, or transformers refuses it.
        UnsupportedFormat: it asks for something that K2 does not have.
    """
    file = checkpoint.folder / CONFIG
    if checkpoint.config is None:
        raise CheckpointError("is not there", file=file, remedy="take it from the model's release")
    text = checkpoint.config.get("text_config", checkpoint.config)
    if not isinstance(text, dict):
        raise MalformedFile("text_config is not an object", file=file)
    _check(text, file)
    dropped = _NOT_FOR_MODELS | set(QUANTIZATION_KEYS)
    try:
        return DeepseekV3Config.from_dict({key: value for key, value in text.items() if key not in dropped})
    except Exception as error:  # whatever transformers stumbles over, the file is to blame
        raise MalformedFile("transformers refuses it", file=file, found=_first_line(error)) from error


def _check(text: dict[str, Any], file: Path) -> None:
    for key in _SIZES:
        size = text.get(key)
        if type(size) is not int or not 0 < size < _LARGEST:
            raise MalformedFile(key, file=file, expected=f"a number from 1 to {_LARGEST - 1}", found=repr(size)[:200])
    missing = [key for key in _VALUES if key not in text]
    homes = (text, text.get("rope_parameters"), text.get("rope_scaling"))
    if not any(isinstance(home, dict) and "rope_theta" in home for home in homes):
        missing.append("rope_theta")
    if missing:
        raise MalformedFile("lacks what the model depends on", file=file, expected=", ".join(missing))
    for key, wanted in _REQUIRED.items():
        if text.get(key, wanted) != wanted:
            raise UnsupportedFormat(key, file=file, expected=repr(wanted), found=repr(text[key])[:200])
    experts, chosen = text["n_routed_experts"], text["num_experts_per_tok"]
    if chosen > experts:
        raise MalformedFile("num_experts_per_tok", file=file, expected=f"at most {experts}", found=chosen)
    heads = text["num_attention_heads"]
    if text.get("num_key_value_heads") not in (None, heads):
        raise UnsupportedFormat(
            "num_key_value_heads", file=file, expected=heads, found=repr(text["num_key_value_heads"])[:200]
        )
    groups, taken = text.get("n_group"), text.get("topk_group")
    if not _fit(experts, groups, taken):
        raise MalformedFile(
            "n_group and topk_group",
            file=file,
            expected=f"groups that divide {experts} experts, and as many taken at most",
            found=f"{groups!r} and {taken!r}"[:200],
        )


def _fit(experts: int, groups: object, taken: object) -> bool:
    """Tell whether the router can choose among groups of experts: it looks at the two best of each."""
    if type(groups) is not int or type(taken) is not int:
        return False
    return 0 < taken <= groups <= experts // 2 and experts % groups == 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
