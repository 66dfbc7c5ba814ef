"""What FP4 promises beside its bytes: what comes back after a decoding, in which order codes lie, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import (
    EACH,
    FINITE,
    SWIFT,
    from_mxfp4,
    from_nvfp4,
    gaussian,
    mxfp4_at,
    nvfp4_at,
    room,
    searched_mxfp4,
    searched_nvfp4,
    to_mxfp4,
    to_nvfp4,
    uneven,
)
from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import TensorScale, input_scale, tensor_scale
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U8, U16, ValueAt, bf16_to_float, float_to_bf16

Maker = Callable[[], Codecs]
FORMS = pytest.mark.parametrize("divides", [False, True], ids=["multiplies", "divides"])


def all_scales(largest: int) -> tuple[U8, U8]:
    """Return blocks of all codes up to one, both signs, and 126 E4M3 scales: codes `[126, 8]`, scales `[126, 1]`."""
    codes = np.zeros((126, 16), np.uint8)
    codes[:, 1 : largest + 1] = np.arange(1, largest + 1)
    codes[:, 9 : largest + 9] = np.arange(1, largest + 1) | 8
    packed: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed, np.arange(1, 127, dtype=np.uint8).reshape(-1, 1)


@FORMS
def test_blocks_with_the_largest_code_come_back(*, divides: bool) -> None:
    """NVFP4 -> BF16 -> NVFP4 at the same tensor scale, of every mantissa, where one code is 6: its bytes return."""
    codes, scale = all_scales(7)
    for mantissa in range(0x80):
        amax = float(bf16_to_float(np.array([(0x60 + mantissa) << 7 | mantissa], np.uint16))[0])
        tensor = tensor_scale(amax, divides=divides)
        again = to_nvfp4(CODECS, from_nvfp4(CODECS, codes, scale, tensor), tensor)
        assert np.array_equal(again[1], scale)
        assert np.array_equal(again[0], codes)
        assert again[2].exact


@FORMS
def test_plain_rounding_leaves_a_6(*, divides: bool) -> None:
    """Whatever its largest weight, a block whose E4M3 scale is a normal number has the code 6."""
    amax = np.arange(0x7F00, dtype=np.uint16)
    weights = np.zeros((len(amax), 16), np.uint16)
    weights[:, 11] = amax
    for value in (1.0, 2.0**-100, 2.0**100, 0.0031, 1.7e10):
        codes, scale, _ = to_nvfp4(CODECS, weights[amax < 0x7E00], TensorScale(float(np.float32(value)), divides))
        normal = (scale[:, 0] >= 8) & (scale[:, 0] != (0x20 if divides else 0x38))
        assert normal.sum() > 2000
        assert (fp4.nibbles(codes)[normal, 11] == 7).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sigma=st.floats(-60, 60))
def test_a_matrix_goes_to_bf16_and_back(seed: int, sigma: float) -> None:
    """ModelOpt's layout, all by the plain rule: tensor scale, block scales and codes are found again, 8 becomes 0."""
    weights = gaussian(4, 64, seed, 2.0**sigma)
    tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=False)
    codes, scale, _ = to_nvfp4(CODECS, weights, tensor)
    values = from_nvfp4(CODECS, codes, scale, tensor)
    assert tensor_scale(CODECS.nvfp4.amax(values), divides=False) == tensor
    again = to_nvfp4(CODECS, values, tensor)
    given_codes, found = fp4.nibbles(codes), fp4.nibbles(again[0])
    assert np.array_equal(again[1], scale)
    assert np.array_equal(np.where(given_codes == 8, 0, given_codes), found)


