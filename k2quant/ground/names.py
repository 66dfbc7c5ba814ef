"""What a tensor's name means in a Kimi K2, Kimi K3 or DeepSeek-V3 checkpoint.

K3's feed-forward layers are `block_sparse_moe` with experts of `w1` (gate), `w3` (up) and `w2` (down), as Mixtral's
are; what it shares with K2 has K2's names.

Nothing here counts layers or experts: a name is read on its own. `base` is a name without its last part, such as
`model.layers.3.mlp.experts.17.up_proj`; the last part (`weight`, `weight_packed`, ...) is the suffix.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TENSOR_CLASSES = (
    "routed experts",
    "shared experts",
    "dense mlp",
    "attention",
    "router",
    "norm",
    "embedding",
    "head",
    "mtp",
    "vision",
    "projector",
    "other",
)
"""The classes that tables and pictures group by, in the order in which they show them."""

# Every spelling that a release or a tool has: K2's, K2.5's, transformers' own, and K2.5's without `model.`.
_PREFIX = r"(?:(?:language_model\.)?model\.(?:language_model\.)?|language_model\.)"
_NUMBER = r"0|[1-9][0-9]{0,5}"
_LAYER = rf"(?P<prefix>{_PREFIX})layers\.(?P<layer>{_NUMBER})\."

# The projections that Moonshot ships as block FP8: attention, dense layer, shared and routed experts. `q_proj` stands
# in for q_a and q_b where a model has no query compression. The router `mlp.gate` and `eh_proj` are none.
_PROJECTION = re.compile(
    _LAYER + r"(?:self_attn\.(?:q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    rf"|mlp\.(?:shared_experts\.|experts\.(?P<expert>{_NUMBER})\.)?(?:gate|up|down)_proj"
    rf"|block_sparse_moe\.(?:shared_experts\.(?:gate|up|down)_proj|experts\.(?P<numbered>{_NUMBER})\.w[123]))"
)

_OF_K3 = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# What K3 keeps in float32 although it is called a weight, as its A_log and dt_bias are that are called none.
_FLOAT32 = re.compile(_LAYER + r"self_attn\.(?:[qkv]_conv1d|o_norm)")

# What a layer for multi-token prediction has besides the tensors of a decoder layer.
_PREDICTOR = re.compile(_LAYER + r"(?:eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")

_FUSED = re.compile(_LAYER + r"mlp\.experts\.(?P<projection>gate_up_proj|down_proj)")

_ANY_LAYER = re.compile(r"(?:^|\.)layers\.[0-9]+\.")

_LANGUAGE = re.compile(rf"{_PREFIX}(?P<rest>.+)")
_HEAD = re.compile(r"(?:language_model\.)?(?P<rest>lm_head\..+)")

_CLASS_PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("vision", r"(^|\.)(vision_tower|visual|vision_model)\."),
        ("projector", r"(^|\.)(mm_projector|multi_modal_projector)\."),
        ("routed experts", r"\.(mlp|block_sparse_moe)\.experts\."),
        ("shared experts", r"\.(mlp|block_sparse_moe)\.shared_experts?\."),
        ("router", r"\.(mlp|block_sparse_moe)\.gate\."),
        ("norm", r"(norm|\.enorm|\.hnorm)\d*\.(weight|bias)$"),
        ("dense mlp", r"\.mlp\."),
        ("attention", r"\.self_attn\."),
        ("embedding", r"(^|\.)embed_tokens\."),
        ("head", r"(^|\.)(lm_head|shared_head\.head)\."),
        ("mtp", r"\.eh_proj\."),
    )
)


class FusedExperts(NamedTuple):
    """Where the experts of a fused tensor belong."""

    prefix: str
    """Everything before the expert's number, such as `model.layers.3.mlp.experts.`"""
    projections: tuple[str, ...]
    """The projections that lie one after another along the rows of each expert."""


def split(name: str) -> tuple[str, str]:
    """Return base and suffix: `a.b.weight` gives (`a.b`, `weight`)."""
    base, _, suffix = name.rpartition(".")
    return base, suffix


def is_projection(base: str) -> bool:
    """Tell whether a base is one of the matrices that Moonshot quantises in some release."""
    return _PROJECTION.fullmatch(base) is not None


