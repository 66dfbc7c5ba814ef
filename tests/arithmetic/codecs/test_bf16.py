"""Rounding to BF16, and the figures that every codec reports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from k2quant.kernels.codecs import cpu as codecs
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.reference.bf16 import compare, double_to_bf16, valid
from k2quant.kernels.codecs.values import ValueAt, bf16_to_float
from k2quant.kernels.codecs.values import double_to_bf16 as in_numpy


def rounded(values: NDArray[np.float32] | NDArray[np.float16]) -> NDArray[np.uint16]:
    """Return what the codec writes for a row of values."""
    out = np.empty(values.size, np.uint16)
    codecs.bf16.to_bf16(values.reshape(1, -1), out.reshape(1, -1))
    return out


def test_ties_go_to_the_even_neighbour() -> None:
    """Rule 1: a float32 half way between two BF16 values becomes the one with the even last bit."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000, 0x80000000, 1], np.uint32)
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF80, 0x8000, 0x0000]
    assert rounded(bits.view(np.float32)).tolist() == expected


def test_float32_rounds_as_torch_rounds() -> None:
    """Rule 1: a million random finite float32 bit patterns give the bits of torch's own cast."""
    bits = np.random.default_rng(0).integers(0, 0x7F7F8000, 1 << 20, np.uint32)
    bits |= np.random.default_rng(1).integers(0, 2, bits.size, np.uint32) << np.uint32(31)
    expected = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(rounded(bits.view(np.float32)), expected)


def test_every_finite_float16_rounds_as_torch_rounds() -> None:
    """Rule 1: all finite float16 values, subnormal ones too, give the bits of torch's own cast."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(rounded(values), expected)


def test_float64_is_rounded_once_by_the_reference() -> None:
    """Rule 1: by float32 and a second rounding, values a little beside a tie would become its even neighbour."""
    low = np.arange(0x7FFF, 0x8002, dtype=np.uint32)  # a tie, and the float32 values next to it
    ties = (np.arange(0x3F00, 0x4080, dtype=np.uint32)[:, None] << 16 | low).view(np.float32).astype(np.float64)
    beside = (ties[..., None] * (1 + np.arange(-3, 4) * 2.0**-50)).reshape(-1)
    any_bits = np.random.default_rng(0).integers(0, 0x7F00 << 16, 10_000, np.uint32).view(np.float32)
    values = np.concatenate((beside, any_bits.astype(np.float64), [0.0, 1e39, 2.0**-150]))
    values = np.concatenate((values, -values))
    found = double_to_bf16(torch.from_numpy(values)).view(torch.uint16).numpy()
    np.testing.assert_array_equal(found, in_numpy(values))
    assert double_to_bf16(torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-50], dtype=torch.float64)).tolist() == [
        1.0,
        1.0078125,
    ]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0, True),
        (1, True),
        (0x7F7FFFFF, True),
        (0x7F800000, False),
        (0x7FC00000, False),
        (-1, False),
        (-(2**31), False),
    ],
)
def test_scales_are_finite_and_have_no_sign(bits: int, expected: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Rule 6: zero and the largest float32 are scales; infinity, NaN, and -0 are none."""
    assert valid(torch.tensor([1, bits, 1], dtype=torch.int32).view(torch.float32)) is expected


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (math.nan, "non-finite value nan"),
        (-math.inf, "non-finite value -inf"),
        (3.4e38, "overflow: 3.39.*e.38 exceeds bfloat16"),
    ],
)
def test_what_bfloat16_cannot_hold_is_refused_where_it_stands(value: float, what: str) -> None:
    """Rule 6: NaN, infinity and a finite overflow raise an error with row and column."""
    values = np.zeros((3, 5), np.float32)
    values[1, 4] = value
    with pytest.raises(ValueAt, match=f"{what} at row 1, column 4") as caught:
        codecs.bf16.to_bf16(values, np.empty((3, 5), np.uint16))
    assert (caught.value.row, caught.value.column, caught.value.of) == (1, 4, "weight")


def test_a_nan_with_every_bit_set_is_refused() -> None:
    """Rule 6: the NaN whose rounding would carry into the sign is no zero."""
    with pytest.raises(ValueAt, match="nan"):
        rounded(np.array([0x7FFFFFFF], np.uint32).view(np.float32))


def test_figures_count_values_and_not_bits() -> None:
    """Rule 1: -0 equals 0; energy, error and worst are those of the float values."""
    before = np.array([[0x8000, 0x3F80, 0x4000, 0xC040]], np.uint16)  # -0, 1, 2, -3
    after = np.array([[0x0000, 0x3F80, 0x3F80, 0xC080]], np.uint16)  # 0, 1, 1, -4
    assert codecs.bf16.compare(before, after) == Figures(count=4, changed=2, energy=14.0, error=2.0, worst=1.0)


def test_figures_of_nothing_are_nothing() -> None:
    """Rule 1: a tensor without values is as it was, and its worst error is none, in the reference too."""
    none = np.zeros((0, 32), np.uint16)
    assert codecs.bf16.compare(none, none) == Figures(0, 0, 0.0, 0.0, 0.0)
    assert compare(*[torch.zeros((0, 32), dtype=torch.bfloat16)] * 2) == Figures(0, 0, 0.0, 0.0, 0.0)


def test_figures_of_extreme_values_do_not_overflow_or_vanish() -> None:
    """Rule 1: squares are float64, so the largest and the least BF16 values count."""
    least, largest = np.full((1, 3), 1, np.uint16), np.full((1, 3), 0x7F7F, np.uint16)
    assert codecs.bf16.compare(least, least).energy == 3 * 2.0**-266
    assert codecs.bf16.compare(largest, largest).energy == pytest.approx(3 * float(bf16_to_float(largest)[0, 0]) ** 2)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 1300), seed=st.integers(0, 2**32 - 1))
def test_figures_equal_plain_float64_sums(rows: int, columns: int, seed: int) -> None:
    """Rule 1: whatever the row length, the figures are those of numpy, the sums up to float64 rounding."""
    generator = np.random.default_rng(seed)
    before, after = (generator.integers(0, 0x4200, (rows, columns), np.uint16) for _ in range(2))
    a, b = bf16_to_float(before), bf16_to_float(after)
    figures = codecs.bf16.compare(before, after)
    assert (figures.count, figures.changed, figures.worst) == (a.size, (a != b).sum(), abs(a - b).max())
    assert figures.energy == pytest.approx((a.astype(np.float64) ** 2).sum(), rel=1e-12)
    assert figures.error == pytest.approx((abs(a - b).astype(np.float64) ** 2).sum(), rel=1e-12)


def test_figures_of_panels_add_up() -> None:
    """Rule 1: the sum of two figures counts both, and takes the worse of the two worst errors."""
    total = Figures(10, 1, 100.0, 1.0, 0.5) + Figures(10, 0, 900.0, 0.0, 0.0)
    assert total == Figures(20, 1, 1000.0, 1.0, 0.5)
    assert total.sqnr_db == pytest.approx(30.0)
    assert not total.exact
    assert Figures(5, 0, 1.0, 0.0, 0.0).sqnr_db == math.inf


def test_a_nan_in_a_comparison_is_refused() -> None:
    """Rule 6: figures of NaN would mean nothing."""
    before, after = np.zeros((2, 3), np.uint16), np.zeros((2, 3), np.uint16)
    after[1, 2] = 0x7FC0
    with pytest.raises(ValueAt, match=r"non-finite weight 0x7fc0 \(NaN\) at row 1, column 2"):
        codecs.bf16.compare(before, after)
