"""What configs say of FP4: ModelOpt's block and file, old and new, and compressed-tensors' groups."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.nvfp4 import Nvfp4

SCHEME = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
WHO = {"name": "modelopt", "version": "0.47.0"}
NEW: dict[str, Any] = {
    "config_groups": {"group_0": {"input_activations": SCHEME, "weights": SCHEME, "targets": ["Linear"]}},
    "ignore": ["lm_head", "model.layers.0*", "*self_attn*"],
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": WHO,
    "quant_method": "modelopt",
}
"""The block of NVIDIA's checkpoints of K2, as ModelOpt 0.47 writes it."""
OLD: dict[str, Any] = {
    "producer": WHO,
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0*", "*self_attn*"],
    },
}
"""What its file hf_quant_config.json holds, and what older ones have as their block."""
PACKED: dict[str, Any] = SCHEME | {"symmetric": True, "strategy": "tensor_group"}


def packed(kind: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Return a block of compressed-tensors."""
    said = {"nvfp4": PACKED, "mxfp4": PACKED | {"strategy": "group", "group_size": 32}}[kind] | weights
    group = {"targets": ["Linear"], "weights": said, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def plan(folder: Path, to: str, **options: Any) -> Plan:
    """Plan a conversion."""
    return make_plan(open_checkpoint(folder), Options(to=to, **options))  # type: ignore[arg-type]


def block_of(planned: Plan) -> dict[str, Any]:
    """Return the quantization block that would be written."""
    found: dict[str, Any] = json.loads(planned.config or b"{}").get("quantization_config", {})
    return found


@pytest.mark.parametrize(
    ("block", "file"),
    [(NEW, None), (NEW, OLD), (OLD | {"quant_method": "modelopt"}, None), (OLD, None), (None, OLD)],
    ids=["block", "block and file", "old block", "old block without method", "file alone"],
)
def test_modelopt_says_it_in_five_ways(sound: Any, written: Any, block: Any, file: Any) -> None:
    """A copy has the new block, with who made the codes and the cache; whatever else is written, the cache is named."""
    folder = written(sound("modelopt", inputs=0.5), block)
    if file is not None:
        (folder / modelopt.COMPANION).write_text(json.dumps(file))
    copied = plan(folder, "nvfp4")
    found = block_of(copied)
    assert {name: found.get(name) for name in ("quant_method", "quant_algo", "kv_cache_scheme", "producer")} == {
        name: NEW[name] for name in ("quant_method", "quant_algo", "kv_cache_scheme", "producer")
    }
    assert found.keys() <= NEW.keys() | {"group_size"}
    assert json.loads(copied.companions[modelopt.COMPANION]) == {
        "producer": WHO,
        "quantization": OLD["quantization"] | {"exclude_modules": found["ignore"]},
    }
    text = " ".join(plan(folder, "bf16").remarks)
    assert "kv_cache_scheme" in text
    assert "1 input_scale" in text
    assert not k2quant.inspect(folder).problems


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"quantization": {"quant_algo": "W4A16_NVFP4"}}, "contradicts config.json in quant_algo"),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}}, "kv_cache_scheme"),
        ({"quantization": []}, r"hf_quant_config\.json: quantization is not an object"),
    ],
)
def test_a_file_that_contradicts_the_block(sound: Any, written: Any, file: Any, words: str) -> None:
    """Engines read one or the other, so both must say the same."""
    folder = written(sound("modelopt", inputs=0.5), NEW)
    (folder / modelopt.COMPANION).write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_a_cache_that_is_not_fp8(sound: Any, written: Any) -> None:
    """A copy says of it what the source says, and does not call it FP8 in ModelOpt's own file."""
    cache = {"dynamic": False, "num_bits": 4, "type": "float"}
    copied = plan(written(sound("modelopt", inputs=0.5), NEW | {"kv_cache_scheme": cache}), "nvfp4")
    assert block_of(copied)["kv_cache_scheme"] == cache
    assert json.loads(copied.companions[modelopt.COMPANION])["quantization"]["kv_cache_quant_algo"] is None


@pytest.mark.parametrize(
    "algo",
    ["NVFP4_AWQ", "NVFP4_SVD", "MIXED_PRECISION", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP8", "FP8", "W4A16_AWQ", 4],
)
def test_other_algorithms_of_modelopt(sound: Any, written: Any, algo: object) -> None:
    """Each means other codes, or inputs that are scaled or rotated first, and is refused by name."""
    with pytest.raises(UnsupportedFormat, match=f"quant_algo.*{algo}"):
        plan(written(sound("modelopt"), NEW | {"quant_algo": algo}), "bf16")


@pytest.mark.parametrize("algo", ["nvfp4", "w4a16_nvfp4"])
def test_an_algorithm_in_lower_case(sound: Any, written: Any, algo: str) -> None:
    """Engines read it so, too."""
    assert block_of(plan(written(sound("modelopt", inputs=1.0), NEW | {"quant_algo": algo}), "nvfp4"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_algo": None}, "no quant_algo"),
        ({"config_groups": {"a": NEW["config_groups"]["group_0"], "b": {}}}, "one group"),
        ({"config_groups": {"a": []}}, "not an object"),
        ({"config_groups": {"a": {"weights": SCHEME | {"group_size": 32}}}}, "group_size"),
        ({"config_groups": {"a": {"weights": SCHEME | {"num_bits": 8}}}}, "num_bits"),
        ({"config_groups": {"a": {"weights": "fp4"}}}, "not an object"),
        ({"config_groups": {"a": {"weights": SCHEME, "pre_quant_scale": True}}}, "pre_quant_scale"),
        ({"config_groups": {"a": {"weights": SCHEME, "input_activations": SCHEME | {"num_bits": 8}}}}, "num_bits"),
        ({"group_size": 32}, "group_size"),
        ({"pre_quant_scale": True}, "pre_quant_scale"),
        ({"has_zero_point": True}, "has_zero_point"),
        ({"quantized_layers": {"a": {"quant_algo": "FP8"}}}, "quantized_layers"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"kv_cache_scheme": "NVFP4"}, "kv_cache_scheme"),
        ({"quantization": []}, "quantization"),
        ({"transform_config": {"R": 1}}, "transform_config"),
    ],
)
def test_a_block_of_modelopt_that_is_not_understood(sound: Any, written: Any, changes: Any, words: str) -> None:
    """Another group size, zero points, inputs scaled first, a format for each layer: refused by name."""
    with pytest.raises(CheckpointError, match=words):
        plan(written(sound("modelopt"), NEW | changes), "bf16")


def test_an_unknown_key_of_modelopt(sound: Any, written: Any) -> None:
    """In a copy it stays; elsewhere it is refused, for it may say what the codes mean."""
    folder = written(sound("modelopt", inputs=1.0), NEW | {"codebook": "e2m1_plus"})
    assert block_of(plan(folder, "nvfp4"))["codebook"] == "e2m1_plus"
    with pytest.raises(UnsupportedFormat, match="codebook"):
        plan(folder, "bf16")


@pytest.mark.parametrize(
    ("kind", "block", "words"),
    [
        ("packed", NEW, "weight_scale_2"),
        ("mxfp4", NEW, "found none"),
        ("modelopt", packed("nvfp4"), "weight_global_scale"),
        ("mxfp4", packed("nvfp4"), "weight_global_scale"),
        ("packed", packed("mxfp4"), "found none"),
        ("packed", packed("nvfp4", group_size=32), "group_size"),
        ("packed", packed("nvfp4", group_size="float8_e4m3fn"), "group_size"),
        ("packed", packed("nvfp4", strategy="group"), "strategy"),
        ("packed", packed("nvfp4", scale_dtype="torch.uint8"), "scale_dtype"),
        ("packed", packed("nvfp4", num_bits=8), "num_bits 8"),
        ("packed", packed("nvfp4", symmetric=False), "symmetric False"),
        ("mxfp4", packed("mxfp4", group_size=16), "group_size"),
        ("mxfp4", packed("mxfp4", strategy="uint8"), "strategy"),
        ("mxfp4", packed("mxfp4", type="int"), "type 'int'"),
        ("mxfp4", packed("mxfp4", scale_dtype="torch.bfloat16"), "scale_dtype"),
    ],
)
def test_a_config_that_contradicts_the_tensors(
    sound: Any, written: Any, kind: str, block: dict[str, Any], words: str
) -> None:
    """The other layout, the other format, another group size: one is wrong, and nobody knows which."""
    with pytest.raises(CheckpointError, match=words):
        plan(written(sound(kind), block), "bf16")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_what_llm_compressor_writes_is_read(sound: Any, written: Any, kind: str) -> None:
    """Weights only and with inputs, with and without the dtype of the scales, which older versions do not say."""
    tensors = sound({"nvfp4": "packed", "mxfp4": "mxfp4"}[kind])
    dtype = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}[kind]
    inputs = packed(kind)["config_groups"]["group_0"]["weights"] | {"dynamic": "local" if kind == "nvfp4" else True}
    for said in (packed(kind), packed(kind, scale_dtype=dtype), packed(kind, inputs)):
        folder = written(tensors, said)
        layout = {"layout": "compressed-tensors"} if kind == "nvfp4" else {}
        found = block_of(plan(folder, kind, **layout))
        assert found["config_groups"]["group_0"]["weights"] == said["config_groups"]["group_0"]["weights"]
        assert (
            found["config_groups"]["group_0"]["input_activations"]
            == (said["config_groups"]["group_0"]["input_activations"])
        )


