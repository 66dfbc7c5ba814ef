"""Merging where a scale belongs to a whole matrix, and to two that engines fuse: what is written is surveyed first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.errors import UnsupportedFormat
from k2quant.merge.adapter import CONFIG, WEIGHTS

GATE, UP, DOWN = (f"model.layers.1.mlp.experts.3.{own}_proj" for own in ("gate", "up", "down"))


def adapter(folder: Path, *bases: str, spread: float = 0.05) -> Path:
    """Write an adapter of rank 4 for some matrices of an expert of the small K2."""
    folder.mkdir(parents=True)
    tensors = {}
    for number, base in enumerate(bases):
        rows, width = (512, 256) if base == DOWN else (256, 512)
        random = torch.Generator().manual_seed(number)
        tensors[f"base_model.model.{base}.lora_A.weight"] = torch.randn((4, width), generator=random)
        tensors[f"base_model.model.{base}.lora_B.weight"] = torch.randn((rows, 4), generator=random) * spread
    save_file(tensors, folder / WEIGHTS)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "peft_version": "0.21.2"}
    (folder / CONFIG).write_text(json.dumps(plain))
    return folder


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a checkpoint as it is stored."""
    source = open_checkpoint(folder)
    return {
        name: (entry.dtype, entry.shape, bytes(read_tensor(source, entry))) for name, entry in source.tensors.items()
    }


def number(content: tuple[str, tuple[int, ...], bytes]) -> float:
    """Return the one float32 of a tensor."""
    return float(np.frombuffer(content[2], np.float32)[0])


ASKED: dict[str, dict[str, Any]] = {
    "modelopt": {"to": "nvfp4"},
    "compressed-tensors": {"to": "nvfp4", "layout": "compressed-tensors"},
    "mxfp4": {"to": "mxfp4"},
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_merge_is_a_bf16_merge_and_a_conversion(asked: str, k2_bf16: Path, tmp_path: Path) -> None:
    """The bits are those of merging into BF16 first: tensor scales come from the merged values, of gate and up both."""
    update, options = adapter(tmp_path / "adapter", GATE, DOWN), ASKED[asked]
    through = k2quant.merge(k2_bf16, update, tmp_path / "bf16", to="bf16").folder
    expected = stored(k2quant.convert(through, tmp_path / "through", **options).folder)
    done = k2quant.merge(k2_bf16, update, tmp_path / "direct", workers=3, **options)
    found = stored(done.folder)
    assert found == expected
    figures = done.report["tensors"][next(name for name in done.report["tensors"] if name.startswith(GATE))]["figures"]
    assert 0 < figures["codes_changed"] < figures["count"] == 256 * 512
    if options["to"] == "mxfp4":
        return
    scale = "weight_scale_2" if asked == "modelopt" else "weight_global_scale"
    plain = stored(k2quant.convert(k2_bf16, tmp_path / "plain", **options).folder)
    assert found[f"{GATE}.{scale}"] == found[f"{UP}.{scale}"] != plain[f"{UP}.{scale}"]


def with_inputs(folder: Path, out: Path) -> Path:
    """Convert to NVFP4 of two layouts with scales of inputs, as engines that run W4A4 read them."""
    return k2quant.convert(folder, out, to="nvfp4", activation_scales="one").folder


def test_an_nvfp4_base_stays_nvfp4(k2_bf16: Path, tmp_path: Path) -> None:
    """What the adapter names is encoded anew from its decoded values; all else, scales of inputs too, is copied."""
    base = with_inputs(k2_bf16, tmp_path / "base")
    update = adapter(tmp_path / "adapter", GATE, UP)
    found = stored(k2quant.merge(base, update, tmp_path / "out", to="nvfp4").folder)
    before = stored(base)
    assert {name for name in before if found[name] != before[name]} == {
        f"{each}.{suffix}" for each in (GATE, UP) for suffix in ("weight", "weight_scale", "weight_scale_2")
    }
    assert found[f"{GATE}.weight_scale_2"] == found[f"{UP}.weight_scale_2"]
    plain = k2quant.merge(base, update, tmp_path / "plain", to="bf16").folder
    again = stored(k2quant.convert(plain, tmp_path / "again", to="nvfp4").folder)
    for suffix in ("weight", "weight_scale", "weight_scale_2"):
        assert found[f"{UP}.{suffix}"] == again[f"{UP}.{suffix}"]
    other = stored(k2quant.merge(base, update, tmp_path / "other", to="nvfp4", layout="compressed-tensors").folder)
    assert number(other[f"{GATE}.input_global_scale"]) == 1.0 == number(found[f"{GATE}.input_scale"])


def test_half_of_what_shares_a_scale_is_refused(k2_bf16: Path, tmp_path: Path) -> None:
    """Gate with a new scale beside up with its old one would be read wrongly by engines: nothing is written."""
    base = k2quant.convert(k2_bf16, tmp_path / "base", to="nvfp4").folder
    update = adapter(tmp_path / "adapter", GATE)
    with pytest.raises(UnsupportedFormat, match=r"keeps its own.*bf16 first"):
        k2quant.merge(base, update, tmp_path / "out", to="nvfp4")
    assert not (tmp_path / "out").exists()
    assert k2quant.merge(base, update, tmp_path / "int4", to="int4").report


def test_what_an_adapter_does_not_touch_is_converted_as_ever(k2_thinking: Path, tmp_path: Path) -> None:
    """Of an INT4 base, scales are searched as `convert` searches them; merged values are rounded."""
    done = k2quant.merge(k2_thinking, adapter(tmp_path / "adapter", DOWN), tmp_path / "out", to="nvfp4")
    found, plain = stored(done.folder), stored(k2quant.convert(k2_thinking, tmp_path / "plain", to="nvfp4").folder)
    touched = {f"{DOWN}.{suffix}" for suffix in ("weight", "weight_scale", "weight_scale_2")}
    assert found.keys() == plain.keys()
    assert {name for name in found if found[name] != plain[name]} == touched
    assert done.report["method"]["default"]
    searched = [name for name, facts in done.report["tensors"].items() if "scales" in facts]
    assert len(searched) == 95
    assert f"{DOWN}.weight" not in searched
