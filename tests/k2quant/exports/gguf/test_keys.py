"""What GGUF says of a model: every number from config.json, and nothing that llama.cpp would compute otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.exports.gguf.keys import keys, starting
from k2quant.ground.release import INSTRUCT_CONFIG

K2: dict[str, object] = {
    "general.architecture": "deepseek2",
    "general.type": "model",
    "general.name": "K2",
    "general.size_label": "384x14B",
    "general.quantization_version": 2,
    "general.file_type": 2,
    "deepseek2.block_count": 61,
    "deepseek2.context_length": 131072,
    "deepseek2.embedding_length": 7168,
    "deepseek2.feed_forward_length": 18432,
    "deepseek2.vocab_size": 163840,
    "deepseek2.leading_dense_block_count": 1,
    "deepseek2.attention.head_count": 64,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.q_lora_rank": 1536,
    "deepseek2.attention.kv_lora_rank": 512,
    "deepseek2.attention.key_length": 576,
    "deepseek2.attention.value_length": 512,
    "deepseek2.attention.key_length_mla": 192,
    "deepseek2.attention.value_length_mla": 128,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek2.expert_count": 384,
    "deepseek2.expert_used_count": 8,
    "deepseek2.expert_shared_count": 1,
    "deepseek2.expert_feed_forward_length": 2048,
    "deepseek2.expert_gating_func": 2,
    "deepseek2.expert_group_count": 1,
    "deepseek2.expert_group_used_count": 1,
    "deepseek2.expert_weights_scale": 2.827,
    "deepseek2.expert_weights_norm": True,
    "deepseek2.rope.dimension_count": 64,
    "deepseek2.rope.freq_base": 50000.0,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 32.0,
    "deepseek2.rope.scaling.original_context_length": 4096,
    "deepseek2.rope.scaling.yarn_log_multiplier": 0.1,
    "deepseek2.rope.scaling.yarn_beta_fast": 1.0,
    "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
}
"""As llama.cpp's own converter writes them from K2's config."""


def said(config: dict[str, Any]) -> dict[str, object]:
    """Return the values of a model's keys."""
    return {key.name: key.value for key in keys(config, name="K2", file_type=2)}


def changed(**changes: Any) -> dict[str, Any]:
    """Return K2's config with changes; None leaves a key out."""
    return {key: value for key, value in (INSTRUCT_CONFIG | changes).items() if value is not None}


def roped(**changes: Any) -> dict[str, Any]:
    """Return K2's config with changes of how positions turn; None leaves a key out."""
    rope = {key: value for key, value in (INSTRUCT_CONFIG["rope_scaling"] | changes).items() if value is not None}
    return changed(rope_scaling=rope)


def test_k2() -> None:
    """K2-Instruct has all the keys of llama.cpp's own converter, with the same values."""
    assert said(INSTRUCT_CONFIG) == K2


def test_kinds() -> None:
    """Numbers have the kinds that llama.cpp asks for."""
    kinds = {key.name: key.kind for key in keys(INSTRUCT_CONFIG, name="K2", file_type=2)}
    by_value = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    assert kinds == {name: by_value[type(value)] for name, value in K2.items()}


def test_of_k25_the_language_model_speaks() -> None:
    """Of K2.5, `text_config` has the numbers."""
    assert said({"architectures": ["KimiK25ForConditionalGeneration"], "text_config": INSTRUCT_CONFIG}) == K2


def test_deepseek_v3_has_groups() -> None:
    """Of DeepSeek-V3 a token takes experts of four groups out of eight, and YaRN has the usual ramp."""
    config = changed(n_routed_experts=256, n_group=8, topk_group=4, rope_scaling=None)
    config["rope_parameters"] = INSTRUCT_CONFIG["rope_scaling"] | {
        "beta_fast": 32,
        "rope_theta": 10000,
        "rope_type": "yarn",
    }
    found = said(config)
    assert (found["deepseek2.expert_group_count"], found["deepseek2.expert_group_used_count"]) == (8, 4)
    assert found["deepseek2.rope.scaling.yarn_beta_fast"] == 32
    assert found["deepseek2.rope.freq_base"] == 10000


def test_all_groups_are_one() -> None:
    """Where a token may take experts of all groups, llama.cpp is told of one: it stops at as many as there are."""
    found = said(changed(n_group=4, topk_group=4))
    assert (found["deepseek2.expert_group_count"], found["deepseek2.expert_group_used_count"]) == (1, 1)


def test_without_yarn() -> None:
    """Positions that are not scaled have no keys of scaling."""
    for rope in (None, {"rope_type": "default"}):
        assert not [name for name in said(changed(rope_scaling=rope)) if "scaling" in name]


@pytest.mark.parametrize(
    "key",
    [
        *("max_position_embeddings", "rms_norm_eps", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob"),
        *("n_group", "topk_group", "rope_theta", "vocab_size", "kv_lora_rank", "n_shared_experts"),
    ],
)
def test_what_config_lacks_is_named(key: str) -> None:
    """Without a number there are no keys."""
    with pytest.raises(MalformedFile, match=key):
        keys(changed(**{key: None}), name="K2", file_type=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_hidden_layers": 27}, "num_hidden_layers"),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, "num_hidden_layers"),
        ({"n_routed_experts": 2048}, "n_routed_experts"),
        ({"n_routed_experts": 8, "n_group": 8}, "n_group"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(change: dict[str, Any], named: str) -> None:
    """llama.cpp would load such a model, and compute something else."""
    with pytest.raises(UnsupportedFormat, match=named):
        keys(changed(**change), name="K2", file_type=2)


@pytest.mark.parametrize("scales", [{"mscale": 0.7}, {"mscale_all_dim": None}, {"mscale": 0.0, "mscale_all_dim": 0.0}])
def test_one_scale_of_yarn(scales: dict[str, Any]) -> None:
    """llama.cpp knows one number where a config has two: other two are refused."""
    with pytest.raises(UnsupportedFormat, match="mscale"):
        keys(roped(**scales), name="K2", file_type=2)
    lite = {key.name: key.value for key in keys(roped(mscale=0.707, mscale_all_dim=0.707), name="", file_type=2)}
    assert lite["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 2**40},
        {"max_position_embeddings": "many"},
        {"num_experts_per_tok": 385},
        {"norm_topk_prob": 1},
        {"rms_norm_eps": -1.0},
        {"n_group": 5, "topk_group": 2},
        {"topk_group": 3},
        {"rope_scaling": ["yarn"]},
        {"rope_scaling": {"type": "yarn", "mscale": 1, "mscale_all_dim": 1, "factor": "32"}},
        {"rope_scaling": {"type": "yarn", "mscale": 1, "mscale_all_dim": 1, "factor": 32}},
    ],
)
def test_nonsense_is_no_number(change: dict[str, Any]) -> None:
    """A value that is no number of a model is refused, and no other error comes of it."""
    with pytest.raises(CheckpointError):
        keys(changed(**change), name="K2", file_type=2)


def test_what_llama_cpp_must_be_told() -> None:
    """K2's ramp of YaRN is a step, which llama.cpp does not read; where it is the usual one there is nothing to say."""
    assert starting(INSTRUCT_CONFIG) == {"yarn_beta_fast": 1}
    assert starting(roped(beta_slow=0.5)) == {"yarn_beta_fast": 1, "yarn_beta_slow": 0.5}
    assert starting(roped(beta_fast=32)) == {}
    assert starting(changed(rope_scaling=None)) == {}
