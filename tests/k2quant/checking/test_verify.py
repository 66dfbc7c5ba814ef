"""Verification: what passes, and above all what must not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.cli import main
from k2quant.formats.dtypes import as_bits

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"


def overwrite(folder: Path, entry: TensorEntry, data: bytes) -> None:
    """Put other bytes in the place of a tensor, repeated to its length."""
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write((data * -(-entry.nbytes // len(data)))[: entry.nbytes])


def test_verify_finds_one_wrong_bit(k2_source: Path, tmp_path: Path) -> None:
    """A flipped bit in the output fails the checksums; a wrong scale also fails the comparison by meaning."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4")
    assert k2quant.verify_checksums(tmp_path / "out").passed
    assert k2quant.verify(k2_source, tmp_path / "out", against=tmp_path / "out" / "k2quant_report.json").passed
    name = f"{EXPERT.format(0, 'up')}.weight_scale"
    entry = open_checkpoint(tmp_path / "out").tensors[name]
    with (tmp_path / "out" / entry.file).open("r+b") as file:
        file.seek(entry.start + 1)
        exponent = file.read(1)[0]
        file.seek(entry.start + 1)
        file.write(bytes([exponent ^ 1]))
    assert list(k2quant.verify_checksums(tmp_path / "out").failures) == [name]
    found = k2quant.verify(k2_source, tmp_path / "out")
    assert list(found.failures) == [f"{EXPERT.format(0, 'up')}.weight"]


