"""MXFP4 becomes NVFP4 without rounding, over all exponents; what E4M3 cannot span is counted, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from codec_makers import EACH, MAKERS, from_mxfp4, from_nvfp4
from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.fp4 import ClosedForm, TensorScale, closed_form
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U8, ValueAt, bf16_to_float

Maker = Callable[[], Codecs]
FORMS = pytest.mark.parametrize("divides", [False, True], ids=["multiplies", "divides"])


def every_code(rows: int) -> U8:
    """Return a block of 32 codes a row: all 16, the first half once more."""
    return np.tile(np.arange(0x10, 0x100, 0x22, dtype=np.uint8), (rows, 2))


def restated(codecs: Codecs, codes: U8, scale: U8, form: ClosedForm) -> tuple[U8, U8, int]:
    """Return NVFP4's codes and block scales of MXFP4, and how many halves of blocks were rounded."""
    out, block = np.empty_like(codes), np.empty((len(codes), scale.shape[1] * 2), np.uint8)
    return out, block, codecs.nvfp4.restate(codes, scale, form.exponent, form.tensor, out, block)


@EACH
@FORMS
def test_every_spread_that_e4m3_has(maker: Maker, *, divides: bool) -> None:
    """Whatever the largest exponent, blocks of up to 2^17 less keep codes and values, and zeros the rule's scale."""
    codecs = maker()
    every = [*range(-127, -100), *range(-100, 100, 9), *range(100, 126)]
    for highest in (-127, -5, 125) if maker is MAKERS["triton"] else every:  # an interpreter takes its time
        lowest = max(highest - 17, -127)
        codes = every_code(highest - lowest + 3)
        scale = np.arange(lowest + 127, highest + 128, dtype=np.uint8).reshape(-1, 1)
        scale = np.concatenate([scale, [[0]], [[250]]]).astype(np.uint8)
        codes[-2], codes[-1, :8], codes[-1, 8:] = 0x88, 0x80, 0
        assert codecs.mxfp4.exponents(codes, scale) == (lowest, highest)
        form = closed_form(lowest, highest, divides=divides)
        assert form is not None
        same, block, count = restated(codecs, codes, scale, form)
        assert count == 0
        assert np.array_equal(same, codes)
        assert (block[-2:] == form.tensor.empty).all()
        assert np.array_equal(from_nvfp4(codecs, same, block, form.tensor), from_mxfp4(codecs, codes, scale))


def test_a_spread_of_18_has_no_closed_form() -> None:
    """17 is the most; no tensor scale is below 2^-126, so that it has an inverse."""
    for divides in (False, True):
        assert closed_form(-9, 8, divides=divides) == ClosedForm(0, TensorScale(1.0, divides))
        assert closed_form(-10, 8, divides=divides) is None
        assert closed_form(-127, -110, divides=divides) == (-118, (2.0 ** (118 if divides else -118), divides))
        assert closed_form(-127, -127, divides=divides) == (-126, (2.0 ** (126 if divides else -126), divides))
        assert closed_form(-110, 125, divides=divides) is None


@EACH
def test_blocks_too_small_are_rounded_and_counted(maker: Maker) -> None:
    """Below 2^-9 the least scale stands in: codes are rounded there as ever, half to even, and signs stay."""
    codes, scale = every_code(3), np.array([[127], [127 - 10], [127 - 12]], np.uint8)
    codes[2, 8:] = 0x08  # a half of zeros is none that is rounded
    form = ClosedForm(0, TensorScale(1.0, divides=False))
    out, block, count = restated(maker(), codes, scale, form)
    assert count == 3
    assert block.tolist() == [[0x38, 0x38], [1, 1], [1, 0x38]]
    assert fp4.nibbles(out[1:2])[0, :16].tolist() == [0, 0, 1, 2, 2, 3, 4, 5, 8, 8, 9, 10, 10, 11, 12, 13]
    assert fp4.nibbles(out[2:3])[0, :16].tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 8, 8, 8, 8, 8, 9, 9, 10]
    meant, found = (
        bf16_to_float(values)
        for values in (from_mxfp4(maker(), codes, scale), from_nvfp4(maker(), out, block, form.tensor))
    )
    assert np.array_equal(meant[0], found[0])
    assert np.abs(meant - found).max() <= 2.0**-9 / 2


@EACH
def test_what_cannot_be_restated(maker: Maker) -> None:
    """A block beyond 2^8, a NaN scale and a product beyond BF16 are named where they stand."""
    codes, form = every_code(2), ClosedForm(0, TensorScale(1.0, divides=False))
    said = r"scale 2\^9: expected at most 2\^8 beside a tensor scale of 2\^0 at row 1, column 1 of the scale"
    with pytest.raises(ValueAt, match=said):
        restated(maker(), np.tile(codes, 2), np.array([[127, 135], [127, 136]], np.uint8), form)
    with pytest.raises(ValueAt, match="NaN scale 0xFF at row 1, column 0 of the scale"):
        restated(maker(), codes, np.array([[127], [255]], np.uint8), form)
    with pytest.raises(ValueAt, match="NaN scale 0xFF at row 1, column 0 of the scale"):
        maker().mxfp4.exponents(codes, np.array([[127], [255]], np.uint8))
    with pytest.raises(ValueAt, match=r"overflow: 4 \* .* at row 0, column 6"):
        restated(
            maker(), codes, np.array([[253], [127]], np.uint8), ClosedForm(118, TensorScale(2.0**118, divides=False))
        )


def test_zeros_alone_have_no_exponents() -> None:
    """Codes 0 and 8 alone say nothing of exponents."""
    assert CODECS.mxfp4.exponents(np.full((2, 16), 0x80, np.uint8), np.full((2, 1), 7, np.uint8)) is None