def test_what_the_layouts_say_of_inputs(sound: Any, written: Any) -> None:
    """From ModelOpt's layout to compressed-tensors' and back, inputs and the cache of each tool stay said."""
    both = plan(written(sound("modelopt", inputs=0.5), NEW), "nvfp4", layout="compressed-tensors")
    found = block_of(both)
    (group,) = found["config_groups"].values()
    assert (group["input_activations"]["dynamic"], group["input_activations"]["group_size"]) == ("local", 16)
    assert modelopt.is_fp8_cache(found["kv_cache_scheme"])
    assert not [text for text in both.remarks if "left out" in text and "input" in text]
    back = plan(written(sound("packed", inputs=2.0), found, "packed"), "nvfp4")
    assert block_of(back)["quant_algo"] == "NVFP4"
    assert block_of(back)["kv_cache_scheme"] == modelopt.CACHE
    alone = plan(written(sound("packed"), packed("nvfp4"), "alone"), "nvfp4")
    assert block_of(alone)["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in block_of(alone)["config_groups"]["group_0"]


KEPT = [
    *(f"{prefix}model.layers.0.mlp.{name}_proj" for prefix in ("", "language_model.") for name in ("gate", "down")),
    "model.layers.3.self_attn.kv_a_proj_with_mqa",
    "model.layers.3.mlp.gate",
    "model.layers.3.mlp.shared_experts.up_proj",
    "lm_head",
    "language_model.lm_head",
    "vision_tower.blocks.0.wqkv",
    "mm_projector.proj.0",
    "model.layers.61.eh_proj",
    "model.layers.61.shared_head.head",
    "model.layers.3.self_attn.indexer.wk",
    "something.else",
]
EXPERTS = [f"{prefix}model.layers.3.mlp.experts.0.gate_proj" for prefix in ("", "language_model.")]


@pytest.mark.parametrize("quantised", [EXPERTS, [*EXPERTS, "model.layers.5.mlp.shared_experts.up_proj"]])
def test_the_ignore_list_covers_what_is_kept_and_nothing_else(quantised: list[str]) -> None:
    """As `fnmatch` reads it, which vLLM and TensorRT-LLM do, and by text that is found, which vLLM does besides."""
    found = modelopt.ignore_list(quantised, KEPT)
    assert all(any(fnmatchcase(base, entry) for entry in found) for base in KEPT)
    assert not [base for base in quantised for entry in found if fnmatchcase(base, entry) or entry in base]
    assert len(found) <= len(KEPT) + 3


def test_fused_matrices_are_covered_by_their_own_names() -> None:
    """Engines lay gate and up, and q_a and kv_a, into one module of another name; patterns cover those too."""
    found = modelopt.ignore_list(EXPERTS, KEPT)
    for module in (
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.3.self_attn.fused_qkv_a_proj_with_mqa",
        "language_model.model.layers.3.mlp.shared_experts.gate_up_proj",
    ):
        assert any(fnmatchcase(module, entry) for entry in found)
    assert not any(fnmatchcase("model.layers.3.mlp.experts", entry) for entry in found)


def test_the_cache_of_each_tool() -> None:
    """FP8 with one scale a layer, in words that the other one reads, too."""
    assert modelopt.is_fp8_cache(compressed_tensors.CACHE)
    assert modelopt.is_fp8_cache(modelopt.CACHE)
    assert not modelopt.is_fp8_cache(compressed_tensors.CACHE | {"strategy": "attn_head"})
    assert not modelopt.is_fp8_cache(compressed_tensors.CACHE | {"dynamic": True})
    assert not modelopt.is_fp8_cache({"num_bits": 4, "type": "float"})
    assert Nvfp4().cache_scheme() == modelopt.CACHE


def test_a_block_without_groups_is_enough(sound: Any, written: Any) -> None:
    """Engines ask for `quant_algo` alone; what a group would say, tensors say."""
    block = {name: value for name, value in NEW.items() if name != "config_groups"}
    assert "config_groups" in block_of(plan(written(sound("modelopt", inputs=1.0), block), "nvfp4"))
    with pytest.raises(MalformedFile, match="no quant_algo"):
        plan(written(sound("modelopt"), {"quant_method": "modelopt"}, "none"), "bf16")


@pytest.mark.parametrize(
    ("kind", "shape", "layout"), [("modelopt", (1,), "compressed-tensors"), ("packed", (), "modelopt")]
)
def test_verify_knows_the_two_forms_of_a_tensor_scale_apart(
    sound: Any, written: Any, tmp_path: Any, kind: str, shape: tuple[int, ...], layout: Any
) -> None:
    """Also where both are of one shape: the same number in the other form is another scale."""
    suffix, other = ("weight_scale_2", "weight_global_scale")[:: 1 if kind == "modelopt" else -1]
    tensors = sound(kind)
    name = next(each for each in tensors if each.endswith(suffix))
    tensors[name] = ("F32", tensors[name][1].reshape(shape))
    source = written(tensors)
    done = k2quant.convert(source, tmp_path / "out", "nvfp4", layout=layout).folder
    assert k2quant.verify(source, done).passed
    entry = open_checkpoint(done).tensors[name.replace(suffix, other)]
    with (done / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(tensors[name][1].tobytes())
    assert not k2quant.verify(source, done).passed
