"""The bytes of FP4 as they stand in a file, in memory, and what verify thinks of bytes that are not quite so."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.errors import BadValue, DtypeMismatch, ShapeMismatch, UsageError
from k2quant.formats.dtypes import DTYPES
from k2quant.formats.format import Format, Parts
from k2quant.formats.mxfp4 import Mxfp4
from k2quant.formats.nvfp4 import Nvfp4
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import U16, float_to_bf16

BASE = "model.layers.1.mlp.experts.0.up_proj"
EVERY = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
"""Sixteen columns that are codes at the scale 1."""
ROW = np.array([[*EVERY, *(value / 4 for value in EVERY)]], np.float32)
CPU = codecs("cpu")

GOLDEN: dict[tuple[str, str | None], dict[str, tuple[str, list[int], bytes]]] = {
    ("nvfp4", None): {
        "weight": ("U8", [1, 16], bytes.fromhex("10325476a9cbed0f" * 2)),
        "weight_scale": ("F8_E4M3", [1, 2], b"\x7e\x6e"),  # 448 and 112
        "weight_scale_2": ("F32", [], bytes.fromhex("2549123b")),  # 6 / 2688
    },
    ("nvfp4", "compressed-tensors"): {
        "weight_packed": ("U8", [1, 16], bytes.fromhex("10325476a9cbed0f" * 2)),
        "weight_scale": ("F8_E4M3", [1, 2], b"\x7e\x6e"),
        "weight_global_scale": ("F32", [1], struct.pack("<f", 448)),
    },
    ("mxfp4", None): {
        "weight_packed": ("U8", [1, 16], bytes.fromhex("10325476a9cbed0f001021328899aa0b")),  # ties to the even code
        "weight_scale": ("U8", [1, 1], b"\x7f"),  # 2^0
    },
}
"""By hand: bit 3 is the sign, the even column stands in the low nibble."""


@pytest.mark.parametrize(("to", "layout"), GOLDEN)
def test_golden_bytes(written: Any, tmp_path: Path, to: Any, layout: Any) -> None:
    """What a conversion writes of a row that was worked out by hand: names, dtypes, shapes and bytes."""
    source = written({f"{BASE}.weight": ("F32", ROW)})
    made = open_checkpoint(k2quant.convert(source, tmp_path / "out", to=to, layout=layout).folder)
    found = {each.name: (each.dtype, list(each.shape), read_tensor(made, each)) for each in made.tensors.values()}
    assert found == {f"{BASE}.{suffix}": part for suffix, part in GOLDEN[to, layout].items()}


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(("to", "layout"), GOLDEN)
def test_a_tensor_in_memory_has_the_same_bytes(to: Any, layout: Any, library: Any) -> None:
    """`quantize` gives what a file would hold, and `dequantize` what it means, in the library of the weight."""
    found = k2quant.quantize(library(ROW), to, layout=layout)
    tensors = found.tensors(BASE)
    assert all(isinstance(each, type(library(ROW))) for each in tensors.values())
    bits = {name: each if library is np.asarray else each.view(-1).view(torch.uint8) for name, each in tensors.items()}
    assert {name: np.asarray(each).tobytes() for name, each in bits.items()} == {
        f"{BASE}.{suffix}": content for suffix, (_, _, content) in GOLDEN[to, layout].items()
    }
    assert [list(each.shape) for each in tensors.values()] == [shape for _, shape, _ in GOLDEN[to, layout].values()]
    if to == "nvfp4":
        values = k2quant.dequantize(found)
        assert np.array_equal(np.asarray(values if library is np.asarray else values.view(torch.uint16)), bf16(ROW))


def bf16(values: Any) -> U16:
    """Return BF16 bits."""
    return float_to_bf16(np.asarray(values, np.float32))


def test_what_memory_refuses() -> None:
    """A layout that the format lacks, a width, a value, a scale of the tensor too few, and one of no use."""
    with pytest.raises(UsageError, match="layout of mxfp4"):
        k2quant.quantize(ROW, "mxfp4", layout="modelopt")
    with pytest.raises(ShapeMismatch, match=r"cannot be NVFP4.*16 divides"):
        k2quant.quantize(np.ones((1, 24), np.float32), "nvfp4")
    with pytest.raises(ShapeMismatch, match=r"cannot be MXFP4.*32 divides"):
        k2quant.quantize(np.ones((1, 16), np.float32), "mxfp4")
    with pytest.raises(BadValue, match="row 0, column 3"):
        k2quant.quantize(np.array([[0.0, 1, 2, np.nan] * 4], np.float32), "nvfp4")
    found = k2quant.quantize(ROW, "nvfp4")
    with pytest.raises(ShapeMismatch, match="expected weight_scale_2, found none"):
        k2quant.dequantize(type(found)(found.format, found.codes, found.scale, found.shape))
    other = k2quant.quantize(ROW, "mxfp4")
    with pytest.raises(ShapeMismatch, match="expected none, found one"):
        k2quant.dequantize(type(other)(other.format, other.codes, other.scale, other.shape, found.tensor_scale))
    with pytest.raises(DtypeMismatch, match="weight_scale_2"):
        k2quant.dequantize(type(found)(found.format, found.codes, found.scale, found.shape, np.ones((), np.float64)))
    with pytest.raises(BadValue, match="tensor scale"):
        k2quant.dequantize(type(found)(found.format, found.codes, found.scale, found.shape, np.zeros((), np.float32)))


# --- what verify allows -----------------------------------------------------------------------------------------------


def weights(spread: int) -> U16:
    """Return BF16 `[64, 1024]` of heavy tails, in groups that are up to so many powers of two apart."""
    dice = np.random.default_rng(spread)
    powers = np.exp2(-dice.integers(0, spread + 1, (64, 32))).repeat(32, 1)
    return bf16(dice.standard_t(4, (64, 1024)) * 0.02 * powers)


def stored_as(asked: Format, before: U16, how: str) -> tuple[Format, Parts]:
    """Return weights in a format, rounded by its rule or at searched scales."""
    settled = asked.settled([asked.survey(before, CPU)])
    state = settled.state(before.shape)
    parts = {each: np.zeros(state[each].shape, DTYPES[state[each].dtype].numpy) for each in settled.streamed}
    scales = settled.choose(before, CPU) if how == "rtn" else settled.search(before, None, CPU)
    settled.store(before, scales, parts, CPU)
    return settled, parts


def outside(stored: Format, before: U16, parts: Parts) -> float:
    """Return the share of weights that rounding does not explain."""
    after = np.empty_like(before)
    stored.decode(parts, after, CPU)
    return stored.outside(before, after, parts) / before.size


FORMATS = [Nvfp4(), Nvfp4(layout="compressed-tensors"), Mxfp4()]


@pytest.mark.parametrize("how", ["rtn", "mse"])
@pytest.mark.parametrize("spread", [0, 8, 40])
@pytest.mark.parametrize("asked", FORMATS, ids=lambda each: each.label)
def test_what_was_rounded_is_explained(asked: Format, spread: int, how: str) -> None:
    """By the rule and at searched scales, down to where scales have no bits left."""
    before = weights(spread)
    stored, parts = stored_as(asked, before, how)
    assert outside(stored, before, parts) == 0


@pytest.mark.parametrize("asked", FORMATS[:2], ids=lambda each: each.label)
def test_weights_far_below_the_tensor_scale_are_explained(asked: Format) -> None:
    """What one weight of 1e30 leaves of those of 1e-37 is zeros, though no quotient of theirs is above zero."""
    before = float_to_bf16(np.full((2, 32), 1e-37, np.float32))
    before[0, 0] = float_to_bf16(np.array([1e30], np.float32))[0]
    stored, parts = stored_as(asked, before, "rtn")
    assert outside(stored, before, parts) == 0


@pytest.mark.parametrize("asked", FORMATS[:2], ids=lambda each: each.label)
def test_a_scale_of_zero_excuses_nothing(asked: Format) -> None:
    """A block of weights five times the least scale is no block of zeros."""
    before = float_to_bf16(np.full((1, 32), 5 * 2.0**-9, np.float32))
    before[0, 0] = float_to_bf16(np.array([2688], np.float32))[0]
    stored, parts = stored_as(asked, before, "rtn")
    assert outside(stored, before, parts) == 0
    parts["weight_scale"][0, 1] = 0
    assert outside(stored, before, parts) == 0.5


@pytest.mark.parametrize("how", ["rtn", "mse"])
@pytest.mark.parametrize("asked", FORMATS, ids=lambda each: each.label)
def test_a_code_one_step_off_is_seen(asked: Format, how: str) -> None:
    """Nearly all of them: only a weight in the middle between two codes has both."""
    before = weights(3)
    stored, parts = stored_as(asked, before, how)
    codes = parts[stored.main]
    low = codes & 7
    parts[stored.main] = (codes & 0xF8) | np.where(low > 0, low - 1, low + 1).astype(np.uint8)
    assert outside(stored, before, parts) > 0.48  # every other column


@pytest.mark.parametrize(("step", "least"), [(1, 0.12), (-1, 0.12)])
@pytest.mark.parametrize("asked", FORMATS, ids=lambda each: each.label)
def test_a_block_scale_one_step_off_is_seen(asked: Format, step: int, least: float) -> None:
    """An eighth more or less of a step moves some weights of nearly every block to another code; a double one most."""
    before = weights(3)
    stored, parts = stored_as(asked, before, "rtn")
    limit = 126 if asked.surveyed else 254
    parts["weight_scale"] = np.clip(parts["weight_scale"].astype(int) + step, 0, limit).astype(np.uint8)
    assert outside(stored, before, parts) > least


@pytest.mark.parametrize("asked", FORMATS, ids=lambda each: each.label)
def test_scales_that_are_too_large_excuse_nothing(asked: Format) -> None:
    """Codes that were rounded well, at scales four times too large, are far from what the format can do."""
    before = weights(3)
    stored, parts = stored_as(asked, before, "rtn")
    scales = parts["weight_scale"].astype(int) + (16 if asked.surveyed else 3)
    parts["weight_scale"] = np.minimum(scales, 126 if asked.surveyed else 254).astype(np.uint8)
    stored.store(before, parts["weight_scale"].copy(), parts, CPU)
    assert outside(stored, before, parts) > 0.2


@pytest.mark.parametrize("asked", FORMATS, ids=lambda each: each.label)
def test_scales_that_are_too_small_cut_nothing_off(asked: Format) -> None:
    """A quarter of the scale cuts the largest weights off, which no rule does."""
    before = weights(3)
    stored, parts = stored_as(asked, before, "rtn")
    scales = parts["weight_scale"].astype(int) - (16 if asked.surveyed else 2)
    parts["weight_scale"] = np.maximum(scales, 1).astype(np.uint8)
    stored.store(before, parts["weight_scale"].copy(), parts, CPU)
    assert outside(stored, before, parts) > 0.1


def test_changed_codes_are_counted_one_by_one() -> None:
    """Two codes to a byte: each nibble that differs counts."""
    stored, parts = stored_as(Mxfp4(), weights(0), "rtn")
    other = {name: each.copy() for name, each in parts.items()}
    other["weight_packed"][0, :2] ^= np.array([0x11, 0x10], np.uint8)
    assert stored.codes_changed(parts, other) == 3
