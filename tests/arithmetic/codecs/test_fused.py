"""Fused pairs of codecs: the same bits, figures and errors as the two steps through BF16."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from k2quant.kernels.codecs import cpu as codecs
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import ValueAt, bf16_to_float, float_to_bf16

BLOCKS = pytest.mark.parametrize("block", [(128, 128), (1, 128), (7, 13), (1000, 1000)], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(256, 512), (576, 224), (3, 32)], ids=str)


def fp8(shape: tuple[int, int], block: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return random finite codes and scales."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 0x7F, shape, np.uint8) | (generator.integers(0, 2, shape, np.uint8) << np.uint8(7))
    scale = generator.random((-(-shape[0] // block[0]), -(-shape[1] // block[1])), np.float32) * np.float32(1e-3)
    return codes, scale


@SHAPES
@BLOCKS
@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
def test_fp8_to_int4_is_two_steps_in_one(shape: tuple[int, int], block: tuple[int, int], grid: Grid) -> None:
    """Rule 5: words, scales and figures equal those of FP8 to BF16 to INT4."""
    codes, scale = fp8(shape, block)
    pivot = np.empty(shape, np.uint16)
    codecs.fp8.decode(codes, scale, block, pivot)
    packed, scales = (
        np.empty((2, shape[0], shape[1] // 8), np.int32),
        np.empty((2, shape[0], shape[1] // 32), np.uint16),
    )
    fused = codecs.fused.fp8_to_int4(codes, scale, block, grid, packed[0], scales[0])
    assert fused == codecs.int4.encode(pivot, grid, packed[1], scales[1])
    np.testing.assert_array_equal(packed[0], packed[1])
    np.testing.assert_array_equal(scales[0], scales[1])


@SHAPES
@BLOCKS
@pytest.mark.parametrize("group", [1, 16, 32])
def test_int4_to_fp8_is_two_steps_in_one(shape: tuple[int, int], block: tuple[int, int], group: int) -> None:
    """Rule 5: codes, scales and figures equal those of INT4 to BF16 to FP8."""
    generator = np.random.default_rng(1)
    packed = generator.integers(-(2**31), 2**31, (shape[0], shape[1] // 8)).astype(np.int32)
    scale = generator.random((shape[0], shape[1] // group), np.float32)
    pivot = np.empty(shape, np.uint16)
    codecs.int4.decode(packed, scale, group, pivot)
    codes = np.empty((2, *shape), np.uint8)
    scales = np.empty((2, -(-shape[0] // block[0]), -(-shape[1] // block[1])), np.float32)
    fused = codecs.fused.int4_to_fp8(packed, scale, group, block, codes[0], scales[0])
    assert fused == codecs.fp8.encode(pivot, block, codes[1], scales[1])
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(scales[0], scales[1])


def test_a_panel_of_whole_blocks_gives_the_bits_of_the_whole() -> None:
    """Rule 5: calls on ranges of 128 rows write what one call writes; their figures add up to the same counts."""
    weights = float_to_bf16(np.random.default_rng(2).standard_normal((300, 256), np.float32))
    codes, scale = np.empty((2, 300, 256), np.uint8), np.empty((2, 3, 2), np.float32)
    whole = codecs.fp8.encode(weights, (128, 128), codes[0], scale[0])
    first = codecs.fp8.encode(weights[:128], (128, 128), codes[1, :128], scale[1, :1])
    total = first + codecs.fp8.encode(weights[128:], (128, 128), codes[1, 128:], scale[1, 1:])
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(scale[0], scale[1])
    assert (total.count, total.changed, total.worst) == (whole.count, whole.changed, whole.worst)
    assert total.error == pytest.approx(whole.error, rel=1e-12)


def test_read_only_input_is_accepted_and_left_alone() -> None:
    """Rule 5: inputs may be views of a mapped file."""
    weights = float_to_bf16(np.random.default_rng(3).standard_normal((4, 64), np.float32))
    before = weights.copy()
    weights.flags.writeable = False
    packed, scale = np.empty((4, 8), np.int32), np.empty((4, 2), np.uint16)
    codecs.int4.encode(weights, "moonshot", packed, scale)
    np.testing.assert_array_equal(weights, before)


def test_fp8_to_int4_names_a_bad_code_and_a_bad_scale() -> None:
    """Rule 6: the fused path finds what the first step would find, at the same place."""
    codes, scale = fp8((130, 64), (128, 128))
    packed, scales = np.empty((130, 8), np.int32), np.empty((130, 2), np.uint16)
    codes[129, 63] = 0xFF
    with pytest.raises(ValueAt, match=r"NaN code 0xFF at row 129, column 63"):
        codecs.fused.fp8_to_int4(codes, scale, (128, 128), "moonshot", packed, scales)
    scale[1, 0] = np.inf
    with pytest.raises(ValueAt, match=r"non-finite scale inf at row 1, column 0 of the scale"):
        codecs.fused.fp8_to_int4(codes, scale, (128, 128), "moonshot", packed, scales)


def test_fp8_to_int4_names_a_weight_that_would_become_infinite() -> None:
    """Rule 6: an INT4 value beyond BF16 is refused in the fused path as in the second step."""
    codes, scale = np.full((2, 32), 0x7E, np.uint8), bf16_to_float(np.array([[0x7F7F]], np.uint16)) / np.float32(448)
    packed, scales = np.empty((2, 4), np.int32), np.empty((2, 1), np.uint16)
    codes[:, 1] = 0x7D
    codes[:, 2] = 0x01
    with pytest.raises(ValueAt, match=r"overflow: .* rounds to an INT4 value"):
        codecs.fused.fp8_to_int4(codes, scale, (128, 128), "moonshot", packed, scales)


def test_int4_to_fp8_names_a_bad_scale() -> None:
    """Rule 6: the fused path finds what the first step would find, at the same place."""
    packed, scale = np.zeros((3, 8), np.int32), np.ones((3, 2), np.float32)
    codes, scales = np.empty((3, 64), np.uint8), np.empty((1, 1), np.float32)
    scale[2, 1] = 1e38
    with pytest.raises(ValueAt, match=r"overflow: -8 \* 1e\+38 exceeds bfloat16 at row 2, column 32"):
        codecs.fused.int4_to_fp8(packed, scale, 32, (128, 128), codes, scales)
    scale[2, 1] = -1
    with pytest.raises(ValueAt, match=r"negative scale -1\.0 at row 2, column 1 of the scale"):
        codecs.fused.int4_to_fp8(packed, scale, 32, (128, 128), codes, scales)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    """Rule 5: a shape that contradicts another is an error before anything is written."""
    with pytest.raises(ValueError, match=r"expected shape \(5, 56\), found \(4, 56\)"):
        codecs.fp8.decode(
            np.zeros((576, 7168), np.uint8), np.ones((4, 56), np.float32), (128, 128), np.empty((576, 7168), np.uint16)
        )
    with pytest.raises(ValueError, match="a multiple of 32 columns, found 40"):
        codecs.int4.encode(
            np.zeros((1, 40), np.uint16), "moonshot", np.empty((1, 5), np.int32), np.empty((1, 1), np.uint16)
        )
