"""The numbers of a config that decide which tensors a K2 has, and of which shape each must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from k2quant.conversion.metadata.promises import language_config, tied
from k2quant.errors import MalformedFile, UnsupportedFormat

FILE = "config.json"

KV_B = "self_attn.kv_b_proj"
ROUTER = "mlp.gate"
BIAS = "mlp.gate.e_score_correction_bias"
"""Weights that engines have otherwise than the checkpoint, by their names within a layer."""

_FIXED = {
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
    "attention_bias": False,
}
"""What engines compute whatever a config says. transformers' config of these models has not all of the keys."""


class Sizes(NamedTuple):
    """The numbers of a config that decide which tensors there are, and their shapes."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    first_k_dense_replace: int
    tied: bool
    """Whether the embedding is the head, too."""

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return what a layer must have, by name within it; of experts the shape of one."""
        hidden, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_a_proj": (self.q_lora_rank, hidden),
            "self_attn.q_a_layernorm": (self.q_lora_rank,),
            "self_attn.q_b_proj": (heads * (self.qk_nope_head_dim + self.qk_rope_head_dim), self.q_lora_rank),
            "self_attn.kv_a_proj_with_mqa": (rank + self.qk_rope_head_dim, hidden),
            "self_attn.kv_a_layernorm": (rank,),
            KV_B: (heads * (self.qk_nope_head_dim + self.v_head_dim), rank),
            "self_attn.o_proj": (hidden, heads * self.v_head_dim),
            "post_attention_layernorm": (hidden,),
        }
        if layer < self.first_k_dense_replace:
            return shapes | _mlp("mlp", hidden, self.intermediate_size)
        return {
            **shapes,
            ROUTER: (self.n_routed_experts, hidden),
            BIAS: (self.n_routed_experts,),
            **_mlp("mlp.experts", hidden, self.moe_intermediate_size),
            **_mlp("mlp.shared_experts", hidden, self.moe_intermediate_size * self.n_shared_experts),
        }

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Return what must stand outside of the layers."""
        ends: dict[str, tuple[int, ...]] = {
            "model.embed_tokens": (self.vocab_size, self.hidden_size),
            "model.norm": (self.hidden_size,),
        }
        return ends if self.tied else {**ends, "lm_head": (self.vocab_size, self.hidden_size)}


def _mlp(where: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{where}.{part}_proj": (inner, hidden) for part in ("gate", "up")}
    return {**wide, f"{where}.down_proj": (hidden, inner)}


def sizes_of(config: Mapping[str, Any] | None) -> Sizes:
    """Read the sizes of a model.

    Raises:
        MalformedFile: config.json is not there, or lacks one.
        UnsupportedFormat: it says what no K2 has, and engines run otherwise.
    """
    if config is None:
        raise MalformedFile("is not there, and an export has the model's sizes from it", file=FILE)
    text = language_config(config)
    found = {field: text.get(field) for field in Sizes._fields if field != "tied"}
    for field, value in found.items():
        least = 0 if field == "first_k_dense_replace" else 1
        if field == "q_lora_rank" and value is None:
            raise UnsupportedFormat(
                "q_lora_rank is not there: queries without compression are those of small models of DeepSeek, which "
                "engines run otherwise",
                file=FILE,
            )
        if type(value) is not int or not least <= value < 2**31:
            raise MalformedFile(field, file=FILE, expected=f"a whole number, at least {least}", found=repr(value)[:100])
    for key, value in _FIXED.items():
        if text.get(key, value) != value:
            said = repr(text[key])[:100]
            raise UnsupportedFormat(f"{key}, which engines compute otherwise", file=FILE, expected=value, found=said)
    return Sizes(tied=tied(config), **found)  # type: ignore[arg-type]  # whole numbers, checked above


def rope_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a language model's config says of its rotary embedding, `rope_theta` among it.

    transformers 5 has all of it in `rope_parameters`; others have two keys, or `rope_theta` inside `rope_scaling`.

    Raises:
        MalformedFile: it is no object, or says nothing of `rope_theta`.
    """
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise MalformedFile("rope_scaling", file=FILE, expected="an object", found=repr(found)[:100])
    said = {key: value for key, value in found.items() if value is not None}
    theta = said.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise MalformedFile("rope_theta is not there, and engines need it", file=FILE)
    return {**said, "rope_theta": theta}


def missing(there: Mapping[tuple[int | None, str], set[int | None]], sizes: Sizes) -> Iterator[str]:
    """Yield what a checkpoint lacks, as K2 calls it.

    Args:
        there: the experts of each weight, `None` for what has none, by layer and name within it.
        sizes: of the model.
    """
    yield from (f"{part}.weight" for part in sizes.outside() if (None, part) not in there)
    for layer in range(sizes.num_hidden_layers):
        for part in sizes.shapes(layer):
            found = there.get((layer, part), set())
            before, after = f"model.layers.{layer}.", "" if part == BIAS else ".weight"
            if not part.startswith("mlp.experts."):
                yield from () if found else (f"{before}{part}{after}",)
            elif len(found) < sizes.n_routed_experts:
                number = next(number for number in range(sizes.n_routed_experts) if number not in found)
                yield f"{before}{part.replace('experts.', f'experts.{number}.')}{after}"
