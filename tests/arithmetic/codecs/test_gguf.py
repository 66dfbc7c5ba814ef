"""Blocks of GGUF: their bytes, what gguf's own code makes of them, and that the loops do what plain torch does."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codec_makers import gaussian
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.cpu import gguf as blocks
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.reference import gguf as reference
from k2quant.kernels.codecs.values import F32, I32, U8, U16, ValueAt, bf16_to_float, float_to_bf16

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))


def dequantised(data: U8, kind: str) -> F32:
    """Return what gguf's own code says that blocks are."""
    found: F32 = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return found


def random_bytes(rows: int, columns: int, seed: int, most: int = 256) -> U8:
    """Return bytes below a bound."""
    return np.random.default_rng(seed).integers(0, most, (rows, columns), dtype=np.uint8)


def words(pairs: U8) -> I32:
    """Return bytes of two codes as INT4's words."""
    return pairs.view(np.int32)


def of_fp16(rows: int, columns: int, seed: int) -> F32:
    """Return positive values of FP16, subnormal ones among them, as float32."""
    bits = np.random.default_rng(seed).integers(0, 0x7C00, (rows, columns)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float32)


def equal(found: NDArray[Any], other: NDArray[Any]) -> bool:
    """Tell whether BF16 bits are equal, zeros of whatever sign."""
    return bool(((found == other) | ((found | other) & 0x7FFF == 0)).all())


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_a_block_of_q4_0_is_a_scale_and_codes_that_are_half_a_block_apart() -> None:
    """Of the codes 0, 1, 2, ... byte j has the one at j below that at j + 16; the scale 1.5 stands before in FP16."""
    pairs = np.array([[(2 * i % 16) | (2 * i + 1) % 16 << 4 for i in range(8)] + [0xFF] * 8], np.uint8)
    out = np.empty((1, 18), np.uint8)
    blocks.q4_0(words(pairs), np.full((1, 1), 1.5, np.float32), 32, out)
    assert out.tobytes().hex() == "003e" + "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"


def test_a_block_of_mxfp4_is_a_byte_and_codes_that_are_half_a_block_apart() -> None:
    """The same codes with the byte 0x7F before them."""
    pairs = np.array([[(2 * i % 16) | (2 * i + 1) % 16 << 4 for i in range(8)] + [0xEE] * 8], np.uint8)
    out = np.empty((1, 17), np.uint8)
    blocks.mxfp4(pairs, np.full((1, 1), 0x7F, np.uint8), out)
    assert out.tobytes().hex() == "7f" + "e0e1e2e3e4e5e6e7e8e9eaebecedeeef"


def test_a_block_of_nvfp4_is_four_scales_and_four_times_codes_that_are_eight_apart() -> None:
    """Of each 16 codes byte j has the one at j below that at j + 8."""
    pairs = np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4], np.uint8)
    out = np.empty((1, 36), np.uint8)
    blocks.nvfp4(pairs, np.array([[0x38, 0x39, 0x3A, 0x3B]], np.uint8), out)
    assert out.tobytes().hex() == "38393a3b" + "8091a2b3c4d5e6f7" * 4


def test_a_block_of_q8_0_is_a_scale_and_32_codes() -> None:
    """The largest weight is 127 of what it is divided by; halves are rounded away from zero, as C's roundf does."""
    weights = float_to_bf16(np.array([[127, -127, 2.5, -2.5, 0.25, 1, 0, 64] + [0] * 24], np.float32))
    out = np.empty((1, 34), np.uint8)
    figures = blocks.q8_0(weights, out)
    assert out.tobytes().hex() == "003c" + "7f8103fd00010040" + "00" * 24
    assert (figures.changed, figures.worst) == (3, 0.5)


# --- gguf's own code ------------------------------------------------------------------------------------------------


@given(shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_q4_0_means_what_int4_means(shape: tuple[int, int], seed: int) -> None:
    """For all codes and all scales of FP16 gguf finds code * scale, and rounded to BF16 that is what we decode."""
    rows, count = shape
    pairs, scale = random_bytes(rows, 16 * count, seed), of_fp16(rows, count, seed)
    out, ours = np.empty((rows, 18 * count), np.uint8), np.empty((rows, 32 * count), np.uint16)
    blocks.q4_0(words(pairs), scale, 32, out)
    found = dequantised(out, "Q4_0")
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1).astype(np.float32) - 8
    assert np.array_equal(found, codes * np.repeat(scale, 32, 1))
    CODECS.int4.decode(words(pairs), scale, 32, ours)
    assert equal(float_to_bf16(found), ours)


