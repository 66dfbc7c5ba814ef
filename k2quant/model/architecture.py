"""The model that a config.json describes, as transformers builds it, and the checks that come before building it.

K2's `model_type: kimi_k2` is DeepSeek-V3's architecture under another name (README of MoonshotAI/Kimi-K2), which needs
no code of the checkpoint. K2.5 and later keep the language model's config in `text_config`.

Only keys that are known and checked reach transformers: a config may otherwise choose kernels to download, or sizes
that nothing in the checkpoint bears out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config

from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.conversion.metadata.relatives import K3_TYPES, MODEL_TYPES, other_types
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.formats.format import listed
from k2quant.ground.saying.faults import said

_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""What transformers' DeepSeek-V3 and the kernels take for granted; K2's configs say so, and may leave it out."""

_OF_K3 = (
    ": K3 has another architecture, with linear attention (KDA) in most layers, gated MLA without positions in the "
    "others, experts that work in a smaller space of their own (routed_expert_hidden_size), SiTU in place of SiLU and "
    "residuals of attention (attn_res_block_size)"
)
"""Which, by config.json of moonshotai/Kimi-K3."""

_LARGEST = 2**31

Check = tuple[str, Callable[[Any], bool]]
"""What is expected, in words and as a test."""


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


_SIZE: Check = ("a whole number from 1 to 2147483647", lambda v: type(v) is int and 0 < v < _LARGEST)
_COUNT: Check = ("a whole number from 0 to 1000000", lambda v: type(v) is int and 0 <= v <= 1_000_000)
_PERHAPS: Check = ("a whole number from 0 to 1000000, or null", lambda v: v is None or _COUNT[1](v))
_OPTIONAL: Check = ("a whole number from 1 to 2147483647, or null", lambda v: v is None or _SIZE[1](v))
_FACTOR: Check = ("a number above 0, at most 1e9", lambda v: _is_number(v) and 0 < v <= 1e9)
_BASE: Check = ("a number above 1, at most 1e9", lambda v: _is_number(v) and 1 < v <= 1e9)
_SMALL: Check = ("a number above 0, below 1", lambda v: _is_number(v) and 0 < v < 1)
_SHARE: Check = ("a number from 0, below 1", lambda v: _is_number(v) and 0 <= v < 1)
_FLAG: Check = ("true or false", lambda v: type(v) is bool)
_ROPE_KIND: Check = ("yarn or default", lambda v: isinstance(v, str) and v in {"yarn", "default"})
_SCALE: Check = ("a number from 0 to 1e9", lambda v: _is_number(v) and 0 <= v <= 1e9)

_NEEDED: dict[str, Check] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "moe_intermediate_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "n_routed_experts": _SIZE,
    "n_shared_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "n_group": _SIZE,
    "topk_group": _SIZE,
    "q_lora_rank": _OPTIONAL,
    "kv_lora_rank": _SIZE,
    "qk_rope_head_dim": _SIZE,
    "qk_nope_head_dim": _SIZE,
    "v_head_dim": _SIZE,
    "max_position_embeddings": _SIZE,
    "first_k_dense_replace": _COUNT,
    "norm_topk_prob": _FLAG,
    "routed_scaling_factor": _FACTOR,
    "rms_norm_eps": _SMALL,
}
"""What a K2 config must name, lest a default of DeepSeek-V3 stand in for it."""

_OTHERS: dict[str, Check] = {
    "attention_bias": _FLAG,
    "attention_dropout": _SHARE,
    "initializer_range": _FACTOR,
    "num_key_value_heads": _OPTIONAL,
    "num_nextn_predict_layers": _PERHAPS,
    "rope_interleave": _FLAG,
    "rope_theta": _BASE,
}
"""What it may name besides."""

_OURS: dict[str, Check] = {"tie_word_embeddings": ("true, false or null", lambda v: v is None or type(v) is bool)}
"""What transformers is not told, for `Assembly` sees to it."""

