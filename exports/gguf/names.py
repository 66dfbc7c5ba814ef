"""What GGUF calls the tensors of a K2, which of them must be there, and of which shape.

The names are those of llama.cpp's architecture `deepseek2` (gguf-py, constants.py and tensor_mapping.py; conversion/
deepseek.py; src/models/deepseek2.cpp). K2.5's `language_model.` falls away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from k2quant.conversion.metadata.promises import language_config, tied
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.ground import names

FILE = "config.json"


class Place(NamedTuple):
    """Where a weight goes."""

    tensor: str
    """The tensor's name without its last part, such as `blk.3.ffn_gate_exps`."""
    suffix: str
    """Its last part: `weight` or `bias`."""
    layer: int | None
    expert: int | None
    """Which part of a stack it is; None: it is all of the tensor."""
    part: str
    """The weight's name within its layer, such as `mlp.experts.gate_proj`, or outside of the layers."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return f"{self.tensor}.{self.suffix}"


_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_DENSE = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_SPARSE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b",
    **{f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
_INSIDE = _ATTENTION | _DENSE | _SPARSE

KV_B = "self_attn.kv_b_proj"
HALVES = ("attn_k_b", "attn_v_b")
"""What becomes of it."""
BIAS = "mlp.gate.e_score_correction_bias"
ROUTER = "mlp.gate"

SCALED = frozenset({"attn_output"})
"""Tensors that llama.cpp's graph of deepseek2 multiplies by the scale of the whole beside them, which NVFP4 has.

It loads such scales of experts and of other matrices, too, and then computes without (src/models/deepseek2.cpp gives
`build_moe_ffn` and `build_ffn` none, as llama-cpp-python 0.3.36 has it): a model of nano's size answered NaN.
"""

_FREQUENCIES = "rotary_emb.inv_freq"
"""Made from config.json; llama.cpp's converter leaves it out, too."""


def place_of(base: str, suffix: str, *, weight: bool) -> Place | None:
    """Return where a weight of the language model goes; None for a name that `deepseek2` does not have.

    Args:
        base: its name without the suffix, as `names.in_language_model` has it.
        suffix: of its main tensor.
        weight: whether it is one; other tensors are known by their whole name.
    """
    full = base if weight else f"{base}.{suffix}"
    last = "bias" if not weight else "weight"
    if full in _OUTSIDE:
        return Place(_OUTSIDE[full], last, None, None, full)
    found = names.place(full)
    if found is None:
        return None
    layer, part = found
    expert = names.expert(full)
    if expert is not None:
        part = f"mlp.experts.{names.projection(full)}"
    inside = _INSIDE.get(part)
    if inside is None or weight == (part == BIAS) or names.is_of_k3(full):
        return None
    return Place(f"blk.{layer}.{inside}", last, layer, expert, part)


def is_made_anew(name: str) -> bool:
    """Tell whether a tensor is one that engines make themselves."""
    return name.endswith(_FREQUENCIES)


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
        UnsupportedFormat: it says what `deepseek2` has no place for.
    """
    if config is None:
        raise MalformedFile("is not there, and GGUF has the model's sizes from it", file=FILE)
    text = language_config(config)
    found = {field: text.get(field) for field in Sizes._fields if field != "tied"}
    for field, value in found.items():
        least = 0 if field == "first_k_dense_replace" else 1
        if field == "q_lora_rank" and value is None:
            raise UnsupportedFormat(
                "q_lora_rank is not there: llama.cpp's deepseek2 takes queries without compression from small models "
                "of DeepSeek alone",
                file=FILE,
            )
        if type(value) is not int or not least <= value < 2**31:
            raise MalformedFile(field, file=FILE, expected=f"a whole number, at least {least}", found=repr(value)[:100])
    if text.get("moe_layer_freq", 1) != 1:
        value = repr(text["moe_layer_freq"])[:100]
        raise UnsupportedFormat("moe_layer_freq, which deepseek2 lacks", file=FILE, expected=1, found=value)
    return Sizes(tied=tied(config), **found)  # type: ignore[arg-type]  # whole numbers, checked above


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
