"""INT4 as a format: which tensors are one, what is refused, and what a config may say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from k2quant.checkpoint.header import TensorEntry
from k2quant.errors import CheckpointError, DtypeMismatch, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Neighbours, Parts
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs import cpu, reference
from k2quant.kernels.codecs.values import U16, bf16_to_float, float_to_bf16


def entry(suffix: str, dtype: str, shape: tuple[int, ...], nbytes: int = 4) -> TensorEntry:
    """Return a tensor of the weight `w`."""
    return TensorEntry(f"w.{suffix}", dtype, shape, "one.safetensors", 0, nbytes)


def beside(**changes: TensorEntry | None) -> Neighbours:
    """Return a whole INT4 weight `[3, 64]` in groups of 32, with changes."""
    tensors = {
        "weight_packed": entry("weight_packed", "I32", (3, 8)),
        "weight_scale": entry("weight_scale", "BF16", (3, 2)),
        "weight_shape": entry("weight_shape", "I32", (2,)),
    } | changes
    return Neighbours("w", {f"w.{suffix}": found for suffix, found in tensors.items() if found}, "what is read")


def recognised(**changes: TensorEntry | None) -> Any:
    """Return what INT4 makes of its main tensor beside these."""
    around = beside(**changes)
    main = around.get("weight_packed")
    assert main is not None
    return Int4.recognise("weight_packed", main, around)


def test_packed_words_with_scales_and_a_shape_are_a_weight() -> None:
    """Eight columns a word; the group is what the scales make it, and dtypes of other tools are kept."""
    found = recognised()
    assert (found.format, found.shape) == (Int4(), (3, 64))
    assert found.suffixes == ("weight_packed", "weight_scale", "weight_shape")
    other = recognised(
        weight_scale=entry("weight_scale", "F16", (3, 1)), weight_shape=entry("weight_shape", "I64", (2,))
    )
    assert other.format == Int4(group=64, scale_dtype="F16", shape_dtype="I64")
    assert recognised(weight_scale=entry("weight_scale", "F32", (3, 64))).format == Int4(group=1, scale_dtype="F32")


def test_what_is_no_packed_int32_is_none() -> None:
    """Another suffix and another dtype belong to others."""
    around = beside()
    assert Int4.recognise("weight", entry("weight", "I32", (3, 8)), around) is None
    assert Int4.recognise("weight_packed", entry("weight_packed", "U8", (3, 8)), around) is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weight_packed": entry("weight_packed", "I32", (24,))}, ShapeMismatch),
        ({"weight_scale": None}, MissingTensor),
        ({"weight_shape": None}, MissingTensor),
        ({"weight_scale": entry("weight_scale", "I32", (3, 2))}, DtypeMismatch),
        ({"weight_shape": entry("weight_shape", "U8", (2,))}, DtypeMismatch),
        ({"weight_scale": entry("weight_scale", "BF16", (6,))}, ShapeMismatch),
        ({"weight_scale": entry("weight_scale", "BF16", (3, 2, 1))}, ShapeMismatch),
        ({"weight_scale": entry("weight_scale", "BF16", (2, 2))}, ShapeMismatch),
        ({"weight_scale": entry("weight_scale", "BF16", (3, 0))}, ShapeMismatch),
        ({"weight_scale": entry("weight_scale", "BF16", (3, 3))}, ShapeMismatch),
        ({"weight_shape": entry("weight_shape", "I32", (3,))}, ShapeMismatch),
        ({"weight_shape": entry("weight_shape", "I32", (1, 2))}, ShapeMismatch),
    ],
)
def test_partners_that_do_not_fit_are_refused(change: dict[str, TensorEntry | None], error: type[Exception]) -> None:
    """Missing, of another dtype, for other rows, for no group or for groups that do not divide the width."""
    with pytest.raises(error):
        recognised(**change)


def test_scales_and_a_shape_belong_to_packed_words() -> None:
    """Beside them they have an owner; alone, or of another name, they have none here."""
    assert Int4.owns("weight_scale", beside())
    assert Int4.owns("weight_shape", beside())
    assert not Int4.owns("weight_scale", beside(weight_packed=None))
    assert not Int4.owns("weight_zero_point", beside())


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_zero_point", "weight_g_idx"])
def test_int4_of_other_tools_is_known_and_refused(suffix: str) -> None:
    """Packed bytes, zero points and reordered columns are named; other suffixes are nobody's here."""
    found = Int4.refusal(suffix, entry(suffix, "U8", (3, 8)), beside())
    assert isinstance(found, UnsupportedFormat)
    assert Int4.refusal("weight_scale", entry("weight_scale", "BF16", (3, 2)), beside()) is None


