"""What GGUF's metadata says of a model: every number from its config.json, by the names of architecture `deepseek2`.

Names, types and meanings are those of llama.cpp (conversion/base.py and conversion/deepseek.py, which write them;
src/models/deepseek2.cpp and src/llama-context.cpp, which read them). What these would compute otherwise than the model
does is refused by name, as is what a config lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from k2quant.checkpoint.files.json_kinds import number, truth, whole
from k2quant.conversion.metadata.promises import language_config
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.exports.gguf.key import Key
from k2quant.exports.shapes import FILE, Sizes, rope_of, sizes_of

ARCHITECTURE = "deepseek2"
_QUANTIZATION_VERSION = 2
"""Of ggml's blocks (`GGML_QNT_VERSION`, ggml.h)."""
_SIGMOID = 2
"""How a router weighs (`ExpertGatingFuncType`, gguf-py)."""
_LITE = {26, 27}
"""Layers of DeepSeek-V2-Lite and its kin: of a model with so many llama.cpp reads no `q_lora_rank` (deepseek2.cpp)."""
_KANANA = 48, 128256
"""Layers and tokens of another one that it knows by both."""
_MOST_EXPERTS = 1024
"""`LLAMA_MAX_EXPERTS` (llama-hparams.h)."""
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Of transformers and of llama.cpp alike (modeling_rope_utils.py; llama-hparams.h)."""
_OF_ROPE = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "mscale",
    "mscale_all_dim",
    *_YARN_DEFAULTS,
}
"""What is understood there."""


def keys(config: Mapping[str, Any], *, name: str, file_type: int) -> tuple[Key, ...]:
    """Return the keys of a model.

    Args:
        config: what config.json holds; of K2.5, `text_config` speaks for the language model.
        name: what it is called.
        file_type: the number of the type that most of its bytes have (`LlamaFileType`, gguf-py).

    Raises:
        MalformedFile: config.json lacks a number, or has one that is none.
        UnsupportedFormat: it says what `deepseek2` would compute otherwise.
    """
    sizes, text = sizes_of(config), language_config(config)
    _check(sizes)
    try:
        return (*_general(sizes, name, file_type), *_sizes(text, sizes), *_experts(text, sizes), *_rope(text, sizes))
    except KeyError as error:
        raise MalformedFile(f"{error.args[0]} is not there, and llama.cpp needs it", file=FILE) from error
    except (TypeError, ValueError) as error:
        raise MalformedFile("holds no numbers of a model", file=FILE, found=str(error)[:300]) from error


def starting(config: Mapping[str, Any]) -> dict[str, float]:
    """Return what llama.cpp has to be told when it starts, for it does not take it from the file.

    It reads the ends of YaRN's ramp for other architectures alone (`LLM_KV_ROPE_SCALING_YARN_BETA_FAST` in its
    src/models/), and takes 32 and 1 for this one. Of K2 both are 1.

    Args:
        config: one that `keys` takes.
    """
    rope = _rope(language_config(config), sizes_of(config))
    found: dict[str, Any] = {key.name.rpartition("yarn_")[2]: key.value for key in rope}
    return {f"yarn_{key}": found[key] for key, usual in _YARN_DEFAULTS.items() if found.get(key, usual) != usual}


def _check(sizes: Sizes) -> None:
    """Refuse what `deepseek2` would compute otherwise."""
    if sizes.num_hidden_layers in _LITE or (sizes.num_hidden_layers, sizes.vocab_size) == _KANANA:
        expected = "another number, for at this one llama.cpp takes a model for a DeepSeek-V2-Lite"
        raise _unsupported("num_hidden_layers", expected, sizes.num_hidden_layers)
    if sizes.n_routed_experts > _MOST_EXPERTS:
        raise _unsupported("n_routed_experts", f"at most {_MOST_EXPERTS}", sizes.n_routed_experts)


def _general(sizes: Sizes, name: str, file_type: int) -> Iterator[Key]:
    yield Key("general.architecture", ARCHITECTURE, "string")
    yield Key("general.type", "model", "string")
    yield Key("general.name", name, "string")
    yield Key("general.size_label", size_label(sizes), "string")
    yield Key("general.quantization_version", _QUANTIZATION_VERSION, "uint32")
    yield Key("general.file_type", file_type, "uint32")


def size_label(sizes: Sizes) -> str:
    """Return how large a model is, as `384x14B`: its experts, and the weights of one of each layer with all others.

    See gguf-py, utility.py, `size_label`.
    """
    rest = sum(prod(shape) for shape in sizes.outside().values())
    expert = 0
    for layer in range(sizes.num_hidden_layers):
        for part, shape in sizes.shapes(layer).items():
            if part.startswith("mlp.experts."):
                expert += prod(shape)
            else:
                rest += prod(shape)
    return f"{sizes.n_routed_experts}x{_rounded(rest + expert)}"


def _rounded(weights: int) -> str:
    """Return a number of weights with two digits or more."""
    scale, letter = next((pair for pair in _SCALES if weights > pair[0]), _SCALES[-1])
    scaled = weights / scale
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{letter}"


def _sizes(text: Mapping[str, Any], sizes: Sizes) -> Iterator[Key]:
    """Yield what there is of what. Attention is over one latent head, which all heads of the queries share (MLA)."""
    rank, rope = sizes.kv_lora_rank, sizes.qk_rope_head_dim
    numbers = {
        "block_count": sizes.num_hidden_layers,
        "context_length": whole(text["max_position_embeddings"], 1, 2**32),
        "embedding_length": sizes.hidden_size,
        "feed_forward_length": sizes.intermediate_size,
        "vocab_size": sizes.vocab_size,
        "leading_dense_block_count": sizes.first_k_dense_replace,
        "attention.head_count": sizes.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": sizes.q_lora_rank,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": sizes.qk_nope_head_dim + rope,
        "attention.value_length_mla": sizes.v_head_dim,
    }
    for key, value in numbers.items():
        yield _key(key, value, "uint32")
    yield _key("attention.layer_norm_rms_epsilon", number(text["rms_norm_eps"], 1e-30, 1.0), "float32")


def _experts(text: Mapping[str, Any], sizes: Sizes) -> Iterator[Key]:
    numbers = {
        "expert_count": sizes.n_routed_experts,
        "expert_used_count": whole(text["num_experts_per_tok"], 1, sizes.n_routed_experts + 1),
        "expert_shared_count": sizes.n_shared_experts,
        "expert_feed_forward_length": sizes.moe_intermediate_size,
        "expert_gating_func": _SIGMOID,
        **_groups(text, sizes.n_routed_experts),
    }
    for key, value in numbers.items():
        yield _key(key, value, "uint32")
    yield _key("expert_weights_scale", number(text["routed_scaling_factor"], 1e-30, 1e30), "float32")
    yield _key("expert_weights_norm", truth(text["norm_topk_prob"]), "bool")


def _groups(text: Mapping[str, Any], experts: int) -> dict[str, int]:
    """Return how many groups experts lie in, and of how many a token may take some; all of all groups are one group."""
    groups, used = whole(text["n_group"], 1), whole(text["topk_group"], 1)
    if used > groups or experts % groups:
        raise ValueError(f"{experts} experts in n_group {groups}, of which topk_group {used} are taken")
    if used == groups:
        groups = used = 1
    elif groups == experts:
        raise _unsupported("n_group", "fewer groups than experts", groups)
    return {"expert_group_count": groups, "expert_group_used_count": used}


def _rope(text: Mapping[str, Any], sizes: Sizes) -> Iterator[Key]:
    """Yield how positions turn queries and keys."""
    said = rope_of(text)
    yield _key("rope.dimension_count", sizes.qk_rope_head_dim, "uint32")
    yield _key("rope.freq_base", number(said["rope_theta"], 1e-30, 1e30), "float32")
    if others := sorted(said.keys() - _OF_ROPE):
        raise _unsupported(f"{others[0]} of the rotary embedding", "a key that llama.cpp has, too", said[others[0]])
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "yarn":
        yield from _yarn(said)
    elif kind != "default":
        raise _unsupported("the rotary embedding's type", "yarn or default", kind)


def _yarn(said: Mapping[str, Any]) -> Iterator[Key]:
    """Yield YaRN's numbers.

    llama.cpp takes `mscale` to be what `mscale_all_dim` is (llama-context.cpp), and reads a tenth of it
    (`TAG_DEEPSEEK2_YARN_LOG_MUL_FIX`, conversion/deepseek.py).
    """
    scale, everywhere = (
        number(said.get(key, default), 0.0, 1e3) for key, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    )
    if scale != everywhere or not everywhere:
        expected = f"what mscale_all_dim is, {everywhere:g}, and not 0: llama.cpp knows one number for both"
        raise _unsupported("mscale of the rotary embedding", expected, scale)
    yield _key("rope.scaling.type", "yarn", "string")
    yield _key("rope.scaling.factor", number(said["factor"], 1.0, 1e6), "float32")
    original = whole(said["original_max_position_embeddings"], 1, 2**32)
    yield _key("rope.scaling.original_context_length", original, "uint32")
    yield _key("rope.scaling.yarn_log_multiplier", 0.1 * everywhere, "float32")
    for key, usual in _YARN_DEFAULTS.items():
        yield _key(f"rope.scaling.yarn_{key}", number(said.get(key, usual), 0.0, 1e6), "float32")


def _key(name: str, value: object, kind: str) -> Key:
    return Key(f"{ARCHITECTURE}.{name}", value, kind)


def _unsupported(what: str, expected: object, found: object) -> UnsupportedFormat:
    message = f"{what}, which llama.cpp's {ARCHITECTURE} would compute otherwise"
    return UnsupportedFormat(message, file=FILE, expected=expected, found=repr(found)[:100])
