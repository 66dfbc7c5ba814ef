"""What engines make of a config's lists of modules, which each of them reads by rules of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from k2quant.checking.engines import check_engine
from rewritten import Hollow

MOONSHOT = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
"""The list of moonshotai/Kimi-K2-Thinking (config.json)."""

NAMED = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_a_proj", "kv_a_proj_with_mqa")),
    *(f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_b_proj", "kv_b_proj", "o_proj")),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"model.layers.{layer}.mlp.shared_experts.{name}_proj" for layer in (1, 2) for name in ("gate", "up", "down")),
]
"""Every module by its full name in the checkpoint, as llm-compressor lists them."""

NVIDIA = ["lm_head", "*self_attn*", "*.mlp.gate", "*.shared_experts*", "model.layers.0.mlp*"]


def ignored(found: Hollow, names: list[str], key: str = "ignore") -> None:
    """Put a list into the block."""
    found.block[key] = names


@pytest.mark.parametrize(
    ("of", "names", "engine", "says"),
    [
        ("int4", MOONSHOT, "vllm", None),
        ("int4", MOONSHOT, "sglang", None),
        ("int4", NAMED, "vllm", None),
        ("int4", NAMED, "sglang", "takes `model.layers.0.mlp.gate_up_proj` for quantised"),
        ("int4", [*NAMED, "mlp.gate_up_proj", "shared_experts.gate_up_proj"], "sglang", None),
        ("int4", [*NAMED, "mlp.gate_up_proj", "shared_experts.gate_up_proj"], "vllm", None),
        ("int4", NAMED[1:], "vllm", "has `model.layers.0.self_attn.kv_a_proj_with_mqa` and not the rest"),
        ("int4", NAMED[1:], "sglang", "has `model.layers.0.self_attn.kv_a_proj_with_mqa` and not the rest"),
        (
            "int4",
            [*MOONSHOT, r"re:.*experts\.0\.up.*"],
            "vllm",
            "two things of the matrices of `model.layers.1.mlp.exp",
        ),
        (
            "int4",
            [*MOONSHOT, r"re:.*experts\.0\.up.*"],
            "sglang",
            "two things of the matrices of `model.layers.1.mlp.e",
        ),
        ("int4", [*MOONSHOT, r"re:.*experts\..*"], "vllm", "takes `model.layers.1.mlp.experts` for unquantised"),
        ("int4", [*MOONSHOT, "re:(a*)*b"], "vllm", "an expression that is not tried"),
        ("int4", [*MOONSHOT, "re:("], "sglang", "an expression that is not tried"),
        ("int4", [*MOONSHOT, 7], "vllm", "ignore is no list of names"),
        ("k25", MOONSHOT, "vllm", None),
        ("k25", MOONSHOT, "sglang", None),
        ("k25", MOONSHOT, "ktransformers", None),
        ("nvfp4", NVIDIA, "vllm", None),
        ("nvfp4", NVIDIA, "sglang", None),
        ("nvfp4", NVIDIA, "tensorrt-llm", None),
        ("nvfp4", NVIDIA[1:], "vllm", "takes `lm_head` for quantised"),
        ("nvfp4", NVIDIA[1:], "sglang", "takes `lm_head` for quantised"),
        ("nvfp4", [*NVIDIA, "mlp.experts"], "vllm", "takes `model.layers.1.mlp.experts` for unquantised"),
        ("nvfp4", [*NVIDIA, "mlp.experts"], "sglang", None),
        (
            "nvfp4",
            [*NVIDIA[:1], *NVIDIA[2:]],
            "tensorrt-llm",
            "takes `model.layers.0.self_attn.kv_a_proj_with_mqa` for",
        ),
        (
            "nvfp4",
            [*NVIDIA[:1], *NVIDIA[2:], "q_a_proj"],
            "sglang",
            "`model.layers.0.self_attn.q_a_proj` and not the rest",
        ),
    ],
)
def test_each_engine_reads_the_list_in_its_way(
    of: str, names: list[str], engine: str, says: str | None, made: Callable[[str], Hollow], tmp_path: Path
) -> None:
    """By engine: whole names or ends of them, what fused modules hold, the first expert, patterns with `*`."""
    found = made(of)
    ignored(found, names)
    assert result(found, engine, tmp_path / "out") == ("pass" if says is None else "fail"), says
    if says is not None:
        assert says in text(found, engine, tmp_path / "again")


@pytest.mark.parametrize(
    ("engine", "names", "says"),
    [
        ("vllm", ["model.layers.0.self_attn.q_b_proj"], "takes `model.layers.0.self_attn.q_b_proj` for unquantised"),
        ("vllm", ["self_attn.q_b_proj"], None),
        ("sglang", ["self_attn.q_b_proj"], "takes `model.layers.0.self_attn.q_b_proj` for unquantised"),
        ("sglang", ["layers.0"], "takes `model.layers.0.self_attn.fused_qkv_a_proj_with_mqa` for unquantised"),
        ("vllm", ["model.layers.1.mlp.experts"], "takes `model.layers.1.mlp.experts` for unquantised"),
        ("vllm", ["model.layers.0.mlp.up_proj"], "has `model.layers.0.mlp.up_proj` and not the rest"),
    ],
)
def test_blocks_of_fp8_have_lists_too(
    engine: str, names: list[str], says: str | None, made: Callable[[str], Hollow], tmp_path: Path
) -> None:
    """By vLLM whole names count, by SGLang paths within a name; what is quantised and listed is read as it is not."""
    found = made("fp8")
    ignored(found, names, "modules_to_not_convert")
    assert result(found, engine, tmp_path / "out") == ("pass" if says is None else "fail")
    if says is not None:
        assert says in text(found, engine, tmp_path / "again")


def test_sglang_stops_where_no_group_speaks_of_a_module(made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """What is neither ignored nor a target is unquantised for vLLM; SGLang finds no target and ends."""
    found = made("int4")
    found.group["targets"] = ["re:.*experts.*_proj"]
    ignored(found, ["lm_head", "re:.*shared_experts.*"])
    assert result(found, "vllm", tmp_path / "vllm") == "pass"
    assert "neither left as it is nor a target" in text(found, "sglang", tmp_path / "sglang")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("listed", ["language_model.layers.0.mlp.", "language_model.model.layers.0.mlp."])
def test_an_older_spelling_of_names_is_the_same_modules(
    engine: str, listed: str, made: Callable[[str], Hollow], tmp_path: Path
) -> None:
    """K2.5's tensors and lists may have `language_model.layers`: whichever has it, they mean the same."""
    found = made("k25")
    found.rename("language_model.model.layers.", "language_model.layers.")
    parts = [f"{listed}{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")]
    ignored(found, ["re:.*lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", *parts])
    assert result(found, engine, tmp_path / "out") == "pass"
    ignored(found, ["re:.*lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"])
    assert "takes `language_model.model.layers.0.mlp" in text(found, engine, tmp_path / "again")


def test_another_packing_than_the_config_says_is_named(made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """A config that belongs to other tensors is found at the first module that disagrees."""
    found = made("int4")
    found.block["format"] = "mxfp4-pack-quantized"
    assert "another packing" in text(found, "vllm", tmp_path / "out")


@pytest.mark.parametrize("groups", [None, {}, {"group_0": 3}, {"group_0": {"targets": 3}}])
def test_groups_that_are_none_fail_and_end_nothing(
    groups: object, made: Callable[[str], Hollow], tmp_path: Path
) -> None:
    """A hostile config ends in a failure of the rule, with what is wrong, and in no error."""
    found = made("int4")
    found.block["config_groups"] = groups
    assert result(found, "vllm", tmp_path / "out") == "fail"


def result(found: Hollow, engine: str, folder: Path) -> str:
    """Return what the rule of lists comes to."""
    return next(each.result for each in check_engine(found.write(folder), engine).findings if each.rule == "lists")


def text(found: Hollow, engine: str, folder: Path) -> str:
    """Return what is said of it."""
    return next(each.text for each in check_engine(found.write(folder), engine).findings if each.rule == "lists")