def test_a_weight_becomes_words_scales_and_a_shape() -> None:
    """`[3, 64]` takes 8 words and 2 scales a row; the shape is written as little-endian integers of its dtype."""
    assert Int4().state((3, 64)) == {
        "weight_packed": TensorSpec("I32", (3, 8)),
        "weight_scale": TensorSpec("BF16", (3, 2)),
        "weight_shape": TensorSpec("I32", (2,)),
    }
    assert Int4().constant((3, 64)) == {"weight_shape": bytes([3, 0, 0, 0, 64, 0, 0, 0])}
    wide = Int4(shape_dtype="I64").constant((3, 320))["weight_shape"]
    assert wide == bytes([3, *[0] * 7, 64, 1, *[0] * 6])


@pytest.mark.parametrize(("group", "width"), [(32, 48), (32, 16), (4, 12), (1, 4)])
def test_a_width_that_group_or_word_does_not_divide_is_refused(group: int, width: int) -> None:
    """A group is whole, and so is a word."""
    with pytest.raises(ShapeMismatch, match=f"a width that {group} divides"):
        Int4(group=group).state((2, width))


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_a_shape_that_says_something_else_is_misread(dtype: str) -> None:
    """Both numbers count, and their signs."""
    kind = Int4(shape_dtype=dtype)
    content = kind.constant((3, 64))["weight_shape"]
    assert kind.misread("weight_shape", content, (3, 64)) is None
    assert kind.misread("weight_shape", content, (3, 65)) == (3, 64)
    assert kind.misread("weight_shape", content, (4, 64)) == (3, 64)
    assert kind.misread("weight_shape", b"\xff" * len(content), (3, 64)) == (-1, -1)


def test_scales_of_another_dtype_are_read_and_not_written() -> None:
    """BF16 is what is written; units, scales and labels say what a weight is in groups of."""
    assert (Int4().unwritable, Int4(scale_dtype="F32").unwritable) == (None, "F32")
    assert (Int4(group=64).unit, Int4(group=64, scale_dtype="F16").scales) == (64, (64, "F16"))
    assert Int4(group=64).label == "int4 group 64"
    assert Int4(grid="compressed-tensors").in_words(3) == "INT4 codes of 3 bits, compressed-tensors"


def test_rounding_takes_over_the_grid_alone() -> None:
    """A weight keeps its group; a format that is no INT4 has no grid to give."""
    asked = Int4(grid="compressed-tensors")
    assert Int4(group=64).rounded_as(asked) == Int4(group=64, grid="compressed-tensors")
    assert Int4(group=64).rounded_as(Bf16()) == Int4(group=64)


def test_a_source_in_other_groups_is_not_rewritten() -> None:
    """Groups of 32 are asked for, on the grid that is named; weights that are no INT4 do not matter."""
    other = entry("weight_packed", "I32", (3, 8))
    assert Int4.asked_for() == Int4()
    assert Int4.asked_for([(Int4(), other), (Bf16(), other)], "compressed-tensors") == Int4(grid="compressed-tensors")
    with pytest.raises(UnsupportedFormat, match="groups of 64"):
        Int4.asked_for([(Int4(group=64), other)])


def test_values_are_counted_eight_to_a_word() -> None:
    """Rows and columns of a panel, and the nibbles in which two of them differ."""
    words = np.array([[0x12345678, 0]], np.int32)
    assert Int4().extent({"weight_packed": words}) == (1, 16)
    other = np.array([[0x12345679, 0x000000F0]], np.int32)
    assert Int4().codes_changed({"weight_packed": words}, {"weight_packed": other}) == 2
    eighth = np.array([[0x12345670, 0]], np.int32)  # the highest bit of a nibble is not the next one's
    assert Int4().codes_changed({"weight_packed": words}, {"weight_packed": eighth}) == 1
    high = np.array([[0x22345678, 0x00100001]], np.int32)
    assert Int4().codes_changed({"weight_packed": high}, {"weight_packed": words}) == 3


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
def test_steps_are_the_scales_as_float32(dtype: Any) -> None:
    """BF16 bits are widened, F16 and F32 are what they are."""
    scale = np.array([[0x3F00]], np.uint16) if dtype is np.uint16 else np.array([[0.5]], dtype)
    steps = Int4().steps({"weight_scale": scale})
    assert steps.dtype == np.float32
    assert steps.tolist() == [[0.5]]


SCHEME: dict[str, Any] = {"num_bits": 4, "symmetric": True, "type": "int", "group_size": 32, "strategy": "group"}


