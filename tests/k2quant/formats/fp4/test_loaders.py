"""What engines load of FP4: transformers, which runs here, and what vLLM and SGLang ask for, by their code."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.ground import names
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

SIZES = DEEPSEEK | {"hidden_size": 128, "intermediate_size": 128, "q_lora_rank": 64, "v_head_dim": 32}
PROMPT = torch.tensor([[1, 7, 30, 2, 5, 63]])
LAYOUT: dict[str, Any] = {"nvfp4": {"layout": "compressed-tensors"}, "mxfp4": {}}


def written(folder: Path, **sizes: Any) -> Path:
    """Write a tiny DeepseekV3 of random weights, as transformers saves it."""
    torch.manual_seed(0)
    model = TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**(SIZES | sizes)))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model: a dense layer, and one of experts."""
    return written(tmp_path_factory.mktemp("mixed") / "model")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without experts."""
    return written(tmp_path_factory.mktemp("dense") / "model", first_k_dense_replace=2)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """Return the logits that transformers computes from a checkpoint."""
    model = TRANSFORMERS.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(PROMPT).logits
    return result


def loading(dequantize: bool) -> dict[str, Any]:  # noqa: FBT001  transformers' own word
    """Return what tells transformers how to load packed weights."""
    return {"quantization_config": TRANSFORMERS.CompressedTensorsConfig(dequantize=dequantize)}


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("to", ["nvfp4", "mxfp4"])
def test_transformers_computes_our_logits_from_linears(dense: Path, tmp_path: Path, to: Any, dequantize: bool) -> None:  # noqa: FBT001
    """FP4 linears, dequantised at once or when they first run, are the model of our BF16, to the bit of the logits."""
    made = k2quant.convert(dense, tmp_path / "fp4", to=to, scope="linear", **LAYOUT[to]).folder
    ours = logits(k2quant.convert(made, tmp_path / "bf16", to="bf16").folder)
    assert torch.equal(ours, logits(made, **loading(dequantize)))
    assert not torch.equal(ours, logits(dense))  # rounding did happen


def test_transformers_computes_our_logits_from_mxfp4_experts(mixed: Path, tmp_path: Path) -> None:
    """MXFP4 experts, which need no scale of the whole matrix, are the model of our BF16."""
    made = k2quant.convert(mixed, tmp_path / "fp4", to="mxfp4").folder
    ours = logits(k2quant.convert(made, tmp_path / "bf16", to="bf16").folder)
    assert torch.equal(ours, logits(made, **loading(dequantize=True)))
    assert not torch.equal(ours, logits(mixed))


def test_compressed_tensors_reads_our_nvfp4_experts_as_we_do(mixed: Path, tmp_path: Path) -> None:
    """NVFP4 experts as compressed-tensors' own code decodes them, in transformers' model, give our logits.

    transformers 5.23 loads experts itself and hands that code no `weight_global_scale`
    (integrations/compressed_tensors.py, `CompressedTensorsDequantize`): it computes with other weights, silently.
    """
    made = k2quant.convert(mixed, tmp_path / "fp4", to="nvfp4", layout="compressed-tensors").folder
    config = json.loads((made / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = {name: tensor for shard in made.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        base = packed.removesuffix(".weight_packed")
        parts = {
            part: tensors.pop(f"{base}.{part}") for part in ("weight_packed", "weight_scale", "weight_global_scale")
        }
        tensors[f"{base}.weight"] = compressor.decompress(parts, scheme)["weight"].to(torch.bfloat16)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    (theirs / "config.json").write_text(json.dumps(config))
    ours = k2quant.convert(made, tmp_path / "bf16", to="bf16").folder
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(mixed))


# --- what vLLM and SGLang ask for -------------------------------------------------------------------------------------

# vllm/model_executor/layers/quantization/modelopt.py at 00155cdecca7: ModelOptNvFp4FusedMoE.create_weights and
# ModelOptNvFp4W4A16LinearMethod.create_weights; SGLang has the same in its modelopt/schemes/modelopt_fp4.py at
# 09bd889835dc.
MODELOPT = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"}
"""Suffixes and dtypes; codes [N, K/2], block scales [N, K/16], and one number."""

# .../compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w4a4_nvfp4.py at 08f95fe56166.
PACKED = {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"}

QUANT_ALGOS = ("NVFP4", "W4A16_NVFP4")
"""What vLLM takes of NVFP4 (`QUANT_ALGOS`): with `input_scale`, and without."""

REQUIRED = ("group_size", "kv_cache_quant_algo", "exclude_modules")
"""What vLLM requires in hf_quant_config.json (`ModelOptNvFp4Config._from_config`)."""


def excluded_by_vllm(module: str, ignored: list[str]) -> bool:
    """Tell whether vLLM leaves a module out: by name, by a part of its name, or by a wildcard (`is_layer_excluded`).

    Before it looks, `apply_vllm_mapper` splits `name*` into `name` and `name.*`.
    """
    split = [
        part
        for each in ignored
        for part in ((each[:-1], f"{each[:-1]}.*") if each.endswith("*") and each[-2:-1] != "." else (each,))
    ]
    return any(each in module or fnmatch(module, each) for each in split)


def excluded_by_sglang(module: str, ignored: list[str]) -> bool:
    """Tell whether SGLang does: a wildcard must match the whole name, or a part of it between dots."""
    patterns = [each.replace(".", r"\.").replace("*", ".*") for each in ignored]
    return any(re.fullmatch(pattern, part) for pattern in patterns for part in (module, *module.split(".")))


EXCLUDED = (
    "lm_head",
    "model.layers.0.mlp.gate_up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.shared_experts.gate_up_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.1.self_attn.fused_qkv_a_proj",
    "model.layers.1.self_attn.q_b_proj",
    "model.layers.1.self_attn.kv_b_proj",
    "model.layers.1.self_attn.o_proj",
)
"""Modules of an engine's K2 that are BF16 here, by the engine's names, fused ones among them."""


def test_modelopt_layout_is_what_engines_ask_for(k2_bf16: Path, tmp_path: Path) -> None:
    """Names, dtypes and shapes of every expert, the config and its companion, and what the list of modules means."""
    made = k2quant.convert(k2_bf16, tmp_path / "out", to="nvfp4").folder
    check_tensors(k2_bf16, made, MODELOPT, ())
    block = json.loads((made / "config.json").read_text())["quantization_config"]
    assert block["quant_method"].startswith("modelopt")
    assert block["quant_algo"] in QUANT_ALGOS
    assert {group["weights"]["group_size"] for group in block["config_groups"].values()} == {16}
    beside = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert all(key in beside for key in REQUIRED)
    assert (beside["quant_algo"], beside["exclude_modules"]) == (block["quant_algo"], block["ignore"])
    for excluded in (excluded_by_vllm, excluded_by_sglang):
        assert all(excluded(module, block["ignore"]) for module in EXCLUDED)
        assert not excluded("model.layers.1.mlp.experts", block["ignore"])


def test_packed_layout_is_what_engines_ask_for(k2_bf16: Path, tmp_path: Path) -> None:
    """The same of compressed-tensors' layout, whose config compressed-tensors' own class takes."""
    made = k2quant.convert(k2_bf16, tmp_path / "out", to="nvfp4", layout="compressed-tensors").folder
    check_tensors(k2_bf16, made, PACKED, (1,))
    block = json.loads((made / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(block)
    (scheme,) = config.config_groups.values()
    assert config.format == "nvfp4-pack-quantized"
    assert scheme.weights.strategy == "tensor_group"
    assert scheme.weights.scale_dtype == torch.float8_e4m3fn
    assert scheme.input_activations is None
    assert not (made / "hf_quant_config.json").exists()


def check_tensors(source: Path, made: Path, wanted: dict[str, str], whole: tuple[int, ...]) -> None:
    """Compare what stands there of each expert's matrix with what an engine registers."""
    before, after = open_checkpoint(source).tensors, open_checkpoint(made).tensors
    experts = [names.split(name)[0] for name in before if ".mlp.experts." in name]
    assert experts
    for base in experts:
        rows, columns = before[f"{base}.weight"].shape
        shapes = dict(zip(wanted, ((rows, columns // 2), (rows, columns // 16), whole), strict=True))
        found = {names.split(name)[1]: entry for name, entry in after.items() if name.startswith(f"{base}.")}
        assert {suffix: (entry.dtype, entry.shape) for suffix, entry in found.items()} == {
            suffix: (wanted[suffix], shapes[suffix]) for suffix in wanted
        }


def test_gate_and_up_of_an_expert_share_a_tensor_scale(k2_bf16: Path, tmp_path: Path) -> None:
    """The gate's is what vLLM takes for both (`w13_weight_scale_2[:, 0]`), so they must be one; experts differ."""
    made = k2quant.convert(k2_bf16, tmp_path / "out", to="nvfp4").folder
    tensors = {name: tensor for shard in made.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    scales = {name.removesuffix(".weight_scale_2"): float(t) for name, t in tensors.items() if "weight_scale_2" in name}
    gates = [base for base in scales if base.endswith("gate_proj")]
    assert all(scales[base] == scales[base.replace("gate_proj", "up_proj")] for base in gates)
    assert len({scales[base] for base in gates}) > 1