_ROPE: dict[str, Check] = {
    "type": _ROPE_KIND,
    "rope_type": _ROPE_KIND,
    "rope_theta": _BASE,
    "factor": _FACTOR,
    "original_max_position_embeddings": _SIZE,
    "beta_fast": _FACTOR,
    "beta_slow": _FACTOR,
    "mscale": _SCALE,
    "mscale_all_dim": _SCALE,
    "attention_factor": _FACTOR,
    "truncate": _FLAG,
}
"""What stands in `rope_scaling` or `rope_parameters`."""


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
    if others := other_types(checkpoint.config):
        raise UnsupportedFormat(
            "a relative of K2 that can be converted, but not run here"
            + (_OF_K3 if any(kind in K3_TYPES for kind in others) else ""),
            file=file,
            expected=f"model_type {listed(MODEL_TYPES)}",
            found=repr(others[0]),
            remedy="run it with an engine that knows its architecture",
        )
    keys = _checked(text, file)
    try:
        return DeepseekV3Config.from_dict(keys)
    except Exception as error:  # whatever transformers stumbles over, the file is to blame
        raise MalformedFile("transformers refuses it", file=file, found=said(error)) from error


def _checked(text: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys that the model is built from, each of them as it must be."""
    missing = [key for key in _NEEDED if key not in text]
    if missing:
        raise MalformedFile("lacks what the model depends on", file=file, expected=", ".join(missing))
    for key, wanted in _FIXED.items():
        if text.get(key, wanted) != wanted:
            raise UnsupportedFormat(key, file=file, expected=repr(wanted), found=repr(text[key])[:200])
    _taken(text, _OURS, file)
    keys = _taken(text, _NEEDED | _OTHERS, file)
    keys |= {key: checked_ids(text[key], keys["vocab_size"], key, file) for key in TOKEN_IDS if key in text}
    _check_experts(keys, file)
    heads = keys["num_attention_heads"]
    if keys.get("num_key_value_heads") not in {None, heads}:
        raise UnsupportedFormat("num_key_value_heads", file=file, expected=heads, found=keys["num_key_value_heads"])
    return keys | _rope(text, file)


def _taken(source: Mapping[str, Any], checks: Mapping[str, Check], file: Path) -> dict[str, Any]:
    """Return those keys of an object that are known, checked."""
    for key, (expected, fits) in checks.items():
        if key in source and not fits(source[key]):
            raise MalformedFile(key, file=file, expected=expected, found=repr(source[key])[:200])
    return {key: source[key] for key in checks if key in source}


def _rope(text: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return how positions are turned into angles, as `rope_scaling` or, as newer tools write it, `rope_parameters`."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        block = text.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise MalformedFile(key, file=file, expected="an object", found=repr(block)[:200])
        found[key] = _taken(block, _ROPE, file)
    if not any("rope_theta" in home for home in (text, *found.values())):
        raise MalformedFile("lacks what the model depends on", file=file, expected="rope_theta")
    return found


def _check_experts(keys: Mapping[str, Any], file: Path) -> None:
    """Refuse a router that cannot choose: it takes groups by their two best experts, then experts within them."""
    experts, chosen, groups, taken = (
        keys[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    )
    if groups * 2 > experts or experts % groups or taken > groups:
        raise MalformedFile(
            "n_group and topk_group",
            file=file,
            expected=f"groups of at least two experts that divide {experts}, and as many taken at most",
            found=f"{groups} and {taken}",
        )
    if chosen > experts // groups * taken:
        raise MalformedFile(
            "num_experts_per_tok", file=file, expected=f"at most {experts // groups * taken} experts", found=chosen
        )


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def checked_ids(value: Any, vocabulary: int, key: str, file: Path) -> Any:
    """Return a token's id, or a list of some, or None.

    Raises:
        MalformedFile: it is none of these, or lies beyond the vocabulary.
    """
    several = value if isinstance(value, list) else [value]
    if value is not None and not (several and all(type(one) is int and 0 <= one < vocabulary for one in several)):
        raise MalformedFile(
            key, file=file, expected=f"tokens from 0 to {vocabulary - 1}, or null", found=repr(value)[:200]
        )
    return value
