"""Every key that compressed-tensors and transformers know in a quantization block, and what becomes of it."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.plan import Options, make_plan
from k2quant.errors import UnsupportedFormat
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.fp8 import Fp8
from k2quant.formats.known import FormatName

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us
BASE = "model.layers.1.mlp.experts.0.up_proj"
METHOD = "compressed-tensors"

WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": WEIGHTS}
CACHE: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
BLOCKS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4": {"quant_method": METHOD, "format": "pack-quantized", "config_groups": {"group_0": GROUP}},
}

KEPT, REWRITTEN, REFUSED = "kept", "rewritten", "refused"
SAID, SILENT = "said", "silent"

Fates = dict[str, tuple[Any, str, str]]
"""For each key a value, what becomes of it in a copy (kept as it is; rewritten from the tensors; refused), and what is
said of it in a conversion to BF16, where no block is left (said; nothing, for it tells of the codes alone; refused)."""

OF_FP8: Fates = {
    "activation_scheme": ("static", KEPT, SAID),
    "weight_block_size": ([128, 128], KEPT, SILENT),
    "dequantize": (True, KEPT, SILENT),
    "modules_to_not_convert": (["lm_head"], REWRITTEN, SILENT),
    "modules_to_convert": (["model.embed_tokens"], KEPT, SILENT),
    "scale_fmt": ("ue8m0", KEPT, SILENT),
    "expert_dtype": ("fp8", KEPT, SILENT),
}
"""transformers' FineGrainedFP8Config."""

FP8_BESIDES: Fates = {
    "quant_method": ("fp8", KEPT, SILENT),
    "fmt": ("e4m3", KEPT, SILENT),
    "ignored_layers": (["lm_head"], REWRITTEN, SILENT),
    "kv_cache_scheme": (CACHE, KEPT, SAID),
    "transform_config": ({"config_groups": {"R1": {}}, "R": 1}, REFUSED, REFUSED),
}
"""What releases and engines have besides."""

OF_INT4: Fates = {
    "config_groups": ({"group_0": GROUP | {"targets": ["re:.*experts.*"]}}, REWRITTEN, SILENT),
    "quant_method": (METHOD, KEPT, SILENT),
    "kv_cache_scheme": (CACHE, KEPT, SAID),
    "format": ("pack-quantized", KEPT, SILENT),
    "quantization_status": ("frozen", REWRITTEN, SILENT),
    "global_compression_ratio": (1.5, KEPT, SILENT),
    "ignore": (["lm_head"], REWRITTEN, SILENT),
    "moe_sparsity_config": ({"method": "prune", "num_experts": [None, 2]}, KEPT, REFUSED),
}
"""compressed-tensors' QuantizationConfig."""

INT4_BESIDES: Fates = {
    "run_compressed": (True, KEPT, SILENT),
    "dequantize": (True, KEPT, SILENT),
    "use_optimized_inference": (True, KEPT, SILENT),
    "version": ("0.20.0", KEPT, SILENT),
    "sparsity_config": ({"format": "dense"}, KEPT, SILENT),
    "transform_config": ({"config_groups": {"R1": {}}, "R": 1}, REFUSED, REFUSED),
}
"""What transformers' CompressedTensorsConfig and the files of compressed-tensors have besides."""

OF_GROUPS: Fates = {
    "targets": (["re:.*experts.*"], REWRITTEN, SILENT),
    "weights": (WEIGHTS, KEPT, SILENT),
    "input_activations": (CACHE, KEPT, SAID),
    "output_activations": (CACHE, KEPT, SAID),
    "format": ("pack-quantized", REWRITTEN, SILENT),
}
"""compressed-tensors' QuantizationScheme."""

OF_WEIGHTS: Fates = {
    "num_bits": (4, KEPT, SILENT),
    "type": ("int", KEPT, SILENT),
    "symmetric": (True, KEPT, SILENT),
    "group_size": (32, KEPT, SILENT),
    "strategy": ("group", KEPT, SILENT),
    "block_structure": ([128, 128], REFUSED, REFUSED),
    "dynamic": (True, REFUSED, REFUSED),
    "actorder": ("static", KEPT, SILENT),
    "scale_dtype": ("torch.bfloat16", KEPT, SILENT),
    "zp_dtype": ("torch.int8", KEPT, SILENT),
    "observer": ("mse", KEPT, SILENT),
    "observer_kwargs": ({"maxshrink": 0.2}, KEPT, SILENT),
}
"""compressed-tensors' QuantizationArgs."""


def fields_of(name: str) -> set[str]:
    """Return the fields of a class of compressed-tensors."""
    return set(getattr(import_module("compressed_tensors.quantization"), name).model_fields)