@given(shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_mxfp4_means_the_same_in_both_layouts(shape: tuple[int, int], seed: int) -> None:
    """For all codes, at all scales that fit BF16."""
    rows, count = shape
    pairs, scale = random_bytes(rows, 16 * count, seed), random_bytes(rows, count, seed, 252)
    out, ours = np.empty((rows, 17 * count), np.uint8), np.empty((rows, 32 * count), np.uint16)
    blocks.mxfp4(pairs, scale, out)
    CODECS.mxfp4.decode(pairs, scale, ours)
    assert equal(float_to_bf16(dequantised(out, "MXFP4")), ours)


@given(shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_nvfp4_means_the_same_in_both_layouts(shape: tuple[int, int], seed: int) -> None:
    """For all codes and scales of blocks; the scale of the whole, here 1, stands elsewhere."""
    rows, count = shape
    pairs, scale = random_bytes(rows, 32 * count, seed), random_bytes(rows, 4 * count, seed, 0x7F)
    out, ours = np.empty((rows, 36 * count), np.uint8), np.empty((rows, 64 * count), np.uint16)
    blocks.nvfp4(pairs, scale, out)
    CODECS.nvfp4.decode(pairs, scale, TensorScale(1.0, divides=False), ours)
    assert equal(float_to_bf16(dequantised(out, "NVFP4")), ours)


@given(shapes, seeds, st.integers(-100, 0))
@settings(max_examples=30, deadline=None)
def test_q8_0_is_rounded_as_gguf_rounds(shape: tuple[int, int], seed: int, power: int) -> None:
    """Blocks of weights of all sizes that BF16 has, zeros among them, are those of gguf's own quantiser."""
    rows, count = shape
    weights = gaussian(rows, 32 * count, seed, sigma=2.0**power)
    weights[0, :32] = 0
    out = np.empty((rows, 34 * count), np.uint8)
    blocks.q8_0(weights, out)
    theirs = gguf.quants.quantize(bf16_to_float(weights), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(out, theirs)


def test_figures_of_q8_0_are_those_of_what_gguf_reads() -> None:
    """Rounding is measured on what the blocks decode to, as BF16 has it."""
    weights = gaussian(4, 128)
    out = np.empty((4, 136), np.uint8)
    figures = blocks.q8_0(weights, out)
    after = float_to_bf16(dequantised(out, "Q8_0"))
    assert figures == CODECS.floats.compare(weights, after)


# --- plain torch ----------------------------------------------------------------------------------------------------


@given(shapes, seeds, st.sampled_from([32, 64, 128]))
@settings(max_examples=30, deadline=None)
def test_loops_do_what_plain_torch_does(shape: tuple[int, int], seed: int, group: int) -> None:
    """All four types, and Q4_0 with scales for one, two and four blocks, have the same bits by both."""
    rows, count = shape[0], 4 * shape[1]
    pairs = random_bytes(rows, 16 * count, seed)
    scale, one, four = of_fp16(rows, 32 * count // group, seed), *(random_bytes(rows, n * count, seed) for n in (1, 2))
    weights, there = tiny(rows, count, seed), torch.from_numpy
    made = [np.empty((rows, size * count), np.uint8) for size in (18, 17, 18, 34)]
    blocks.q4_0(words(pairs), scale, group, made[0])
    blocks.mxfp4(pairs, one, made[1])
    blocks.nvfp4(pairs, four, made[2])
    blocks.q8_0(weights, made[3])
    plain = (
        reference.q4_0(there(words(pairs)), there(scale), group),
        reference.mxfp4(there(pairs), there(one)),
        reference.nvfp4(there(pairs), there(four)),
        reference.q8_0(there(weights).view(torch.bfloat16)),
    )
    for found, expected in zip(made, plain, strict=True):
        assert np.array_equal(found, expected.numpy())


def tiny(rows: int, count: int, seed: int) -> U16:
    """Return weights of all sizes, blocks of the smallest among them."""
    weights = gaussian(rows, 32 * count, seed)
    weights[0, :32] = np.arange(32)
    return weights


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("bits", [0x36FFFFFF & ~0x1FFF, 0x33000000, 0x477FF000, 0x7F7FFFFF, 0x3F801000])
def test_a_scale_that_fp16_does_not_have_is_named(bits: int, place: tuple[int, int]) -> None:
    """Too small for a subnormal's last bit, too large, or with too many bits, anywhere: none of them is rounded."""
    scale = np.ones((2, 3), np.float32)
    scale[place] = np.uint32(bits).view(np.float32)
    assert blocks.no_half(scale) == place
    out = np.empty((2, 54), np.uint8)
    with pytest.raises(ValueAt, match=rf"FP16 does not have, .* at row {place[0]}, column {place[1]} of the scale"):
        blocks.q4_0(np.zeros((2, 12), np.int32), scale, 32, out)


def test_all_scales_of_bf16_from_two_to_the_minus_17_to_65504_are_values_of_fp16() -> None:
    """These, zero, and powers of two down to 2^-24 with as many bits as are left; no other of BF16's."""
    bits = np.arange(0x7F80, dtype=np.uint16)
    values = bf16_to_float(bits)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32) == values
    found = np.array([blocks.no_half(value.reshape(1, 1)) is None for value in values])
    assert np.array_equal(found, expected)
    plainly = np.array([blocks.are_plainly_halves(bit.reshape(1, 1)) for bit in np.arange(2**16, dtype=np.uint16)])
    assert not (plainly[:0x7F80] & ~expected).any()
    assert not plainly[0x7F80:].any()
    assert plainly[:0x7F80].sum() == np.count_nonzero((values >= 2.0**-17) & (values <= 65504))
    assert found[(values >= 2.0**-17) & (values <= 65504)].all()


@pytest.mark.parametrize("bad", [-1.0, -0.0, np.nan, np.inf])
def test_a_scale_that_no_weight_can_have_is_named_as_ever(bad: float) -> None:
    """As decoding would name it."""
    scale = np.array([[1.0, bad]], np.float32)
    with pytest.raises(ValueAt, match="row 0, column 1 of the scale"):
        blocks.q4_0(np.zeros((1, 8), np.int32), scale, 32, np.empty((1, 36), np.uint8))


@pytest.mark.parametrize(("bits", "what"), [(0x7F80, "inf"), (0x7FC0, "NaN"), (0x7F00, "Q8_0 has no scale")])
def test_a_weight_that_q8_0_cannot_carry_is_named(bits: int, what: str) -> None:
    """What is not finite, and what FP16 has no scale for."""
    weights = gaussian(2, 64)
    weights[1, 40] = bits
    with pytest.raises(ValueAt, match=rf"{what}.*row 1, column 40"):
        blocks.q8_0(weights, np.empty((2, 68), np.uint8))