@FORMS
def test_blocks_up_to_code_4_come_back_by_a_search(*, divides: bool) -> None:
    """Where 4 is the largest code, plain rounding loses, and a search finds values that are the same."""
    codes, scale = all_scales(6)
    for mantissa in range(0, 0x80, 5):
        tensor = tensor_scale(float(np.float32(1 + mantissa / 128)), divides=divides)
        values = from_nvfp4(CODECS, codes, scale, tensor)
        found = np.empty_like(scale)
        CODECS.nvfp4.search(values, None, tensor, found)
        assert np.array_equal(from_nvfp4(CODECS, nvfp4_at(CODECS, values, found, tensor), found, tensor), values)
        assert to_nvfp4(CODECS, values, tensor)[2].changed > 0


def test_which_tensor_scales_come_back() -> None:
    """A matrix's tensor scale follows from its decoded values: ModelOpt's always, the other but for six mantissas."""
    lost = {False: 0, True: 0}
    for mantissa in range(0x80):
        weights = np.zeros((1, 16), np.uint16)
        weights[0, 5] = 0x3C00 | mantissa
        for divides in lost:
            tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=divides)
            codes, scale, _ = to_nvfp4(CODECS, weights, tensor)
            assert scale[0, 0] == fp4.float_to_e4m3(np.array([448], np.float32))[0] == 0x7E
            back = from_nvfp4(CODECS, codes, scale, tensor)
            lost[divides] += tensor_scale(CODECS.nvfp4.amax(back), divides=divides) != tensor
    assert lost == {False: 0, True: 6}


@SWIFT
def test_mxfp4_comes_back(maker: Maker) -> None:
    """BF16 -> MXFP4 -> BF16 -> MXFP4 gives the same bytes, for all largest weights, -0 included."""
    amax = np.arange(0, 0x7F60, 7, dtype=np.uint16)  # every mantissa
    below = np.random.default_rng(0).integers(0, 0x10000, (len(amax), 32)).astype(np.uint16)
    weights = np.where((below & 0x7FFF) > amax[:, None], below & 0x8000, below)
    weights[:, 7] = amax
    codes, scale, _ = to_mxfp4(maker(), weights)
    again = to_mxfp4(maker(), from_mxfp4(maker(), codes, scale))
    assert np.array_equal(again[0], codes)
    assert np.array_equal(again[1], scale)
    assert again[2].exact


@SWIFT
def test_mxfp4_of_other_rules_keeps_its_values(maker: Maker) -> None:
    """Whatever the largest code of a block, 0.5 to 6, at every scale: decoded and encoded, it means the same."""
    for largest in range(8):
        codes = np.zeros((253, 32), np.uint8)
        codes[:, : largest + 1] = np.arange(largest + 1)
        codes[:, 16 : largest + 17] = np.arange(largest + 1) | 8
        packed: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
        values = from_mxfp4(maker(), packed, np.arange(253, dtype=np.uint8).reshape(-1, 1))
        again, scale, figures = to_mxfp4(maker(), values)
        assert np.array_equal(from_mxfp4(maker(), again, scale), values)
        assert figures.exact