def arguments_of(name: str) -> set[str]:
    """Return the arguments of a class of transformers."""
    return set(inspect.signature(getattr(TRANSFORMERS, name).__init__).parameters) - {"self", "kwargs"}


@pytest.mark.parametrize(
    ("name", "fates"),
    [
        ("QuantizationConfig", OF_INT4),
        ("QuantizationScheme", OF_GROUPS),
        ("QuantizationArgs", OF_WEIGHTS),
    ],
)
def test_keys_of_compressed_tensors_are_known(name: str, fates: Fates) -> None:
    """The kind: keys that are dropped. A release with one more key fails here until it is said what becomes of it."""
    assert fields_of(name) == fates.keys()


def test_keys_of_transformers_are_known() -> None:
    """The kind: keys that are dropped. Likewise what transformers takes for FP8 and for compressed-tensors."""
    assert arguments_of("FineGrainedFP8Config") == OF_FP8.keys()
    assert arguments_of("CompressedTensorsConfig") <= {**OF_INT4, **INT4_BESIDES}.keys()


def test_the_product_knows_these_keys_and_no_others() -> None:
    """The tables here are those of the product."""
    assert Fp8.keys is not None
    assert Fp8.keys.keys() == {**OF_FP8, **FP8_BESIDES}.keys()
    assert compressed_tensors.KEYS.keys() == {**OF_INT4, **INT4_BESIDES}.keys()
    assert OF_GROUPS.keys() == compressed_tensors.GROUP_KEYS
    assert compressed_tensors.ARGUMENTS.keys() == OF_WEIGHTS.keys()


def tensors(kind: str) -> Shard:
    """Return one weight of 64 x 64 ones, with a scale of its input."""
    scale: Shard = {f"{BASE}.input_scale": ("F32", np.ones(1, np.float32))}
    if kind == "fp8":
        codes, scales = np.full((64, 64), 0x38, np.uint8), np.ones((1, 1), np.float32)
        return scale | {f"{BASE}.weight": ("F8_E4M3", codes), f"{BASE}.weight_scale_inv": ("F32", scales)}
    return scale | {
        f"{BASE}.weight_packed": ("I32", np.full((64, 8), 0x99999999, np.uint32).view(np.int32)),
        f"{BASE}.weight_scale": ("BF16", np.full((64, 2), 0x3F80, np.uint16)),
        f"{BASE}.weight_shape": ("I32", np.array([64, 64], np.int32)),
    }


def with_key(place: str, key: str, value: object) -> dict[str, Any]:
    """Return a block with one more key, in itself, in its group, or in what the group says of the weights."""
    if place in BLOCKS:
        return BLOCKS[place] | {key: value}
    group = GROUP | ({key: value} if place == "group" else {"weights": WEIGHTS | {key: value}})
    return BLOCKS["int4"] | {"config_groups": {"group_0": group}}


def found_in(block: dict[str, Any], place: str, key: str) -> object:
    """Return what stands under a key there."""
    if place in BLOCKS:
        return block.get(key)
    (group,) = block["config_groups"].values()
    return (group if place == "group" else group["weights"]).get(key)


CASES = [
    pytest.param(place, key, *fate, id=f"{place} {key}")
    for place, fates in (
        ("fp8", OF_FP8 | FP8_BESIDES),
        ("int4", OF_INT4 | INT4_BESIDES),
        ("group", OF_GROUPS),
        ("weights", OF_WEIGHTS),
    )
    for key, fate in fates.items()
]


@pytest.mark.parametrize(("place", "key", "value", "copied", "converted"), CASES)
def test_what_becomes_of_each_key(
    tmp_path: Path, place: str, key: str, value: object, copied: str, converted: str
) -> None:
    """The kind: keys that are dropped. Each is kept, rewritten or refused in a copy, and said or refused elsewhere."""
    kind: FormatName = "fp8" if place == "fp8" else "int4"
    block = with_key(place, key, value)
    config = {"model_type": "kimi_k2", "quantization_config": block}
    write_checkpoint(tmp_path, {"model.safetensors": tensors(kind)}, config)
    source = open_checkpoint(tmp_path)
    if copied == REFUSED:
        with pytest.raises(UnsupportedFormat, match=key):
            make_plan(source, Options(to=kind))
    else:
        found = json.loads(make_plan(source, Options(to=kind)).config or b"{}")["quantization_config"]
        assert (found_in(found, place, key) == value) == (copied == KEPT)
    if converted == REFUSED:
        with pytest.raises(UnsupportedFormat, match=key):
            make_plan(source, Options(to="bf16"))
    else:
        words = [text for text in make_plan(source, Options(to="bf16")).remarks if "does not say it" in text]
        assert [("static activations" if key == "activation_scheme" else key) in text for text in words] == (
            [True] if converted == SAID else []
        )
