"""One scale for what engines lay into one matrix, wherever its parts lie and whatever they were stored in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint import panels
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.errors import UnsupportedFormat
from k2quant.formats.nvfp4 import Exponents, Nvfp4
from k2quant.kernels.codecs.fp4 import tensor_scale
from k2quant.kernels.codecs.values import U16, bf16_to_float, float_to_bf16

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"
SHAPES = {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}
Stored = dict[str, tuple[str, Any]]


def made(seed: int, largest: float, shape: tuple[int, int]) -> U16:
    """Return weights of which the last is the largest."""
    values = np.random.default_rng(seed).uniform(-0.01, 0.01, shape).astype(np.float32)
    values[-1, -1] = -largest
    return float_to_bf16(values)


def in_bf16(base: str, values: U16) -> Stored:
    """Return a weight as BF16 has it."""
    return {f"{base}.weight": ("BF16", values)}


def in_fp8(base: str, values: U16) -> Stored:
    """Return a weight in blocks of FP8."""
    found = k2quant.quantize(values, "fp8")
    return {f"{base}.weight": ("F8_E4M3", found.codes), f"{base}.weight_scale_inv": ("F32", found.scale)}


def in_nvfp4(base: str, values: U16) -> Stored:
    """Return a weight that is NVFP4 already."""
    found = k2quant.quantize(values, "nvfp4").tensors(base)
    dtypes = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"}
    return {name: (dtypes[name.removeprefix(f"{base}.")], np.asarray(array)) for name, array in found.items()}


def in_mxfp4(base: str, values: U16) -> Stored:
    """Return a weight in MXFP4."""
    found = k2quant.quantize(values, "mxfp4")
    return {f"{base}.weight_packed": ("U8", found.codes), f"{base}.weight_scale": ("U8", found.scale)}


def write(folder: Path, up: Callable[[str, U16], Stored] = in_fp8, shards: int = 2) -> Path:
    """Write two experts: gates and downs in BF16, ups in another shard; of one up is larger, of the other gate."""
    files: list[Shard] = [{} for _ in range(shards)]
    for expert, largest in ((0, {"gate": 0.5, "up": 2.0, "down": 1.0}), (1, {"gate": 4.0, "up": 0.25, "down": 8.0})):
        for number, (name, shape) in enumerate(SHAPES.items()):
            base, values = EXPERT.format(expert, name), made(3 * expert + number, largest[name], shape)
            store, home = (up, files[-1]) if name == "up" else (in_bf16, files[0])
            home.update(store(base, values))
    named = {f"model-{number + 1}-of-{shards}.safetensors": shard for number, shard in enumerate(files)}
    write_checkpoint(folder, named, {"model_type": "kimi_k2"})
    return folder


def tensor_scales(folder: Path, suffix: str = "weight_scale_2") -> dict[tuple[int, str], float]:
    """Return the tensor scale of each matrix."""
    source, found = open_checkpoint(folder), {}
    for expert in (0, 1):
        for name in SHAPES:
            entry = source.tensors.get(f"{EXPERT.format(expert, name)}.{suffix}")
            if entry is not None:
                found[expert, name] = float(np.frombuffer(read_tensor(source, entry), np.float32)[0])
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_gate_and_up_share_the_scale_of_the_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any, workers: int
) -> None:
    """In two shards, in BF16 and FP8, cut into panels of 128 rows: one scale an expert, and down has its own."""
    monkeypatch.setattr(panels, "PANEL_WEIGHTS", 1)
    source = write(tmp_path / "source")
    done = k2quant.convert(source, tmp_path / "out", "nvfp4", layout=layout, workers=workers).folder
    modelopt = layout == "modelopt"
    amax = {(0, "gate"): 2.0, (0, "up"): 2.0, (0, "down"): 1.0, (1, "gate"): 4.0, (1, "up"): 4.0, (1, "down"): 8.0}
    expected = {which: tensor_scale(value, divides=not modelopt).value for which, value in amax.items()}
    assert tensor_scales(done, "weight_scale_2" if modelopt else "weight_global_scale") == expected
    assert k2quant.verify(source, done).passed


def test_only_what_is_written_so_counts(tmp_path: Path) -> None:
    """Where a recipe keeps up in FP8, and somebody allowed that, gate is alone."""
    source = write(tmp_path / "source")
    rules = [{"to": "fp8", "match": r"up_proj$"}, {"to": "nvfp4", "scope": "experts"}]
    done = k2quant.convert(source, tmp_path / "out", recipe={"rules": rules}, allow_split=True)
    found = tensor_scales(done.folder, "weight_global_scale")  # beside FP8, which has config groups
    assert found[0, "gate"] == tensor_scale(0.5, divides=True).value
    assert (0, "up") not in found


def test_a_half_that_keeps_its_scale_is_refused_beside_one_that_gets_one(tmp_path: Path) -> None:
    """Nothing is written; where somebody allows it, each half has its own scale, and verify says so."""
    source = write(tmp_path / "source", in_nvfp4)
    with pytest.raises(UnsupportedFormat, match=r"keeps its own.*up_proj, which is nvfp4.*convert to bf16"):
        k2quant.convert(source, tmp_path / "out", "nvfp4")
    assert not (tmp_path / "out").exists()
    done = k2quant.convert(source, tmp_path / "out", "nvfp4", allow_split=True).folder
    failures = k2quant.verify(source, done).failures
    assert len(failures) == 2
    assert all("another scale of the whole matrix than" in why for why in failures.values())


def test_codes_that_share_a_scale_with_another_format_are_refused_or_rounded(tmp_path: Path) -> None:
    """MXFP4's codes stay at powers of two, and the other half asks for another scale: nothing is rounded unasked."""
    source = write(tmp_path / "source", in_mxfp4)
    with pytest.raises(UnsupportedFormat, match=r"experts.*shares a tensor scale.*`allow_rounding=True`"):
        k2quant.convert(source, tmp_path / "out", "nvfp4")
    done = k2quant.convert(source, tmp_path / "rounded", "nvfp4", allow_rounding=True)
    assert done.report["rounded"]["of"] == 2
    assert done.report["rounded"]["weights"] > 0
    assert k2quant.verify(source, done.folder).passed


