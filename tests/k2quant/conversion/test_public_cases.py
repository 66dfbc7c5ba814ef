"""Checkpoints that broke other tools, as public threads tell it, in small: none goes wrong here without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import k2quant
from k2quant.checkpoint.reader import INDEX, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.errors import CheckpointError
from k2quant.formats.known import FormatName
from k2quant.nano.demo import K2_CONFIG
from rewritten import tensors_of

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def rewritten(source: Path, folder: Path, change: Callable[[Shard], None]) -> Path:
    """Write a checkpoint's tensors anew in one shard, changed, with its config."""
    tensors = tensors_of(open_checkpoint(source))
    change(tensors)
    write_checkpoint(folder, {"model.safetensors": tensors}, json.loads((source / "config.json").read_text()))
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's index."""
    parsed: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return parsed


def converted(source: Path, to: str, out: Path) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["convert", "--to", to, str(source), str(out)])


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_a_correction_bias_stays_in_float32(k2_source: Path, tmp_path: Path, to: FormatName) -> None:
    """238 biases between 6.817 and 7.063 are 8 in BF16 and route otherwise; float32 comes out bit for bit.

    Kind: a tensor that is no weight loses its precision. sgl-project/sglang#31213, NVIDIA-NeMo/Automodel#2553,
    vllm-project/vllm#50761.
    """
    count = tensors_of(open_checkpoint(k2_source))[BIAS][1].size
    bias = np.linspace(6.817, 7.063, count, dtype=np.float32)
    source = rewritten(k2_source, tmp_path / "src", lambda tensors: tensors.update({BIAS: ("F32", bias)}))
    k2quant.convert(source, tmp_path / "out", to=to)
    dtype, found = tensors_of(open_checkpoint(tmp_path / "out"))[BIAS]
    assert dtype == "F32"
    assert found.tobytes() == bias.tobytes()


def test_tensors_that_the_index_leaves_out_are_named(k2_source: Path, tmp_path: Path) -> None:
    """A tensor that lies in a shard and not in the index is not converted, and run, dry run and report say which.

    Kind: dropped in silence. NVIDIA/Model-Optimizer#2427, 1CatAI/1Cat-vLLM#407.
    """
    name = "model.layers.4.eh_proj.weight"
    extra = {name: ("BF16", np.zeros((8, 8), np.uint16))}
    source = rewritten(k2_source, tmp_path / "src", lambda tensors: tensors.update(extra))
    index = index_of(source)
    del index["weight_map"][name]
    (source / INDEX).write_text(json.dumps(index))
    dry = CliRunner().invoke(main, ["convert", "--dry-run", "--to", "int4", str(source), str(tmp_path / "out")])
    assert f"1 tensor of the shards, such as {name}" in dry.stderr
    assert name in converted(source, "int4", tmp_path / "out").stderr
    assert name not in tensors_of(open_checkpoint(tmp_path / "out"))
    assert any(name in text for text in json.loads((tmp_path / "out/k2quant_report.json").read_text())["remarks"])


def test_an_index_that_promises_more_than_the_shard_has_is_refused(k2_source: Path, tmp_path: Path) -> None:
    """An index that names a tensor which its shard lacks is refused, with the tensor's name.

    Kind: a promise that is not kept. huggingface/huggingface_hub#4728, Blaizzy/mlx-vlm#1827.
    """
    source = Path(shutil.copytree(k2_source, tmp_path / "src"))
    index = index_of(source)
    index["weight_map"]["mtp.fc.weight"] = next(iter(index["weight_map"].values()))
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"`mtp.fc.weight`.*its shard lacks"):
        k2quant.convert(source, tmp_path / "out", to="int4")


def test_a_shard_that_was_not_downloaded_is_named(k2_source: Path, tmp_path: Path) -> None:
    """A shard that the index names and that is not there stops everything, before anything is written.

    Kind: weights left uninitialised. sgl-project/sglang#32279, GeeeekExplorer/nano-vllm#272.
    """
    source = Path(shutil.copytree(k2_source, tmp_path / "src"))
    absent = min(index_of(source)["weight_map"].values())
    (source / absent).unlink()
    with pytest.raises(CheckpointError, match=f"{absent}.*not there"):
        k2quant.convert(source, tmp_path / "out", to="int4")
    assert not (tmp_path / "out").exists()


