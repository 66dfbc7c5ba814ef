"""NVFP4 and MXFP4 checkpoints as models: packed, equal to their BF16 values, and saved byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.errors import BadValue
from k2quant.model import load_model, stream_forward
from k2quant.model.modules import PROJECTIONS, QuantizedExperts, QuantizedLinear
from rewritten import respelled, tensors_of
from tiny import write_model

IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(7))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny K2 in each layout of FP4, and the BF16 conversion of each. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("fp4")
    write_model(folder / "source")
    modelopt = convert(folder / "source", folder / "modelopt", to="nvfp4").folder
    found = {
        "modelopt": modelopt,
        "compressed-tensors": convert(
            folder / "source", folder / "c-t", to="nvfp4", layout="compressed-tensors"
        ).folder,
        "linear": convert(folder / "source", folder / "linear", to="nvfp4", scope="linear").folder,
        "mxfp4": convert(folder / "source", folder / "mxfp4", to="mxfp4").folder,
    }
    return found | {
        f"{name} as bf16": convert(path, folder / f"{name}-bf16", to="bf16").folder for name, path in found.items()
    }


LAYOUTS = ("modelopt", "compressed-tensors", "linear", "mxfp4")


def logits(path: Path, backend: Any = "decoded", **options: Any) -> torch.Tensor:
    """Return a model's logits, float32."""
    with torch.no_grad():
        found: torch.Tensor = load_model(path, backend=backend, **options)(IDS).logits.float()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_those_of_the_bf16_conversion(layout: str, dtype: str, made: dict[str, Path]) -> None:
    """Bit for bit by the values that weights mean; by the kernels as near as other roundings are.

    There, a token whose router has two experts that are as good as equal may get the other one.
    """
    wanted = logits(made[f"{layout} as bf16"], dtype=dtype)
    assert torch.equal(logits(made[layout], dtype=dtype), wanted)
    for backend in ("auto", "reference"):
        apart = (logits(made[layout], backend, dtype=dtype) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert apart.median() <= 0.02
        assert (apart > 0.04).sum() <= 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_stay_packed_and_are_saved_byte_for_byte(layout: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Experts are stacks of codes, scales and, for NVFP4, a tensor scale each; states speak the checkpoint's names."""
    model: Any = load_model(made[layout])
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    assert isinstance(model.model.layers[1].self_attn.o_proj, QuantizedLinear) == (layout == "linear")
    packed = sum(experts.packed(name).nbytes for name in PROJECTIONS)
    weights = sum(torch.Size(experts.packed(name).shape).numel() for name in PROJECTIONS)
    assert packed <= 0.6 * weights
    assert sum(buffer.nbytes for buffer in experts.buffers()) == packed
    source = open_checkpoint(made[layout])
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in source.tensors} == {
        name: entry.shape for name, entry in source.tensors.items()
    }
    model.save_pretrained(tmp_path / "saved")
    for path in made[layout].iterdir():
        if path.name != "k2quant_report.json":
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layout", ["modelopt", "mxfp4"])
def test_a_state_is_loaded_again(layout: str, made: dict[str, Path]) -> None:
    """What `state_dict` gives goes back into another model, tensor scales too; a damaged scale does not."""
    model: Any = load_model(made[layout], backend="decoded")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = model.model.layers[1].mlp.experts
    experts.replace(lambda weight: weight.empty_like("cpu"))
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), logits(made[layout]))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    damaged = state | {name: torch.full_like(state[name].view(torch.uint8), 0xFF).view(state[name].dtype)}
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj: weight_scale: found a .*NaN scale"):
        model.load_state_dict(damaged)


@pytest.mark.parametrize("layout", ["compressed-tensors", "mxfp4"])
def test_a_pass_with_one_layer_in_memory(layout: str, made: dict[str, Path]) -> None:
    """Streaming, and blocks that wait on disk, give the bits of the loaded model; tensor scales are forgotten, too."""
    wanted = logits(made[layout], "auto")
    (found,) = stream_forward(made[layout], [IDS])
    assert torch.equal(found.float(), wanted)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    model: Any = load_model(made[layout], device={**places, "model.layers.1": "disk"})
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), wanted)
    assert all(buffer.is_meta for buffer in model.model.layers[1].mlp.experts.buffers())


def test_scales_of_inputs_change_nothing_and_are_kept(made: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint for W4A4 runs with inputs as they are, which a word says, and gives its scales back."""
    read = open_checkpoint(made["modelopt"])
    inputs: Shard = {
        name.replace("weight_scale_2", "input_scale"): ("F32", np.array(0.37, np.float32))
        for name in read.tensors
        if name.endswith("weight_scale_2")
    }
    block = dict((read.config or {})["quantization_config"]) | {"quant_algo": "NVFP4"}
    group = block["config_groups"]["group_0"]
    block["config_groups"] = {"group_0": group | {"input_activations": group["weights"]}}
    folder = respelled(made["modelopt"], tmp_path / "inputs", more=inputs, quantization_config=block)
    with pytest.warns(match=r"24 input_scale, such as .*, which engines use and k2quant does not"):
        model = load_model(folder, backend="decoded")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), logits(made["modelopt"]))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_layers_without_model_in_their_names(made: dict[str, Path], tmp_path: Path) -> None:
    """`language_model.layers...`, as some NVFP4 files of K2.5 have it, gives the same logits."""

    def rename(name: str) -> str:
        return name.replace("model.", "language_model.", 1) if name.startswith("model.") else f"language_model.{name}"

    other = respelled(made["modelopt"], tmp_path / "other", rename)
    assert torch.equal(logits(other), logits(made["modelopt"]))


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight_scale", 0xFF, "negative or NaN scale"),
        ("weight_scale", 0x80, "negative or NaN scale"),
        ("weight_scale_2", np.inf, "tensor scale: found one that is negative, NaN, infinite"),
        ("weight_scale_2", -1.0, "tensor scale: found one that is negative, NaN, infinite"),
    ],
)
def test_damaged_scales_are_refused(
    suffix: str, value: float, message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    """Loading names the file and the weight of a scale that no weight can have."""
    read = open_checkpoint(made["modelopt"])
    tensors = tensors_of(read)
    name = f"model.layers.1.mlp.experts.5.down_proj.{suffix}"
    dtype, array = tensors[name]
    array = array.copy()
    array[(0,) * array.ndim] = value
    write_checkpoint(tmp_path / "bad", {"model.safetensors": tensors | {name: (dtype, array)}}, read.config)
    with pytest.raises(BadValue, match=message) as caught:
        load_model(tmp_path / "bad")
    assert "experts.5.down_proj" in str(caught.value)


def test_scales_that_a_file_calls_e8m0(made: dict[str, Path], tmp_path: Path) -> None:
    """MXFP4 whose scales are of the dtype F8_E8M0, the same bytes, is the same model and is saved as it was."""
    read = open_checkpoint(made["mxfp4"])
    tensors = {
        name: ("F8_E8M0" if dtype == "U8" and name.endswith("_scale") else dtype, array)
        for name, (dtype, array) in tensors_of(read).items()
    }
    write_checkpoint(tmp_path / "e8m0", {"model.safetensors": tensors}, read.config)
    assert torch.equal(logits(tmp_path / "e8m0"), logits(made["mxfp4"]))
    load_model(tmp_path / "e8m0").save_pretrained(tmp_path / "saved")
    saved, before = (tmp_path / folder / "model.safetensors" for folder in ("saved", "e8m0"))
    assert saved.read_bytes() == before.read_bytes()