def test_exponents_at_the_end_of_bf16_leave_a_finite_scale() -> None:
    """What MXFP4 may hold at 2^127 is no more than BF16 has, beside whatever shares its tensor scale."""
    largest = float(bf16_to_float(np.array([0x7F7F], np.uint16))[0])
    for highest in (126, 127):
        found = Nvfp4(rounding=True).settled([Exponents(0, highest), 1.0])
        assert found.tensor == tensor_scale(largest, divides=False)


def test_zeros_ask_for_no_scale() -> None:
    """Codes of MXFP4 stay beside a half that holds zeros alone."""
    alone = Nvfp4().settled([Exponents(-3, 2)])
    assert alone.exponent == 2 - 8
    assert Nvfp4().settled([None, Exponents(-3, 2), 0.0]) == alone


def test_verify_finds_a_half_with_another_scale(tmp_path: Path) -> None:
    """A tensor scale that was changed is found; in a source that has two of them already it is nobody's fault."""
    source = write(tmp_path / "source")
    made_ = k2quant.convert(source, tmp_path / "out", "nvfp4").folder
    entry = open_checkpoint(made_).tensors[f"{EXPERT.format(0, 'up')}.weight_scale_2"]
    with (made_ / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(np.float32(2 * tensor_scale(2.0, divides=False).value).tobytes())
    (why,) = (
        text for text in k2quant.verify(source, made_).failures.values() if "another scale of the whole matrix" in text
    )
    assert "experts.0.gate_proj" in why or "experts.0.up_proj" in why
    again = k2quant.convert(made_, tmp_path / "again", "nvfp4", shard_size=10**6).folder
    assert k2quant.verify(made_, again).passed


def test_a_matrix_of_zeros_is_written(tmp_path: Path) -> None:
    """What has no largest weight has the scale that the rule gives it, and comes back as zeros."""
    base = EXPERT.format(0, "down")
    shard: Shard = dict(in_bf16(base, np.zeros((128, 256), np.uint16)))
    write_checkpoint(tmp_path / "source", {"model.safetensors": shard}, {"model_type": "kimi_k2"})
    done = k2quant.convert(tmp_path / "source", tmp_path / "out", "nvfp4").folder
    back = k2quant.convert(done, tmp_path / "back", "bf16").folder
    source = open_checkpoint(back)
    values = np.frombuffer(read_tensor(source, source.tensors[f"{base}.weight"]), np.uint16)
    assert not bf16_to_float(values).any()


@pytest.mark.parametrize("beside", [0.0, 2.0])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_zeros_of_mxfp4_keep_their_signs(tmp_path: Path, layout: Any, beside: float) -> None:
    """Codes stay what they are also where no exponent is in use, whatever the other half asks for."""
    up, gate = EXPERT.format(0, "up"), EXPERT.format(0, "gate")
    codes = np.tile(np.array([0x00, 0x08, 0x80, 0x88], np.uint8), (64, 8))
    scales = np.arange(128, dtype=np.uint8).reshape(64, 2)
    shard: Shard = {f"{up}.weight_packed": ("U8", codes), f"{up}.weight_scale": ("U8", scales)}
    shard[f"{gate}.weight"] = ("BF16", float_to_bf16(np.full((64, 64), beside, np.float32)))
    write_checkpoint(tmp_path / "source", {"model.safetensors": shard}, {"model_type": "kimi_k2"})
    done = open_checkpoint(k2quant.convert(tmp_path / "source", tmp_path / "out", "nvfp4", layout=layout).folder)
    main = "weight" if layout == "modelopt" else "weight_packed"
    assert bytes(read_tensor(done, done.tensors[f"{up}.{main}"])) == codes.tobytes()
    assert k2quant.verify(tmp_path / "source", done.folder).passed