def test_bytes_behind_the_last_tensor_are_refused(k2_source: Path, tmp_path: Path) -> None:
    """A shard with bytes that belong to no tensor is refused with both sizes.

    Kind: a file that only some readers open. Comfy-Org/ComfyUI#15602.
    """
    source = rewritten(k2_source, tmp_path / "src", lambda _: None)
    with (source / "model.safetensors").open("ab") as file:
        file.write(bytes(4096))
    with pytest.raises(CheckpointError, match=r"does not end where its last tensor ends, expected [\d,]+ bytes"):
        k2quant.convert(source, tmp_path / "out", to="int4")


def test_a_folder_called_like_a_shard_is_named(k2_source: Path, tmp_path: Path) -> None:
    """A folder whose name ends in .safetensors is no shard: it is left out, and that is said.

    Kind: files that look like weights. GeeeekExplorer/nano-vllm#272.
    """
    source = Path(shutil.copytree(k2_source, tmp_path / "src"))
    (source / "old.safetensors").mkdir()
    assert (
        "left out, for the index does not name them: old.safetensors"
        in converted(source, "int4", tmp_path / "out").stderr
    )


def test_packed_codes_without_their_shape_are_refused(k2_thinking: Path, tmp_path: Path) -> None:
    """INT4 whose `weight_shape` is gone is refused by the name of the tensor that lacks.

    Kind: a partner lost by another tool. huggingface/transformers#48146.
    """

    def without_shapes(tensors: Shard) -> None:
        for name in [name for name in tensors if name.endswith("weight_shape")]:
            del tensors[name]

    source = rewritten(k2_thinking, tmp_path / "src", without_shapes)
    with pytest.raises(CheckpointError, match=r"weight_shape`: the index lacks this partner"):
        k2quant.convert(source, tmp_path / "out", to="bf16")


def test_codes_packed_in_bytes_are_refused_by_dtype(k2_thinking: Path, tmp_path: Path) -> None:
    """INT4 that is packed in bytes instead of words is refused, with the dtype that was found.

    Kind: the same name, another layout. kvcache-ai/ktransformers#2067.
    """

    def in_bytes(tensors: Shard) -> None:
        for name, (_, words) in list(tensors.items()):
            if name.endswith("weight_packed"):
                tensors[name] = ("U8", words.view(np.uint8))

    source = rewritten(k2_thinking, tmp_path / "src", in_bytes)
    with pytest.raises(CheckpointError, match=r"packed weights of dtype U8 are not supported"):
        k2quant.convert(source, tmp_path / "out", to="bf16")


