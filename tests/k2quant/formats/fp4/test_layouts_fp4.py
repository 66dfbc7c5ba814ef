"""NVFP4 from one layout to the other, and MXFP4 as NVFP4: codes stay, scales are said otherwise, and values stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.errors import BadValue, UnsupportedFormat
from k2quant.formats.dtypes import DTYPES
from k2quant.formats.format import Format, Parts
from k2quant.formats.mxfp4 import Mxfp4
from k2quant.formats.nvfp4 import Exponents, Nvfp4
from k2quant.formats.transcode import Scratch, transcode
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.fp4 import TensorScale, tensor_scale
from k2quant.kernels.codecs.scales.tensor_forms import nearest_inverse, same_inverse

BASE = "model.layers.1.mlp.experts.0.up_proj"
WITHOUT = 1.1484375
"""An amax whose tensor scale, in the form that multiplies, is 7 * 2^-14: no inverse of it means the same."""
CPU = codecs("cpu")


def arrays(stored: Format, shape: tuple[int, int]) -> Parts:
    """Return arrays to fill."""
    state = stored.state(shape)
    return {suffix: np.zeros(state[suffix].shape, DTYPES[state[suffix].dtype].numpy) for suffix in stored.streamed}


def values(stored: Format, parts: Parts) -> Any:
    """Return what a panel's arrays mean."""
    out = np.empty(stored.extent(parts), np.uint16)
    stored.decode(parts, out, CPU)
    return out


def every_code(scale: Any, tensor: float, layout: Any) -> tuple[Nvfp4, Parts]:
    """Return NVFP4 in which each of the 16 codes stands at each of these block scales."""
    stored = Nvfp4(layout=layout)
    parts = arrays(stored, (len(scale), 16))
    parts[stored.main][...] = np.arange(8, dtype=np.uint8) * 0x22 + 0x10
    parts["weight_scale"][:, 0] = scale
    parts[stored.streamed[2]][...] = tensor
    return stored, parts


@settings(deadline=None, max_examples=40)
@given(some.integers(0x3000, 0x4F00), some.booleans())
def test_the_other_form_of_a_tensor_scale_means_the_same(bits: int, divides: bool) -> None:  # noqa: FBT001
    """All 16 codes at all 126 block scales decode to the same BF16 in both layouts, for whatever amax."""
    amax = float(np.array([bits << 16], np.uint32).view(np.float32)[0])
    mine, other = ("compressed-tensors", "modelopt") if divides else ("modelopt", "compressed-tensors")
    tensor = tensor_scale(amax, divides=divides)
    stored, parts = every_code(np.arange(1, 127, dtype=np.uint8), tensor.value, mine)
    target = Nvfp4(layout=other)  # type: ignore[arg-type]
    outputs = arrays(target, (126, 16))
    if same_inverse(tensor) is None:
        with pytest.raises(k2quant.errors.K2QuantError, match="allow_rounding"):
            stored.relabel(parts, outputs, target)
        target = target.rounding_allowed()
        stored.relabel(parts, outputs, target)
        assert np.count_nonzero(values(stored, parts) != values(target, outputs)) < 100
        return
    stored.relabel(parts, outputs, target)
    assert np.array_equal(values(stored, parts), values(target, outputs))
    assert np.array_equal(parts[stored.main], outputs[target.main])
    assert np.array_equal(parts["weight_scale"], outputs["weight_scale"])


def test_of_128_mantissas_one_has_no_inverse() -> None:
    """What multiplies has an inverse for 127 mantissas of an amax, what divides for all, since it is a BF16 itself."""
    amax = [1 + step / 128 for step in range(128)]
    assert [each for each in amax if same_inverse(tensor_scale(each, divides=False)) is None] == [WITHOUT]
    assert not [each for each in amax if same_inverse(tensor_scale(each, divides=True)) is None]


@pytest.mark.parametrize(("value", "nearest"), [(0.125, 8.0), (3.0, float(np.float32(1 / 3))), (1e-40, None)])
def test_the_nearest_inverse(value: float, nearest: float | None) -> None:
    """The float32 nearest to it; nothing where it would be infinite."""
    found = nearest_inverse(TensorScale(value, divides=False))
    assert found == (None if nearest is None else TensorScale(nearest, divides=True))


