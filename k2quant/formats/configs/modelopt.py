"""`quantization_config` as NVIDIA's ModelOpt has it, and its own file beside config.json.

The block is written as nvidia-modelopt 0.47 writes it (torch/export/convert_hf_config.py,
`convert_hf_quant_config_format`). Older checkpoints have that file alone, or what it holds as their block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.formats.configs.keys import (
    FILE,
    ROTATIONS,
    Key,
    Recast,
    carry,
    empty,
    is_object,
    is_texts,
    shown,
)
from k2quant.formats.format import contradiction, listed
from k2quant.ground import names
from k2quant.kernels.codecs.grids import NVFP4_BLOCK

METHOD = "modelopt"

COMPANION = "hf_quant_config.json"
"""ModelOpt's own file. Engines that find no block in config.json read this one."""

MARK = ".weight_scale_2"
"""How the name of a tensor ends that only ModelOpt's checkpoints have."""

CACHE: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
"""`kv_cache_scheme` of an FP8 cache of keys and values."""

WITH_INPUTS = "NVFP4"
"""`quant_algo` where inputs are quantised too, and their scale stands in the checkpoint."""

WEIGHTS_ONLY = "W4A16_NVFP4"
"""`quant_algo` where inputs stay as they are."""

_PRODUCER = {"name": "k2quant"}

_SCHEME: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}

_GROUP_KEYS = ("weights", "input_activations", "targets")

KEYS = {
    "quant_method": Key(fate="written", expected=METHOD, fits=lambda value: value == METHOD),
    "quant_algo": Key(
        fate="written",
        expected=f"{WITH_INPUTS} or {WEIGHTS_ONLY}",
        fits=lambda value: isinstance(value, str) and value.upper() in {WITH_INPUTS, WEIGHTS_ONLY},
    ),
    "config_groups": Key(fate="written", expected="an object", fits=is_object),  # see `check`
    "group_size": Key(fate="written", expected=str(NVFP4_BLOCK), fits=lambda value: value == NVFP4_BLOCK),
    "ignore": Key(fate="written", expected="a list of names", fits=is_texts),
    "producer": Key(fate="written", expected="an object", fits=is_object),
    "kv_cache_scheme": Key(fate="beyond", expected="an object", fits=is_object),
    "has_zero_point": Key(fate="codes", expected="false", fits=lambda _: False),
    "pre_quant_scale": Key(fate="codes", expected="false", fits=lambda _: False),
    "quantized_layers": Key(fate="codes", expected="one format for all layers", fits=lambda _: False),
    "transform_config": ROTATIONS,
}
"""What ModelOpt has in the block, of the two algorithms that are read."""

_PATTERNS = (
    ("*lm_head",),
    ("*self_attn*",),
    ("*.mlp.gate",),
    ("*.shared_experts*",),
    ("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.gate_up_proj", "*.mlp.down_proj"),
    ("*vision_tower*",),
    ("*mm_projector*",),
    ("*.eh_proj",),
    ("*.shared_head.head",),
    ("*.block_sparse_moe.gate",),
    ("*.routed_expert_down_proj", "*.routed_expert_up_proj"),
    ("*_res_proj",),
)
"""Modules that K2's NVFP4 checkpoints leave as they are, and K3's; each stands in the list if it is right for the names
of a checkpoint."""


def block(quantised: Iterable[str], kept: list[str], *, inputs: bool) -> dict[str, Any]:
    """Return a quantization block.

    Args:
        quantised: the bases of the weights in NVFP4.
        kept: the bases of all other matrices.
        inputs: whether a scale of the inputs stands beside each weight.
    """
    return {
        "config_groups": {
            "group_0": {
                **({"input_activations": dict(_SCHEME)} if inputs else {}),
                "weights": dict(_SCHEME),
                "targets": ["Linear"],
            }
        },
        "ignore": ignore_list(quantised, kept),
        "quant_algo": WITH_INPUTS if inputs else WEIGHTS_ONLY,
        "producer": dict(_PRODUCER),
        "quant_method": METHOD,
    }


def companion(block: Mapping[str, Any]) -> bytes:
    """Return `hf_quant_config.json`, which says what a block says, whole."""
    content = {
        "producer": block.get("producer") or _PRODUCER,
        "quantization": {
            "quant_algo": block["quant_algo"],
            "kv_cache_quant_algo": "FP8" if is_fp8_cache(block.get("kv_cache_scheme")) else None,
            "group_size": NVFP4_BLOCK,
            "exclude_modules": block["ignore"],
        },
    }
    return json.dumps(content, indent=4, ensure_ascii=False).encode() + b"\n"


def flattened(block: Mapping[str, Any], file: str = FILE) -> dict[str, Any]:
    """Return a block as newer ModelOpt has it; one of another tool, or such a one, as it is.

    Args:
        block: what a file says.
        file: its name, for the message.

    Raises:
        MalformedFile: what stands under `quantization` is no object.
    """
    inner = block.get("quantization")
    if inner is None or block.get("quant_method") not in (None, METHOD):
        return dict(block)
    if not isinstance(inner, dict):
        raise MalformedFile("quantization is not an object", file=file, found=shown(inner))
    renamed: dict[str, str] = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}
    said: dict[str, Any] = {renamed.get(name, str(name)): value for name, value in inner.items()}
    if said.get("kv_cache_scheme") == "FP8":
        said["kv_cache_scheme"] = dict(CACHE)
    others = {name: value for name, value in block.items() if name not in {"quantization", "quant_method"}}
    return {**said, **others, "quant_method": METHOD}