def is_routed_expert(base: str) -> bool:
    """Tell whether a base is a projection of a routed expert."""
    return expert(base) is not None


def is_float32(base: str) -> bool:
    """Tell whether a base is one that Moonshot ships in float32 in a release of BF16: KDA's convolutions and norm."""
    return _FLOAT32.fullmatch(base) is not None


def is_unknown_matrix(base: str) -> bool:
    """Tell whether a matrix of a decoder layer, however the layer is spelled, is none that K2 or DeepSeek-V3 has.

    Such as the indexer's of DeepSeek-V3.2: no scope takes it.
    """
    if _ANY_LAYER.search(base) is None or is_projection(base):
        return False
    return tensor_class(f"{base}.weight") in {"routed experts", "shared experts", "dense mlp", "attention", "other"}


def place(base: str) -> tuple[int, str] | None:
    """Return layer and name within it, such as (3, `self_attn.o_proj`), or None for what lies outside the layers."""
    match = re.match(_LAYER, base)
    return (int(match["layer"]), base[match.end() :]) if match else None


def spelling(name: str) -> str | None:
    """Return what stands before `layers.` in the name of a decoder layer's tensor, such as `language_model.model.`."""
    match = re.match(_LAYER, name)
    return match["prefix"] if match else None


def layer(name: str) -> int | None:
    """Return the decoder layer that a tensor belongs to, or None for one outside the layers."""
    match = re.match(_LAYER, name)
    return int(match["layer"]) if match else None


def expert(base: str) -> int | None:
    """Return the number of the routed expert that a base belongs to, or None."""
    match = _PROJECTION.fullmatch(base)
    number = match and (match["expert"] or match["numbered"])
    return int(number) if number else None


def is_of_k3(base: str) -> bool:
    """Tell whether a base is a projection of a routed expert by K3's names."""
    match = _PROJECTION.fullmatch(base)
    return match is not None and match["numbered"] is not None


def projection(base: str) -> str:
    """Return the last part of a base as K2 calls it: K3's `w1`, `w3` and `w2` are gate, up and down."""
    last = split(base)[1]
    return _OF_K3[last] if is_of_k3(base) else last


def place_of_expert(number: int, projection: str, *, of_k3: bool) -> str:
    """Return the place within a layer of a routed expert's projection, such as `mlp.experts.7.up_proj`.

    Args:
        number: the expert's.
        projection: as K2 calls it.
        of_k3: whether to spell it as K3 does: `block_sparse_moe.experts.7.w3`.
    """
    if not of_k3:
        return f"mlp.experts.{number}.{projection}"
    return f"block_sparse_moe.experts.{number}.{next(last for last, called in _OF_K3.items() if called == projection)}"


def predicts(name: str) -> bool:
    """Tell whether a tensor is one that only a layer has which predicts further tokens (DeepSeek-V3's MTP)."""
    return _PREDICTOR.match(name) is not None


def tensor_class(name: str) -> str:
    """Return the class of a tensor, one of `TENSOR_CLASSES`."""
    return next((kind for kind, pattern in _CLASS_PATTERNS if pattern.search(name)), "other")


def fused_experts(name: str) -> FusedExperts | None:
    """Read the name of an experts tensor that holds all experts of a layer, as transformers 5 keeps them.

    `gate_up_proj` is `[E, 2I, H]` with the gate's rows first; `down_proj` is `[E, H, I]`.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return None
    projections = ("gate_proj", "up_proj") if match["projection"] == "gate_up_proj" else ("down_proj",)
    return FusedExperts(name[: match.start("projection")], projections)


def unprefixed(name: str) -> str:
    """Return what all spellings of a name share, such as `layers.3.mlp.gate.weight` or `embed_tokens.weight`."""
    return name.removeprefix("language_model.").removeprefix("model.").removeprefix("language_model.")


def in_language_model(name: str) -> str | None:
    """Return a tensor's name as a language model that stands alone has it, such as `model.layers.3.mlp.gate.weight`.

    K2.5 and later put `language_model.` in front, some tools in place of `model.`. None: the tensor belongs to the
    vision tower or the projector.
    """
    if tensor_class(name) in {"vision", "projector"}:
        return None
    if head := _HEAD.fullmatch(name):
        return head["rest"]
    match = _LANGUAGE.fullmatch(name)
    return f"model.{match['rest']}" if match else name