def read(folder: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a checkpoint."""
    source = open_checkpoint(folder)
    return {e.name: (e.dtype, e.shape, read_tensor(source, e)) for e in source.tensors.values()}


@pytest.mark.parametrize("inputs", [None, 0.5])
def test_a_checkpoint_goes_to_the_other_layout_and_back(sound: Any, written: Any, tmp_path: Any, inputs: Any) -> None:
    """Scales become [1] that divides and scalars that multiply; codes and block scales are the same bytes."""
    source = written(sound("modelopt", inputs=inputs))
    there = k2quant.convert(source, tmp_path / "there", to="nvfp4", layout="compressed-tensors").folder
    expected = sound("packed", inputs=None if inputs is None else 1 / inputs)
    assert read(there) == {name: (dtype, a.shape, a.tobytes()) for name, (dtype, a) in expected.items()}
    back = k2quant.convert(there, tmp_path / "back", to="nvfp4").folder
    assert read(back) == read(source)
    assert k2quant.verify(source, there).passed
    assert k2quant.verify(there, back).passed


@pytest.mark.parametrize(("kind", "layout"), [("modelopt", "modelopt"), ("packed", "compressed-tensors")])
def test_a_new_cut_is_the_same_bytes(sound: Any, written: Any, tmp_path: Any, kind: str, layout: Any) -> None:
    """In the same layout every tensor stays, the scale of the inputs included, in its own shape and in others."""
    tensors = {**sound(kind, inputs=0.75), **sound(kind, base=BASE.replace("up", "down"), inputs=3.0)}
    if kind == "modelopt":
        tensors[f"{BASE}.weight_scale_2"] = ("F32", np.array([0.3], np.float32))
    source = written(tensors)
    cut = k2quant.convert(source, tmp_path / "cut", to="nvfp4", layout=layout, shard_size=3000).folder
    assert read(cut) == read(source)
    assert len(list(cut.glob("*.safetensors"))) == 2


def test_a_tensor_scale_without_an_inverse_is_named(sound: Any, written: Any, tmp_path: Any) -> None:
    """It is refused with the way out; rounding is allowed to take the nearest."""
    tensors = sound("modelopt")
    value = tensor_scale(WITHOUT, divides=False).value
    tensors |= {
        f"{BASE}.weight_scale_2": ("F32", np.array(value, np.float32)),
        f"{BASE}.weight_scale": ("F8_E4M3", (np.arange(256, dtype=np.uint8) % 120 + 1).reshape(64, 4)),
    }
    source = written(tensors)
    asked: dict[str, Any] = {"to": "nvfp4", "layout": "compressed-tensors"}
    with pytest.raises(BadValue, match=f"{BASE}.weight_scale_2.*allow_rounding") as caught:
        k2quant.convert(source, tmp_path / "out", **asked)
    assert "row" not in str(caught.value)
    done = k2quant.convert(source, tmp_path / "out", **asked, allow_rounding=True, restart=True)
    (facts,) = done.report["tensors"].values()
    assert 0 < facts["figures"]["changed"] < facts["figures"]["count"] == 64 * 64
    assert k2quant.verify(source, done.folder).passed


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.language_model."])
def test_names_of_other_wrappers(sound: Any, written: Any, tmp_path: Any, prefix: str) -> None:
    """Whatever stands in front of `layers`, with `model.` or without, is read alike and kept."""
    base = BASE.replace("model.", prefix, 1)
    done = k2quant.convert(written(sound("modelopt", base=base)), tmp_path / "out", to="bf16")
    assert list(read(done.folder)) == [f"{base}.weight"]
    again = k2quant.convert(done.folder, tmp_path / "again", to="nvfp4")
    assert f"{base}.weight_scale_2" in read(again.folder)


# --- MXFP4 as NVFP4 ---------------------------------------------------------------------------------------------------


def mxfp4_of(exponents: list[int], *, zeros: int = 0) -> Parts:
    """Return a row of MXFP4 in which each pair of codes stands in some block; blocks of zeros come last."""
    blocks = len(exponents) + zeros
    codes = np.random.default_rng(0).integers(0, 256, (1, blocks * 16), np.uint8)
    codes[:, len(exponents) * 16 :] = 0x80
    scale = np.array([[each + 127 for each in exponents] + [3] * zeros], np.uint8)
    return {"weight_packed": codes, "weight_scale": scale}


def as_nvfp4(parts: Parts, asked: Nvfp4) -> tuple[Nvfp4, Parts, Any]:
    """Return it as NVFP4."""
    source, scratch = Mxfp4(), Scratch()
    target = asked.settled([asked.survey_of(source, parts, CPU, scratch)])
    outputs = arrays(target, source.extent(parts))
    return target, outputs, transcode(source, target, parts, outputs, codecs=CPU, scratch=scratch)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("exponents", [[0], [-17, 0], [-3, 14, 5], [-127, -126, -120], [104, 120, 121]])
def test_mxfp4_keeps_its_codes(layout: Any, exponents: list[int]) -> None:
    """Exponents 17 apart, and at both ends: the same codes, the same values, and nothing to report."""
    parts = mxfp4_of(exponents, zeros=1)
    target, outputs, figures = as_nvfp4(parts, Nvfp4(layout=layout))
    assert figures is None
    assert np.array_equal(outputs[target.main], parts["weight_packed"])
    assert np.array_equal(values(target, outputs), values(Mxfp4(), parts))
    assert np.log2(outputs[target.streamed[2]]).item() % 1 == 0


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_exponents_too_far_apart(layout: Any) -> None:
    """18 apart is refused with both ends; where rounding is allowed, only blocks below the least scale change."""
    parts = mxfp4_of([-18, 0, -17, -21])
    with pytest.raises(UnsupportedFormat, match=r"at most 17.*found 21, from 2\^-21 to 2\^0.*allow_rounding"):
        as_nvfp4(parts, Nvfp4(layout=layout))
    target, outputs, figures = as_nvfp4(parts, Nvfp4(layout=layout).rounding_allowed())
    before, after = values(Mxfp4(), parts), values(target, outputs)
    assert figures.changed == np.count_nonzero((before != after) & ((before | after) & 0x7FFF != 0))
    assert np.count_nonzero(before[:, :32] != after[:, :32]) > 0
    assert np.array_equal(before[:, 32:96], after[:, 32:96])
    assert figures.count == before.size


def test_zeros_have_no_exponents() -> None:
    """A matrix of zeros has the rule's tensor scale, and stays zeros."""
    parts = mxfp4_of([], zeros=2)
    target, outputs, _ = as_nvfp4(parts, Nvfp4())
    assert not (values(target, outputs) & 0x7FFF).any()


def test_matrices_that_share_a_scale_are_settled_together() -> None:
    """The spread is over all of them; one that is no MXFP4 takes away the closed form from all."""
    near, far = Exponents(-10, 0), Exponents(-17, -16)
    found = Nvfp4().settled([near, None, far])
    assert (found.exponent, found.tensor) == (-8, TensorScale(2.0**-8, divides=False))
    with pytest.raises(UnsupportedFormat, match="found 18"):
        Nvfp4().settled([near, Exponents(-18, -16)])
    with pytest.raises(UnsupportedFormat, match="shares a tensor scale"):
        Nvfp4().settled([near, 3.0])
    mixed = Nvfp4(rounding=True).settled([near, 3.0])
    assert (mixed.exponent, mixed.tensor) == (None, tensor_scale(6.0, divides=False))
    assert not mixed.restates(Mxfp4())


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("largest", [None, 0.0, 1e-45, 1.8e-42])
def test_no_scale_of_inputs_is_zero(layout: Any, largest: float | None) -> None:
    """Engines divide by it: inputs as good as zero have the scale of those that nobody measured."""
    assert Nvfp4(layout=layout).with_inputs(largest).inputs == 1