@SWIFT
@FORMS
def test_codes_grow_with_weights(maker: Maker, *, divides: bool) -> None:
    """At one scale a larger weight never has a lesser code, and a negative one has its magnitude's code, plus 8."""
    positive = FINITE[: len(FINITE) // 2].reshape(-1, 32)
    for value in (1.0, 2.0**-100, 2.0**100):
        tensor = TensorScale(1 / value if divides else value, divides)
        scale = np.full((len(positive), 2), 0x38, np.uint8)
        codes = fp4.nibbles(nvfp4_at(maker(), positive, scale, tensor))
        assert (np.diff(codes.reshape(-1).astype(int)) >= 0).all()
        assert set(codes.reshape(-1).tolist()) == set(range(8))
        mirrored = fp4.nibbles(nvfp4_at(maker(), positive | np.uint16(0x8000), scale, tensor))
        vanishes = bf16_to_float(positive).astype(np.float64) / value <= 2.0**-150  # a tie, to even
        assert np.array_equal(mirrored, np.where(vanishes, codes, codes | 8))


@EACH
def test_signs_of_zeros(maker: Maker) -> None:
    """A weight rounded to zero keeps its sign; -0 has none in NVFP4, as with both tools, and keeps it in MXFP4."""
    weights = np.full((1, 32), 0x3F80, np.uint16)
    weights[0, 1:4] = float_to_bf16(np.array([-0.01, -0.0, 0.0], np.float32))
    codes, _, _ = to_nvfp4(maker(), weights, tensor_scale(1.0, divides=False))
    assert fp4.nibbles(codes)[0, :4].tolist() == [7, 8, 0, 0]
    codes, scale, _ = to_mxfp4(maker(), weights)
    assert fp4.nibbles(codes)[0, :4].tolist() == [6, 8, 8, 0]
    assert from_mxfp4(maker(), codes, scale)[0, :4].tolist() == [0x3F80, 0x8000, 0x8000, 0]


@EACH
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 5), divides=st.booleans(), bottom=st.integers(-140, -1))
def test_devices_agree(maker: Maker, *, seed: int, blocks: int, divides: bool, bottom: int) -> None:
    """Codes, scales and values of random matrices are those of the CPU, and `store` at `choose` is `encode`."""
    weights = uneven(3, 32 * blocks, seed, bottom)
    tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=divides)
    codes, scale, figures = to_nvfp4(maker(), weights, tensor)
    expected = to_nvfp4(CODECS, weights, tensor)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(scale, expected[1])
    assert close(figures, expected[2])
    values = from_nvfp4(maker(), codes, scale, tensor)
    assert np.array_equal(values, from_nvfp4(CODECS, codes, scale, tensor))
    assert np.array_equal(nvfp4_at(maker(), weights, scale, tensor), codes)
    assert close(figures, CODECS.floats.compare(weights, values))
    found = to_mxfp4(maker(), weights)
    assert np.array_equal(found[0], to_mxfp4(CODECS, weights)[0])
    assert np.array_equal(found[1], to_mxfp4(CODECS, weights)[1])
    assert np.array_equal(mxfp4_at(maker(), weights, found[1]), found[0])


def close(one: Figures, other: Figures) -> bool:
    """Return whether figures are the same, but for the order in which sums were added."""
    same = (one.count, one.changed, one.worst) == (other.count, other.changed, other.worst)
    return same and bool(np.isclose([one.energy, one.error], [other.energy, other.error], rtol=1e-9).all())


BAD_NVFP4: list[tuple[int, float, str, str]] = [
    (0x7F, 1.0, "NaN scale 0x7F at row 1, column 2", "scale"),
    (0xFF, 1.0, "NaN scale 0xFF at row 1, column 2", "scale"),
    (0x80, 1.0, "negative scale 0x80 at row 1, column 2", "scale"),
    (0xB8, 1.0, "negative scale 0xB8 at row 1, column 2", "scale"),
    (0x38, float("nan"), "tensor scale nan: expected a finite number", "tensor scale"),
    (0x38, float("inf"), "tensor scale inf: expected a finite number", "tensor scale"),
    (0x38, -1.0, "tensor scale -1.0: expected a finite number", "tensor scale"),
    (0x38, -0.0, "tensor scale -0.0: expected a finite number", "tensor scale"),
]


@EACH
@FORMS
@pytest.mark.parametrize(("bits", "value", "said", "of"), BAD_NVFP4)
def test_bad_scales_of_nvfp4(maker: Maker, *, divides: bool, bits: int, value: float, said: str, of: str) -> None:
    """A block scale that is NaN or has a sign, and a tensor scale that means nothing, are refused where they stand."""
    weights, scale = gaussian(2, 64), np.full((2, 4), 0x38, np.uint8)
    scale[1, 2] = bits
    for act in (
        lambda tensor: from_nvfp4(maker(), np.full((2, 32), 0x11, np.uint8), scale, tensor),
        lambda tensor: nvfp4_at(maker(), weights, scale, tensor),
    ):
        with pytest.raises(ValueAt, match=said) as caught:
            act(TensorScale(value, divides))
        assert caught.value.of == of


