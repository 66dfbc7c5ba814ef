"""What others will read: the peers' own code opens what k2quant writes."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import k2quant
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.errors import K2QuantError
from k2quant.formats.dtypes import as_bits
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

SIZES = DEEPSEEK | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
PROMPT = torch.tensor([[1, 7, 30, 2, 5, 63]])


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """Return the logits that transformers computes from a checkpoint."""
    model = TRANSFORMERS.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(PROMPT).logits
    return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepseekV3 of random weights, saved by transformers itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**SIZES)).to(torch.bfloat16).save_pretrained(
        folder
    )
    return folder


def shards(folder: Path) -> list[Path]:
    """Return the shards of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def test_transformers_computes_the_same_logits_from_our_bf16(tiny: Path, tmp_path: Path) -> None:
    """INT4 -> BF16 by us and INT4 dequantised by transformers are the same model, to the bit of the logits."""
    k2quant.convert(tiny, tmp_path / "int4", to="int4")
    k2quant.convert(tmp_path / "int4", tmp_path / "bf16", to="bf16")
    theirs = logits(tmp_path / "int4", quantization_config=TRANSFORMERS.CompressedTensorsConfig(dequantize=True))
    ours = logits(tmp_path / "bf16")
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(tiny))  # rounding did happen


def test_transformers_computes_the_same_logits_from_an_unquantised_copy(tiny: Path, tmp_path: Path) -> None:
    """A source whose experts are fused comes out per expert, and as the same model."""
    fused = tmp_path / "fused"
    model = TRANSFORMERS.DeepseekV3ForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(fused, save_original_format=False)
    with safe_open(shards(fused)[0], "pt") as file:
        assert any(name.endswith("experts.gate_up_proj") for name in file.keys())  # noqa: SIM118  no mapping
    k2quant.convert(fused, tmp_path / "bf16", to="bf16")
    assert torch.equal(logits(tmp_path / "bf16"), logits(tiny))
    with safe_open(shards(tmp_path / "bf16")[0], "pt") as file:
        assert "model.layers.1.mlp.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118  no mapping