@pytest.mark.parametrize("bits", [3, 8])
def test_packed_codes_of_another_width_are_refused(k2_thinking: Path, tmp_path: Path, bits: int) -> None:
    """`pack-quantized` says nothing of the width: codes of 3 or 8 bits are refused, never read as 4.

    Kind: one name for several layouts. vllm-project/compressed-tensors#715.
    """
    source = Path(shutil.copytree(k2_thinking, tmp_path / "src"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"expected symmetric 4-bit int.*{bits}"):
        k2quant.convert(source, tmp_path / "out", to="bf16")


def test_fp8_codes_without_their_scales_go_nowhere(k2_source: Path, tmp_path: Path) -> None:
    """FP8 codes whose scales are gone are refused, whatever their scope would have been.

    Kind: valid bytes that mean something else. kekzl/imp#1450, NVIDIA/TensorRT-Model-Connect#1115.
    """
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    source = rewritten(k2_source, tmp_path / "src", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"`{name}`.*lacks this partner"):
        k2quant.convert(source, tmp_path / "out", to="int4")


def test_fp8_of_another_kind_is_named_by_its_dtype(k2_source: Path, tmp_path: Path) -> None:
    """E5M2 codes beside K2's scales are refused by their own dtype, not as scales astray.

    Kind: the message speaks of something else. vllm-project/vllm#47201, sgl-project/sglang#38446.
    """
    name = "model.layers.0.self_attn.o_proj.weight"

    def as_e5m2(tensors: Shard) -> None:
        tensors[name] = ("F8_E5M2", tensors[name][1])

    source = rewritten(k2_source, tmp_path / "src", as_e5m2)
    with pytest.raises(CheckpointError, match=rf"`{name}`.*a weight of dtype F8_E5M2 is not supported"):
        k2quant.convert(source, tmp_path / "out", to="bf16")


def test_scales_that_a_cast_left_behind_are_named_as_such(k2_source: Path, tmp_path: Path) -> None:
    """BF16 beside a `weight_scale_inv`: the message speaks of the scale and of what to do, not of BF16.

    Kind: leavings of another tool, and a message that leads nowhere. deepseek-ai/DeepSeek-V3.2-Exp#59.
    """
    name = "model.layers.0.self_attn.o_proj.weight"

    def as_bf16(tensors: Shard) -> None:
        tensors[name] = ("BF16", np.zeros(tensors[name][1].shape, np.uint16))

    source = rewritten(k2_source, tmp_path / "src", as_bf16)
    with pytest.raises(CheckpointError, match=rf"{name}_scale_inv`.*of BF16, which has none; take the tensor"):
        k2quant.convert(source, tmp_path / "out", to="int4")


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_model_description.json"])
def test_another_tools_word_on_quantization_is_left_out(k2_bf16: Path, tmp_path: Path, file: str) -> None:
    """A file in which ModelOpt, GPTQ or ModelSlim says how weights are quantised is not carried along, and named.

    Kind: a stale promise beside config.json. Engines read `hf_quant_config.json` where config.json has no block.
    sgl-project/sglang#18370, NVIDIA/Model-Optimizer#2060.
    """
    source = Path(shutil.copytree(k2_bf16, tmp_path / "src"))
    (source / file).write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    result = converted(source, "int4", tmp_path / "out")
    assert f"left out, for it describes another quantization than the output has: {file}" in result.stderr
    assert not (tmp_path / "out" / file).exists()


def test_no_block_is_left_in_any_home(k25: Path, tmp_path: Path) -> None:
    """K2.5 keeps its block in `text_config`; BF16 has none there, nor anywhere.

    Kind: a stale promise in a nested config. NVIDIA-NeMo/Automodel#3633.
    """
    k2quant.convert(k25, tmp_path / "out", to="bf16")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_a_checkpoint_that_is_dequantised_already_needs_no_block(k2_bf16: Path, tmp_path: Path) -> None:
    """BF16 without a block is read as what it is.

    Kind: a good checkpoint refused. tenstorrent/tt-metal#52743.
    """
    assert "quantization_config" not in (k2_bf16 / "config.json").read_text()
    assert converted(k2_bf16, "int4", tmp_path / "out").exit_code == 0


def test_a_download_folder_of_the_hub_stays_behind(k2_source: Path, tmp_path: Path) -> None:
    """`hf download --local-dir` leaves `.cache/huggingface` with unfinished files; chat templates beside it are copied.

    Kind: what lies beside the weights. huggingface/text-generation-inference#3247 (templates in files of their own).
    """
    source = Path(shutil.copytree(k2_source, tmp_path / "src"))
    for name in (".cache/huggingface/download/model.incomplete", "additional_chat_templates/tool.jinja"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("x")
    k2quant.convert(source, tmp_path / "out", to="int4")
    assert not (tmp_path / "out" / ".cache").exists()
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Readers differ in which of two equal keys of a JSON object counts: such a config is refused by the key's name.

    Kind: a file that means two things. vllm-project/vllm#54230 (which of two copies is read).
    """
    write_checkpoint(
        tmp_path / "src", {"model.safetensors": {"model.norm.weight": ("BF16", np.ones(8, np.uint16))}}, {}
    )
    (tmp_path / "src" / "config.json").write_text(json.dumps(K2_CONFIG)[:-1] + ', "hidden_size": 1}')
    with pytest.raises(CheckpointError, match="duplicate key 'hidden_size'"):
        k2quant.convert(tmp_path / "src", tmp_path / "out", to="bf16")