@EACH
def test_scales_of_zero(maker: Maker) -> None:
    """A scale of zero means zeros where it is read, and is refused where weights are divided by it; infinity too."""
    codes, scale = np.full((1, 16), 0x77, np.uint8), np.array([[0x38, 0]], np.uint8)
    values = from_nvfp4(maker(), codes, scale, TensorScale(1.0, divides=False))
    assert values[0, :16].all()
    assert not values[0, 16:].any()
    assert not from_nvfp4(maker(), codes, scale, TensorScale(0.0, divides=False)).any()
    weights = gaussian(1, 32)
    with pytest.raises(ValueAt, match=r"a scale of 0 \(0x00 \* 1\) at row 0, column 1 of the scale"):
        nvfp4_at(maker(), weights, scale, TensorScale(1.0, divides=False))
    for value, bits, said in ((1e37, 0x7E, r"inf \(0x7E \* 1e\+37\)"), (2.0**-149, 1, r"0 \(0x01 \* 1.4013e-45\)")):
        with pytest.raises(ValueAt, match=rf"a scale of {said} at row 0, column 1 of the scale"):
            nvfp4_at(maker(), weights, np.array([[0x38, bits]], np.uint8), TensorScale(value, divides=False))
    for divides in (False, True):
        with pytest.raises(ValueAt, match=r"tensor scale 0.0: expected a finite number above 0"):
            to_nvfp4(maker(), weights, TensorScale(0.0, divides))
    with pytest.raises(ValueAt, match=r"tensor scale 0.0"):
        from_nvfp4(maker(), codes, scale, TensorScale(0.0, divides=True))


@EACH
def test_bad_scales_of_mxfp4(maker: Maker) -> None:
    """The byte 255 is NaN, for reading and for writing, whatever the codes."""
    scale = np.full((2, 2), 127, np.uint8)
    scale[1, 1] = 255
    with pytest.raises(ValueAt, match="NaN scale 0xFF at row 1, column 1 of the scale"):
        from_mxfp4(maker(), np.zeros((2, 32), np.uint8), scale)
    with pytest.raises(ValueAt, match="NaN scale 0xFF at row 1, column 1 of the scale"):
        mxfp4_at(maker(), gaussian(2, 64), scale)


@EACH
def test_products_beyond_bf16(maker: Maker) -> None:
    """What BF16 cannot hold is refused where it stands: the product that is read, or the weight that becomes it."""
    codes = np.zeros((2, 16), np.uint8)
    codes[1, 10] = 0x50  # column 21 is 3
    for byte, good in ((126, True), (127, True), (253, True), (254, False)):
        scale = np.array([[127], [byte]], np.uint8)
        if good:
            expected = float_to_bf16(np.array([3 * 2.0 ** (byte - 127)], np.float32))
            assert from_mxfp4(maker(), codes, scale)[1, 21] == expected[0]
        else:
            with pytest.raises(ValueAt, match=r"overflow: 3 \* 1.70141e\+38 exceeds bfloat16 at row 1, column 21"):
                from_mxfp4(maker(), codes, scale)
    with pytest.raises(ValueAt, match=r"overflow: 3 \* .* exceeds bfloat16 at row 1, column 21"):
        from_nvfp4(maker(), codes, np.full((2, 2), 0x7E, np.uint8), TensorScale(2.8e35, divides=False))
    weights = np.zeros((2, 32), np.uint16)
    weights[1, 9] = 0x7F7F
    with pytest.raises(ValueAt, match="rounds to an MXFP4 value that exceeds bfloat16 at row 1, column 9"):
        to_mxfp4(maker(), weights)
    with pytest.raises(ValueAt, match="rounds to an NVFP4 value that exceeds bfloat16 at row 1, column 9"):
        to_nvfp4(maker(), weights, tensor_scale(3.4e38 * 1.004 / 1.01, divides=False)._replace(value=1.3e35))