def test_float32_source_becomes_bf16(tiny: Path, tmp_path: Path) -> None:
    """An F32 source is rounded to BF16, its config says so, and the correction bias stays float32."""
    model = TRANSFORMERS.DeepseekV3ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.save_pretrained(tmp_path / "f32")
    k2quant.convert(tmp_path / "f32", tmp_path / "bf16", to="bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text(encoding="utf-8"))
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    with safe_open(shards(tmp_path / "bf16")[0], "pt") as ours, safe_open(shards(tiny)[0], "pt") as source:
        for name in source.keys():  # noqa: SIM118  no mapping
            assert torch.equal(ours.get_tensor(name).to(torch.bfloat16), source.get_tensor(name).to(torch.bfloat16))
        assert ours.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
        assert ours.get_tensor("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16


def test_transformers_accepts_our_fp8_config(tiny: Path, tmp_path: Path) -> None:
    """FineGrainedFP8Config takes the block that we write, and its own list of modules that stay as they are."""
    k2quant.convert(tiny, tmp_path / "fp8", to="fp8", ignore=(r"layers\.0\.mlp\.up_proj",), allow_split=True)
    block = json.loads((tmp_path / "fp8" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = TRANSFORMERS.FineGrainedFP8Config.from_dict(block)
    assert tuple(config.weight_block_size) == (128, 128)
    assert config.activation_scheme == "dynamic"
    assert config.modules_to_not_convert == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_safetensors_opens_every_shard(k2_source: Path, tmp_path: Path, to: k2quant.FormatName) -> None:
    """The safetensors library opens every shard and finds what the index says, tensors aligned to their elements."""
    k2quant.convert(k2_source, tmp_path / "out", to=to)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found = {}
    for shard in shards(tmp_path / "out"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                found[name] = shard.name
                file.get_tensor(name)
    assert found == index["weight_map"]
    sizes = [
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in shards(tmp_path / "out")
    ]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
def test_compressed_tensors_unpacks_our_int4_to_the_same_bits(grid: k2quant.Grid) -> None:
    """Rule 3: compressed-tensors finds our codes in our words, and code * scale in BF16 is our dequantised weight."""
    from compressed_tensors.compressors import unpack_from_int32

    torch.manual_seed(1)
    weight = (torch.randn(64, 256) * 0.02).to(torch.bfloat16)
    packed = k2quant.quantize(weight, "int4", grid=grid)
    codes = unpack_from_int32(packed.codes, 4, torch.Size(packed.shape))
    scale = packed.scale.repeat_interleave(32, dim=1)
    assert torch.equal(codes.to(torch.bfloat16) * scale, k2quant.dequantize(packed))
    assert int(codes.min()) == (-8 if grid == "compressed-tensors" else -7)


def test_compressed_tensors_quantises_its_own_grid_to_the_same_bits() -> None:
    """Rule 3: our compressed-tensors grid gives the scales and words that compressed-tensors itself gives."""
    from compressed_tensors.compressors import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(2)
    weight = (torch.randn(32, 256) * 0.02).to(torch.bfloat16)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = weight.reshape(32, -1, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)
    ours = k2quant.quantize(weight, "int4", grid="compressed-tensors")
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.codes, pack_to_int32(codes, 4))


def test_torch_and_numpy_tensors_give_the_same_bits() -> None:
    """Rules 2 and 3: a torch tensor and a numpy array of its bits are quantised and dequantised alike."""
    torch.manual_seed(3)
    weight = (torch.randn(160, 96) * 0.02).to(torch.bfloat16)
    bits = weight.view(torch.uint16).numpy()
    for to in ("fp8", "int4"):
        ours, plain = k2quant.quantize(weight, to), k2quant.quantize(bits, to)
        assert ours.codes.dtype == (torch.float8_e4m3fn if to == "fp8" else torch.int32)
        assert np.array_equal(ours.codes.view(torch.uint8).numpy().view(plain.codes.dtype), plain.codes)
        back = k2quant.dequantize(ours)
        assert back.dtype == torch.bfloat16
        assert np.array_equal(back.view(torch.uint16).numpy(), k2quant.dequantize(plain))


def test_quantised_tensor_names_its_tensors_as_a_checkpoint_does() -> None:
    """`tensors` gives what an engine's weight loader takes: names, dtypes and shapes of the checkpoint."""
    packed = k2quant.quantize(torch.randn(64, 64), "int4").tensors("model.layers.1.mlp.experts.0.up_proj")
    assert {name.rpartition(".")[2]: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == {
        "weight_packed": (torch.int32, (64, 8)),
        "weight_scale": (torch.bfloat16, (64, 2)),
        "weight_shape": (torch.int32, (2,)),
    }
    assert list(k2quant.quantize(torch.randn(64, 64), "fp8").tensors("a")) == ["a.weight", "a.weight_scale_inv"]


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones((64, 64), np.int32),
        np.ones((64, 64), np.uint8),
        torch.zeros(64, 64).to(torch.float8_e4m3fn),
        torch.empty(64, 64, device="meta"),
        [[1.0, 2.0]],
        np.float32(1),
    ],
    ids=lambda wrong: str(getattr(wrong, "dtype", "list")),
)
def test_what_is_no_weight_is_refused(wrong: Any) -> None:
    """Integers, codes, lists and scalars are not quantised as if they were weights."""
    with pytest.raises(K2QuantError):
        k2quant.quantize(wrong, "int4")


def test_wrong_parts_are_refused() -> None:
    """`dequantize` takes the codes and scales of its format alone, and unknown grids do not exist."""
    packed = k2quant.quantize(torch.randn(64, 64), "int4")
    for parts in ({"codes": packed.codes.float()}, {"scale": packed.scale.float()}, {"scale": packed.scale[:1]}):
        with pytest.raises(K2QuantError):
            k2quant.dequantize(dataclasses.replace(packed, **parts))
    unknown: Any = "foo"
    with pytest.raises(K2QuantError, match="unknown grid"):
        k2quant.quantize(torch.randn(64, 64), "int4", grid=unknown)


def test_compressed_tensors_decompresses_our_fp8_to_the_same_bits(k2_source: Path, tmp_path: Path) -> None:
    """compressed-tensors takes the config of `--layout compressed-tensors`, and its own code gives our BF16.

    It multiplies in float32, as rule 1 does; ragged blocks, such as the 576 rows of `kv_a_proj_with_mqa`, among them.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    made = k2quant.convert(k2_source, tmp_path / "fp8", to="fp8", layout="compressed-tensors").folder
    block = json.loads((made / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = QuantizationConfig.model_validate(block).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(block["format"])
    k2quant.convert(made, tmp_path / "bf16", to="bf16")
    ours, count = _tensors_of(tmp_path / "bf16"), 0
    stored = _tensors_of(made)
    for name, codes in stored.items():
        if codes.dtype == torch.float8_e4m3fn:
            state = {"weight": codes, "weight_scale": stored[f"{name}_scale"]}
            assert torch.equal(compressor.decompress(state, scheme)["weight"].to(torch.bfloat16), ours[name])
            count += 1
    assert count > 100
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] % 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_compressed_tensors_compresses_is_read_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Codes and scales of its own FP8_BLOCK preset, and the config that it writes, are read: values equal its own.

    llm-compressor stores scales in the dtype of the model, BF16.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme

    scheme: QuantizationScheme = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    torch.manual_seed(4)
    weight = (torch.randn(576, 256) * 0.02).to(dtype)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 64)).reshape(5, 128, 2, 128)
    scale = (padded.abs().amax(dim=(1, 3)) / 448).to(dtype)
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    block = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json")
    base = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    shard = {f"{base}.{suffix}": (_DTYPES[part.dtype], as_bits(part)) for suffix, part in state.items()}
    config = {"model_type": "kimi_k2", "quantization_config": block}
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config)
    k2quant.convert(tmp_path / "src", tmp_path / "bf16", to="bf16")
    theirs = compressor.decompress(state, scheme)["weight"].to(torch.bfloat16)
    assert torch.equal(_tensors_of(tmp_path / "bf16")[f"{base}.weight"], theirs)


_DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}


def _tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in shards(folder):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    return found


def test_transformers_computes_the_same_logits_from_our_fp8_of_this_layout(tiny: Path, tmp_path: Path) -> None:
    """FP8 under compressed-tensors' names, dequantised by transformers, is the model of our BF16."""
    made = k2quant.convert(tiny, tmp_path / "fp8", to="fp8", layout="compressed-tensors").folder
    k2quant.convert(made, tmp_path / "bf16", to="bf16")
    theirs = logits(made, quantization_config=TRANSFORMERS.CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(tmp_path / "bf16"), theirs)