def completed(config: dict[str, Any], companion: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what ModelOpt's own file says, where it has no block of its own.

    Raises:
        CheckpointError: it has one, and the two contradict each other: engines read one or the other.
    """
    homes = [config, config.get("text_config")]
    blocks = [home["quantization_config"] for home in homes if isinstance(home, dict) and "quantization_config" in home]
    own = next((block for block in blocks if isinstance(block, dict)), None)
    meant = flattened({"quantization": {}} | dict(companion), COMPANION)
    if own is None and "quantization" not in companion:
        return config
    if own is None:
        return config if blocks else config | {"quantization_config": meant}
    said = flattened(own)
    for name in ("quant_algo", "kv_cache_scheme"):
        if said.get("quant_method") == METHOD and not empty(meant.get(name)) and _other(said.get(name), meant[name]):
            raise CheckpointError(
                f"contradicts config.json in {name}",
                file=COMPANION,
                expected=shown(said.get(name)),
                found=shown(meant[name]),
                remedy="take the files that belong to these weights",
            )
    return config


def _other(one: object, two: object) -> bool:
    """Tell whether two values differ; of a cache, whether it is FP8."""
    if isinstance(one, dict) and isinstance(two, dict):
        return is_fp8_cache(one) != is_fp8_cache(two)
    return str(one).upper() != str(two).upper()


def is_fp8_cache(scheme: object) -> bool:
    """Tell whether a `kv_cache_scheme`, of whichever tool, means one FP8 scale for each layer."""
    if not isinstance(scheme, dict) or not empty(scheme.get("dynamic")):
        return False
    return (scheme.get("num_bits"), scheme.get("type")) == (8, "float") and scheme.get("strategy") in (None, "tensor")


def quantises_inputs(block: Mapping[str, Any]) -> bool:
    """Tell whether a block has inputs quantised at scales that stand in the checkpoint."""
    return str(block.get("quant_algo")).upper() == WITH_INPUTS


def check(block: Mapping[str, Any]) -> None:
    """Refuse a block that does not mean NVFP4 as it is read.

    Raises:
        MalformedFile: a config group is no object, or there is no algorithm.
        UnsupportedFormat: it means something else, or has what k2quant does not understand.
    """
    if empty(block.get("quant_algo")):
        raise MalformedFile("quantization_config has no quant_algo", file=FILE)
    groups = block.get("config_groups") or {}
    if len(groups) > 1:
        raise UnsupportedFormat("config_groups", file=FILE, expected="one group", found=listed(sorted(groups)))
    for group in groups.values():
        if not isinstance(group, dict):
            raise MalformedFile("a config group is not an object", file=FILE, found=shown(group))
        strange = [name for name, value in group.items() if name not in _GROUP_KEYS and not empty(value)]
        if strange:
            raise UnsupportedFormat("a config group", file=FILE, expected=listed(_GROUP_KEYS), found=shown(strange))
        for name in ("weights", "input_activations"):
            _check_scheme(group.get(name), name)


def _check_scheme(scheme: object, name: str) -> None:
    if empty(scheme):
        return
    if not isinstance(scheme, dict):
        raise MalformedFile(f"{name} is not an object", file=FILE, found=shown(scheme))
    wrong = {key: value for key, value in scheme.items() if not empty(value) and _SCHEME.get(key) != value}
    if wrong:
        raise UnsupportedFormat(name, file=FILE, expected=shown(_SCHEME), found=shown(wrong))


def carried(fresh: dict[str, Any], source: Mapping[str, Any], recast: Recast) -> dict[str, Any]:
    """Return a new block with whatever of the source's is still true of it; in a copy also who made the codes."""
    block = carry(fresh, source, KEYS, recast)
    if recast.copied:
        block |= {name: source[name] for name in ("producer", "config_groups", "quant_algo") if name in source}
    return block


def check_layout(found: Iterable[str]) -> None:
    """Refuse weights that have other names than ModelOpt's.

    Args:
        found: the layouts of the weights in NVFP4.

    Raises:
        CheckpointError: there are such, or none at all.
    """
    layouts = set(found)
    if layouts != {METHOD}:
        names = f"names of {listed(sorted(layouts))}" if layouts else "none"
        raise contradiction(f"NVFP4 weights with weight_scale_2, as quant_method {METHOD} says", names)


def ignore_list(quantised: Iterable[str], kept: list[str]) -> list[str]:
    """Return a list that covers every matrix kept and no matrix quantised, as engines match it.

    vLLM (vllm/model_executor/layers/quantization/modelopt.py, `is_layer_excluded`) leaves a module out whose name a
    pattern matches as `fnmatch` does, or in which an entry is found anywhere; SGLang (modelopt_quant.py) and
    TensorRT-LLM match patterns with `*` against whole names. Engines call fused matrices by names of their own, so
    patterns that cover those come first; what none of them covers stands by its full name.
    """
    quantised = list(quantised)
    chosen: list[str] = []
    rest = [base for base in kept if names.tensor_class(f"{base}.weight") != "embedding"]
    for patterns in _PATTERNS:
        left = [base for base in rest if not any(fnmatchcase(base, pattern) for pattern in patterns)]
        if len(left) < len(rest) and not any(fnmatchcase(base, each) for base in quantised for each in patterns):
            chosen += patterns
            rest = left
    return chosen + rest