@EACH
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_weights_that_are_not_finite(maker: Maker, bits: int) -> None:
    """NaN and infinity among weights are named, by all that reads weights."""
    weights = gaussian(2, 64)
    weights[1, 33] = bits
    tensor, codecs = TensorScale(1.0, divides=False), maker()
    acts: list[Callable[[], object]] = [
        lambda: codecs.nvfp4.amax(weights),
        lambda: to_nvfp4(codecs, weights, tensor),
        lambda: codecs.nvfp4.choose(weights, tensor, room(weights, 16)[1]),
        lambda: codecs.nvfp4.search(weights, None, tensor, room(weights, 16)[1]),
        lambda: nvfp4_at(codecs, weights, np.full((2, 4), 0x38, np.uint8), tensor),
        lambda: codecs.nvfp4.weighted_error(weights, np.full((2, 4), 0x38, np.uint8), tensor, None),
        lambda: to_mxfp4(codecs, weights),
        lambda: codecs.mxfp4.choose(weights, room(weights, 32)[1]),
        lambda: codecs.mxfp4.search(weights, None, room(weights, 32)[1]),
        lambda: mxfp4_at(codecs, weights, np.full((2, 2), 127, np.uint8)),
        lambda: codecs.mxfp4.weighted_error(weights, np.full((2, 2), 127, np.uint8), None),
    ]
    for act in acts:
        with pytest.raises(ValueAt, match=r"non-finite weight 0x.* at row 1, column 33"):
            act()


def test_amax_and_tensor_scales() -> None:
    """The largest magnitude counts, of nothing it is 0; zeros have the tensor scale 1.0; what is no amax is refused."""
    assert CODECS.nvfp4.amax(np.empty((0, 16), np.uint16)) == 0.0
    assert CODECS.nvfp4.amax(np.array([[0xC0A0, 0x4080]], np.uint16)) == 5.0
    for divides in (False, True):
        assert tensor_scale(0.0, divides=divides) == TensorScale(1.0, divides)
        assert input_scale(3.0, divides=divides) == tensor_scale(3.0, divides=divides).value
        for bad in (float("nan"), float("inf"), -1.0):
            with pytest.raises(ValueError, match="amax: expected a finite number from 0 up, found"):
                tensor_scale(bad, divides=divides)
    assert input_scale(2688.0, divides=False) == 1.0
    assert tensor_scale(2.0**-133, divides=False).value == 24 * 2.0**-149  # a subnormal, no zero
    assert tensor_scale(2.0**-133, divides=True).value == 1.0


@pytest.mark.parametrize("columns", [8, 24])
def test_ragged_columns(columns: int) -> None:
    """Columns that blocks do not divide are a mistake of the caller."""
    weights: U16 = np.zeros((1, columns), np.uint16)
    with pytest.raises(ValueError, match="columns"):
        to_nvfp4(CODECS, weights, TensorScale(1.0, divides=False))
    with pytest.raises(ValueError, match="columns"):
        to_mxfp4(CODECS, np.zeros((1, columns * 2), np.uint16))


@SWIFT
def test_no_rows(maker: Maker) -> None:
    """A matrix without rows is encoded, decoded, searched and restated to nothing."""
    codecs, weights, tensor = maker(), np.empty((0, 64), np.uint16), TensorScale(1.0, divides=False)
    codes, scale, figures = to_nvfp4(codecs, weights, tensor)
    assert figures == Figures()
    assert from_nvfp4(codecs, codes, scale, tensor).shape == (0, 64)
    assert searched_nvfp4(codecs, weights, tensor).shape == (0, 4)
    codes, scale, figures = to_mxfp4(codecs, weights)
    assert figures == Figures()
    assert from_mxfp4(codecs, codes, scale).shape == (0, 64)
    assert searched_mxfp4(codecs, weights).shape == (0, 2)
    assert codecs.mxfp4.exponents(codes, scale) is None
    assert codecs.nvfp4.restate(codes, scale, 0, tensor, codes, np.empty((0, 4), np.uint8)) == 0