def test_each_folder_is_opened_once(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared, what the config says and what may be missing are asked of one reading of the headers."""
    out = k2quant.convert(k2_source, tmp_path / "out", to="int4").folder
    opened = []

    def count(folder: Path, *, follow_links: bool) -> Checkpoint:
        opened.append(folder)
        return open_checkpoint(folder, follow_links=follow_links)

    for module in ("verify", "comparison"):
        monkeypatch.setattr(f"k2quant.checking.{module}.open_checkpoint", count)
    assert k2quant.verify(k2_source, out).passed
    assert opened == [k2_source, out]


def test_verify_fails_what_is_worse_than_the_report(k2_source: Path, tmp_path: Path) -> None:
    """`--against` holds a conversion to the figures of a stored report."""
    report = k2quant.convert(k2_source, tmp_path / "out", to="int4").report
    name = f"{EXPERT.format(0, 'up')}.weight_packed"
    report["tensors"][name]["figures"]["error"] *= 0.99
    (tmp_path / "stored.json").write_text(json.dumps(report), encoding="utf-8")
    found = k2quant.verify(k2_source, tmp_path / "out", against=tmp_path / "stored.json")
    assert list(found.failures) == [name.replace("weight_packed", "weight")]


@pytest.mark.parametrize("to", ["int4", "fp8"])
def test_too_large_a_scale_excuses_nothing(k2_source: Path, tmp_path: Path, to: k2quant.FormatName) -> None:
    """Codes of zero under a huge scale are nearest to nothing: all weights are lost, and verify says so."""
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "out", to=to)
    base = EXPERT.format(0, "up")
    tensors = open_checkpoint(tmp_path / "out").tensors
    if to == "int4":
        overwrite(tmp_path / "out", tensors[f"{base}.weight_packed"], b"\x88")
        overwrite(tmp_path / "out", tensors[f"{base}.weight_scale"], b"\x80\x3f")  # 1.0
    else:
        overwrite(tmp_path / "out", tensors[f"{base}.weight"], b"\x00")
        overwrite(tmp_path / "out", tensors[f"{base}.weight_scale_inv"], b"\x00\x00\x7a\x44")  # 1000.0
    found = k2quant.verify(tmp_path / "bf16", tmp_path / "out")
    assert list(found.failures) == [f"{base}.weight"]
    assert "further off" in found.failures[f"{base}.weight"]


def test_doubled_scales_are_too_coarse(k2_source: Path, tmp_path: Path) -> None:
    """Weights rounded to a grid twice as coarse as they need are further off than INT4 rounding explains."""
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "out", to="int4")
    base = EXPERT.format(0, "up")
    out = open_checkpoint(tmp_path / "out")
    source = open_checkpoint(tmp_path / "bf16")
    weight = np.frombuffer(read_tensor(source, source.tensors[f"{base}.weight"]), np.uint16).reshape(256, 512)
    scale = np.frombuffer(read_tensor(out, out.tensors[f"{base}.weight_scale"]), np.uint16) + 0x80  # doubled
    step = (scale.astype(np.uint32) << 16).view(np.float32).repeat(32).reshape(256, 512)
    codes = np.rint((weight.astype(np.uint32) << 16).view(np.float32) / step).astype(np.int64) + 8
    words = (codes.reshape(-1, 8) << np.arange(0, 32, 4)).sum(1).astype(np.uint32)
    overwrite(tmp_path / "out", out.tensors[f"{base}.weight_packed"], words.tobytes())
    overwrite(tmp_path / "out", out.tensors[f"{base}.weight_scale"], scale.tobytes())
    assert list(k2quant.verify(tmp_path / "bf16", tmp_path / "out").failures) == [f"{base}.weight"]


def test_fp8_without_its_last_bit_is_too_coarse(k2_source: Path, tmp_path: Path) -> None:
    """Codes of two bits of mantissa, not three, are up to a ninth of a weight off: more than FP8 rounding explains."""
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "out", to="fp8")
    name = f"{EXPERT.format(0, 'up')}.weight"
    out = open_checkpoint(tmp_path / "out")
    codes = np.frombuffer(read_tensor(out, out.tensors[name]), np.uint8)
    coarse = np.where(codes & 0x78, codes & 0xFE, codes)  # subnormal codes stay: a bit is all that some have
    overwrite(tmp_path / "out", out.tensors[name], coarse.astype(np.uint8).tobytes())
    assert list(k2quant.verify(tmp_path / "bf16", tmp_path / "out").failures) == [name]


def test_config_is_verified_too(k2_source: Path, tmp_path: Path) -> None:
    """A lost, foreign or stale quantization block fails, by meaning and by checksum."""
    k2quant.convert(k2_source, tmp_path / "int4", to="int4")
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    int4, bf16 = ((tmp_path / name / "config.json").read_text() for name in ("int4", "bf16"))
    fp8 = (k2_source / "config.json").read_text()
    for folder, text in (("int4", bf16), ("int4", fp8), ("bf16", int4), ("bf16", fp8)):
        path = tmp_path / folder / "config.json"
        right = path.read_text()
        path.write_text(text)
        assert list(k2quant.verify(k2_source, tmp_path / folder).failures) == ["config.json"]
        assert list(k2quant.verify_checksums(tmp_path / folder).failures) == ["config.json"]
        path.write_text(right)
        assert k2quant.verify(k2_source, tmp_path / folder).passed
    (tmp_path / "int4" / "config.json").unlink()
    assert list(k2quant.verify(k2_source, tmp_path / "int4").failures) == ["config.json"]


def test_values_that_were_rounded_to_be_compared_are_told_apart(tmp_path: Path) -> None:
    """Wrong without a word: F32 beside its BF16 is equal only once it is rounded, and verify and diff say so."""
    generator = np.random.default_rng(0)
    exact = generator.standard_normal((128, 64)).astype(np.float32)
    near = exact * np.float32(1 + 2**-20)
    bf16 = torch.from_numpy(exact).to(torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    for folder, tensor in (
        ("exact", ("F32", exact)),
        ("near", ("F32", near)),
        ("bf16", ("BF16", as_bits(bf16))),
    ):
        write_checkpoint(tmp_path / folder, {"model.safetensors": {name: tensor}}, {"model_type": "kimi_k2"})

    def said(*command: str) -> str:
        names = {"exact", "near", "bf16"}
        places = [str(tmp_path / part) if part in names else part for part in command]
        return CliRunner().invoke(main, places, catch_exceptions=False).output

    words = "F16 and F32 were compared as BF16, to which they were rounded: 1 tensor"
    assert words in said("verify", "exact", "bf16")
    assert f"no difference in 1 tensor; {words}" in said("diff", "bf16", "exact")
    assert "once rounded to BF16" in said("diff", "exact", "near")
    assert words in said("diff", "exact", "near")
    for alike in (("diff", "exact", "exact"), ("verify", "bf16", "bf16")):
        assert "rounded" not in said(*alike)
