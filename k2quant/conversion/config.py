"""`quantization_config`: what a source's config claims, and what the output's config must say.

config.json is edited as JSON: unknown keys and the order of keys are kept. Engines look for the block at the top level,
in `text_config` (K2.5 and later) and under the older name `compression_config`; the output has it in one place only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from k2quant.checkpoint.weights import Weight
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.formats.layouts import Format, Fp8, Int4
from k2quant.ground import names

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where engines look for the quantization block: at the top level, in `text_config`, and under an older name."""

MODEL_TYPES = ("kimi_k2", "kimi_k25", "deepseek_v3")
"""The values of `model_type` whose tensor names k2quant knows."""

# The ignore list of Kimi-K2.6, then what tools that take every 2-D weight for a Linear need on top.
_K26_IGNORE = (
    r"re:.*self_attn.*",
    r"re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*lm_head.*",
    r"re:vision_tower.*",
    r"re:mm_projector.*",
    r"re:.*mlp\.gate$",
    r"re:.*eh_proj$",
    r"re:.*shared_head\.head$",
)


def _homes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a config in which engines look for the block."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def quantization_blocks(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every quantization block of a config.

    Raises:
        MalformedFile: one is not an object.
    """
    blocks = [home[key] for home in _homes(config) for key in QUANTIZATION_KEYS if home.get(key) is not None]
    if any(not isinstance(block, dict) for block in blocks):
        raise MalformedFile("quantization_config is not an object", file="config.json")
    return blocks


def check_source(config: dict[str, Any] | None, weights: Iterable[Weight]) -> None:
    """Refuse a config that belongs to another model, or that contradicts the tensors.

    Raises:
        UnsupportedFormat: another model type, or a quantization that k2quant does not read.
        CheckpointError: the config claims a format, block or group size that the tensors do not have.
    """
    if config is None:
        return
    for home in _homes(config):
        model_type = home.get("model_type")
        if model_type is not None and model_type not in MODEL_TYPES:
            raise UnsupportedFormat(
                "not a model of this family", file="config.json", expected=_listed(MODEL_TYPES), found=repr(model_type)
            )
    weights = list(weights)
    packed = {(weight.format.group, weight.shape[-1]) for weight in weights if isinstance(weight.format, Int4)}
    for block in quantization_blocks(config):
        method = block.get("quant_method")
        if method == "fp8":
            _check_fp8(block, {weight.format.block for weight in weights if isinstance(weight.format, Fp8)})
        elif method == "compressed-tensors":
            _check_int4(block, packed)
        else:
            raise UnsupportedFormat(
                "quant_method", file="config.json", expected="fp8 or compressed-tensors", found=repr(method)
            )


def check_output(config: dict[str, Any] | None, weights: Iterable[Weight]) -> None:
    """Refuse a config with which an engine would load these weights wrongly, or not at all.

    Raises:
        CheckpointError: it contradicts the tensors, or there is none although weights are quantised.
    """
    weights = list(weights)
    check_source(config, weights)
    quantised = {weight.format.name for weight in weights if weight.format} - {"bf16"}
    if quantised and not quantization_blocks(config or {}):
        raise CheckpointError(
            "no quantization_config", file="config.json", expected=f"one for {_listed(sorted(quantised))} weights"
        )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _contradiction(claim: str, found: str) -> CheckpointError:
    return CheckpointError(
        "quantization_config contradicts the tensors",
        file="config.json",
        expected=claim,
        found=found,
        remedy="take the config that belongs to these files",
    )


def _check_fp8(block: dict[str, Any], blocks: set[tuple[int, int]]) -> None:
    size = block.get("weight_block_size")
    if block.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedFormat("fmt", file="config.json", expected="e4m3", found=repr(block["fmt"]))
    if not blocks:
        raise _contradiction("block-FP8 weights with weight_scale_inv, as quant_method fp8 says", "none")
    found = sorted(blocks)
    if found != ([tuple(size)] if isinstance(size, list) else None):
        raise _contradiction(f"weight_block_size {size}", f"scales for blocks of {_listed(found)}")


_Packed = set[tuple[int, int]]
"""Group size and width of the INT4 weights of a checkpoint."""


def _check_int4(block: dict[str, Any], packed: _Packed) -> None:
    groups = block.get("config_groups")
    if block.get("format", "pack-quantized") != "pack-quantized":
        raise UnsupportedFormat(
            "compressed-tensors format",
            file="config.json",
            expected="pack-quantized (INT4)",
            found=repr(block["format"]),
        )
    if not isinstance(groups, dict) or not groups:
        raise MalformedFile("quantization_config has no config_groups", file="config.json")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise MalformedFile("a config group has no weights", file="config.json")
        _check_scheme(weights, packed)
    if not packed:
        raise _contradiction("INT4 weights with weight_packed, as format pack-quantized says", "none")


def _check_scheme(weights: dict[str, Any], packed: _Packed) -> None:
    scheme = {key: weights.get(key) for key in ("num_bits", "type", "symmetric")}
    if scheme != {"num_bits": 4, "type": "int", "symmetric": True}:
        raise UnsupportedFormat(
            "the scheme of the weights",
            file="config.json",
            expected="symmetric 4-bit int",
            found=_listed(scheme.items()),
        )
    order = weights.get("actorder")
    if order is not None and order is not False:
        raise UnsupportedFormat("actorder", file="config.json", expected="none", found=repr(order))
    size, strategy = weights.get("group_size"), weights.get("strategy", "group")
    if strategy not in ("group", "channel"):
        raise UnsupportedFormat("strategy", file="config.json", expected="group or channel", found=repr(strategy))
    groups = {(group, width) for group, width in packed if group != (width if strategy == "channel" else size)}
    if groups:
        claim = "one group a row" if strategy == "channel" else f"group_size {size!r}"
        raise _contradiction(claim, f"scales for groups of {_listed(sorted(group for group, _ in groups))}")


def edited(config: dict[str, Any], block: dict[str, Any] | None, *, rounded_to_bf16: bool) -> dict[str, Any]:
    """Return a copy of a config with `block` as its only quantization block, or with none.

    Args:
        config: the source's config.
        block: the new block. It stands in `text_config` where there is one, as K2.5 has it, else at the top level.
        rounded_to_bf16: whether float weights of another dtype became BF16, so that the dtype must say so.
    """
    copy: dict[str, Any] = json.loads(json.dumps(config))
    homes = list(_homes(copy))
    for home in homes:
        if home is homes[-1] and block is not None:
            home["quantization_config"] = block  # an existing key keeps its place
        else:
            home.pop("quantization_config", None)
        home.pop("compression_config", None)
        for key in ("torch_dtype", "dtype"):
            if rounded_to_bf16 and key in home:
                home[key] = "bfloat16"
    return copy


def quantization_block(target: Format, quantised: set[str], kept: list[str]) -> dict[str, Any] | None:
    """Return the quantization block of an output, or None for BF16.

    Args:
        target: the format of the quantised weights.
        quantised: the bases of the weights stored in it.
        kept: the bases of all other matrices.
    """
    if isinstance(target, Fp8):
        return _fp8_block(target, kept)
    if isinstance(target, Int4):
        return _int4_block(target, quantised, kept)
    return None


def _fp8_block(target: Fp8, kept: list[str]) -> dict[str, Any]:
    """The block of K2-Instruct. What it leaves out by itself (router, head, embedding) needs no entry."""
    block: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(target.block),
    }
    expected = [
        base
        for base in kept
        if names.is_projection(base) or names.tensor_class(f"{base}.weight") in {"vision", "projector"}
    ]
    return block | ({"modules_to_not_convert": expected} if expected else {})


def _int4_block(target: Int4, quantised: set[str], kept: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": target.group,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ignore_list(quantised, kept),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def ignore_list(quantised: set[str], kept: list[str]) -> list[str]:
    """Return an ignore list that covers every matrix kept and no matrix quantised.

    It is made of K2.6's own patterns, as far as they are right for these names; a matrix that no such pattern covers
    stands by its full name. Patterns match from the beginning of the module's name, as compressed-tensors reads them.
    """
    chosen: list[str] = []
    open_names = [base for base in kept if names.tensor_class(f"{base}.weight") != "embedding"]
    for pattern in _K26_IGNORE:
        regex = re.compile(pattern.removeprefix("re:"))
        rest = [base for base in open_names if not regex.match(base)]
        if len(rest) < len(open_names) and not any(regex.match(base) for base in quantised):
            chosen.append(pattern)
            open_names = rest
    return chosen + open_names