@pytest.mark.parametrize("change", [{"num_bits": 8}, {"symmetric": False}, {"type": "float"}, {"num_bits": None}])
def test_a_config_group_of_another_scheme_is_not_int4(change: dict[str, Any]) -> None:
    """Four bits, symmetric, integers: all three."""
    assert Int4.claims(SCHEME)
    assert not Int4.claims(SCHEME | change)


@pytest.mark.parametrize(
    ("change", "stored"),
    [
        ({}, (Int4(), (3, 64))),
        ({"actorder": None}, (Int4(), (3, 64))),
        ({"actorder": False}, (Int4(), (3, 64))),
        ({"group_size": 64}, (Int4(group=64), (3, 128))),
        ({"strategy": "channel", "group_size": None}, (Int4(group=64), (3, 64))),
        ({"strategy": "channel"}, (Int4(group=64), (3, 64))),
    ],
)
def test_a_config_that_says_what_the_tensors_hold_is_taken(change: dict[str, Any], stored: Any) -> None:
    """Groups of the size that is named, or one a row."""
    Int4.check_config(SCHEME | change, [stored, (Bf16(), (7, 7))])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"strategy": "tensor"}, "strategy"),
        ({"group_size": 64}, "group_size 64"),
        ({"group_size": None}, "group_size None"),
        ({"strategy": "channel"}, "one group a row"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change: dict[str, Any], error: str) -> None:
    """Another size, another strategy."""
    with pytest.raises(CheckpointError, match=error):
        Int4.check_config(SCHEME | change, [(Int4(), (3, 64))])


def test_a_group_size_that_is_not_said_means_groups() -> None:
    """Without a strategy the size counts."""
    block = {key: value for key, value in SCHEME.items() if key != "strategy"}
    Int4.check_config(block, [(Int4(), (3, 64))])
    with pytest.raises(CheckpointError, match="group_size 16"):
        Int4.check_config(block | {"group_size": 16}, [(Int4(), (3, 64))])


def test_only_groups_of_32_with_bf16_scales_are_multiplied() -> None:
    """And whole ones; everything else is told what it lacks."""
    assert Int4.trained
    assert Int4().unrunnable((3, 64)) is None
    assert Int4().unrunnable((2, 48, 64)) is None  # a stack of matrices
    assert Int4().unrunnable((3, 48)) == ("a multiple of 32 columns", (3, 48))
    assert Int4(group=64).unrunnable((3, 64)) is not None
    assert Int4(scale_dtype="F32").unrunnable((3, 64)) is not None


def test_the_config_of_a_release() -> None:
    """Four bits, symmetric, groups of 32, as Kimi-K2.6 says it."""
    group = Int4().config_group()
    assert {key: group[key] for key in SCHEME} == SCHEME
    assert Int4.claims(group)
    block = Int4().config(["model.layers.1.mlp.experts.0.up_proj"], ["lm_head"])
    assert block["config_groups"]["group_0"]["weights"] == group


def on_a_grid() -> U16:
    """Return BF16 bits `[2, 96]` of whole numbers up to 5 in size: codes at a scale of 1, which amax/7 would miss."""
    values = np.resize(np.arange(-5, 6), (2, 96)).astype(np.float32)
    return float_to_bf16(values)


def _filled() -> Parts:
    return {"weight_packed": np.zeros((2, 12), np.int32), "weight_scale": np.zeros((2, 3), np.uint16)}


def test_choosing_and_storing_is_encoding() -> None:
    """A scale for each 32 columns of each row; codes at it are the ones that encoding gives."""
    weights = on_a_grid()
    scales = Int4().choose(weights, cpu.CODECS)
    assert bf16_to_float(scales).tolist() == [[1.0] * 3] * 2
    stored, encoded = _filled(), _filled()
    figures = Int4().store(weights, scales, stored, cpu.CODECS)
    assert figures == Int4().encode(weights, encoded, cpu.CODECS)
    assert all((stored[suffix] == encoded[suffix]).all() for suffix in stored)
    out = np.zeros_like(weights)
    Int4().decode(stored, out, cpu.CODECS)
    assert out.tolist() == weights.tolist()


def test_training_stores_the_scales_of_plain_rounding() -> None:
    """Though the weights lie on a grid whose scale could be recovered: the forward pass does not do that either."""
    weights = torch.from_numpy(on_a_grid().view(np.int16)).view(torch.bfloat16)
    stored = Int4().exported(weights, 4)
    plain = reference.plain_int4_scale(weights, "moonshot")
    assert torch.equal(stored["weight_scale"], plain)
    assert not (plain == 1).any()
    assert torch.equal(
        reference.int4_to_bf16(stored["weight_packed"], plain.float(), 32), Int4().fake_quantized(weights, 4)
    )
