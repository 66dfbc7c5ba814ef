"""Block FP8: decoding, plain encoding, and the recovery of codes from BF16 weights that came from FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.kernels.codecs import cpu as codecs
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F32, U8, U16, ValueAt, bf16_to_float

FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
BLOCKS = [(128, 128), (1, 128), (3, 5), (1000, 1000)]


def decode(codes: U8, scale: F32, block: tuple[int, int]) -> U16:
    """Return the BF16 bits that the codec writes."""
    out = np.empty(codes.shape, np.uint16)
    codecs.fp8.decode(codes, scale, block, out)
    return out


def encode(weights: U16, block: tuple[int, int]) -> tuple[U8, F32, Figures]:
    """Return codes, scale and figures of the codec."""
    codes = np.empty(weights.shape, np.uint8)
    scale = np.empty((-(-weights.shape[0] // block[0]), -(-weights.shape[1] // block[1])), np.float32)
    return codes, scale, codecs.fp8.encode(weights, block, codes, scale)


def values(codes: U8) -> F32:
    """Return torch's values of e4m3 codes."""
    result: F32 = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    return result


def spread(scale: F32, block: tuple[int, int], shape: tuple[int, ...]) -> F32:
    """Return a scale for each weight."""
    return np.repeat(np.repeat(scale, block[0], 0)[: shape[0]], block[1], 1)[:, : shape[1]]


def bf16(array: F32) -> U16:
    """Return torch's BF16 bits of float32 values."""
    result: U16 = torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.uint16).numpy()
    return result


def gaussian(shape: tuple[int, int], seed: int = 0) -> U16:
    """Return weights N(0, 0.02)."""
    return bf16(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02))


# --- decoding -------------------------------------------------------------------------------------------------------


def test_every_code_times_many_scales_is_rounded_to_float32_and_then_to_bfloat16() -> None:
    """Rule 1: all 254 finite codes, with 4000 scales from subnormal to large, give the bits of torch's float math."""
    scale = np.random.default_rng(0).integers(0, 0x7B000000, 4000, np.uint32).view(np.float32)
    scale[:3] = 0.0, 1.0, 2.0**-149
    codes = np.ascontiguousarray(np.broadcast_to(FINITE, (scale.size, FINITE.size)))
    expected = bf16(values(codes) * scale[:, None])
    np.testing.assert_array_equal(decode(codes, scale[:, None], (1, FINITE.size)), expected)


def test_the_product_is_rounded_twice() -> None:
    """Rule 1: a product just above a tie is first rounded to float32, on the tie, and then to the even BF16."""
    scale = np.array([[0x3F5B6DB7]], np.uint32).view(np.float32)
    codes = np.array([[0x3C, 0x3E, 0x3F]], np.uint8)  # 1.5, 1.75, 1.875
    expected = bf16((values(codes) * scale).astype(np.float32))
    np.testing.assert_array_equal(decode(codes, scale, (1, 3)), expected)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(576, 512), (576, 200), (7, 33), (1, 1)], ids=str)
def test_ragged_edges_use_the_scale_of_their_own_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Rule 1: rows and columns that no block divides, 576 rows among them, take the last, partial block's scale."""
    generator = np.random.default_rng(1)
    codes = generator.choice(FINITE, shape)
    scale = generator.random((-(-shape[0] // block[0]), -(-shape[1] // block[1])), np.float32)
    expected = bf16(values(codes) * spread(scale, block, shape))
    np.testing.assert_array_equal(decode(codes, scale, block), expected)


def test_a_scale_of_zero_gives_zeros_with_their_signs() -> None:
    """Rule 1: scale 0 is valid; a negative code, -0 among them, gives -0."""
    codes = np.array([[0x00, 0x80, 0x7E, 0xFE]], np.uint8)
    assert decode(codes, np.zeros((1, 1), np.float32), (1, 128)).tolist() == [[0, 0x8000, 0, 0x8000]]


@pytest.mark.parametrize(("code", "name"), [(0x7F, "0x7F"), (0xFF, "0xFF")])
def test_a_nan_code_is_refused_where_it_stands(code: int, name: str) -> None:
    """Rule 6: codes 0x7F and 0xFF are NaN, even under the scale 0."""
    codes = np.zeros((200, 150), np.uint8)
    codes[130, 140] = code
    with pytest.raises(ValueAt, match=f"NaN code {name} at row 130, column 140") as caught:
        decode(codes, np.zeros((2, 2), np.float32), (128, 128))
    assert (caught.value.row, caught.value.column, caught.value.of) == (130, 140, "weight")


@pytest.mark.parametrize(
    ("value", "what"),
    [(-0.5, "negative scale -0.5"), (np.nan, "non-finite scale nan"), (np.inf, "non-finite scale inf")],
)
def test_a_bad_scale_is_refused_where_it_stands(value: float, what: str) -> None:
    """Rule 6: a negative, infinite or NaN scale is named with its place in the scale array."""
    scale = np.ones((2, 3), np.float32)
    scale[1, 2] = value
    with pytest.raises(ValueAt, match=f"{what} at row 1, column 2 of the scale") as caught:
        decode(np.zeros((200, 300), np.uint8), scale, (128, 128))
    assert (caught.value.row, caught.value.column, caught.value.of) == (1, 2, "scale")


@pytest.mark.parametrize("scale", [1e36, 7.59e35])
def test_a_product_beyond_bfloat16_is_refused_where_it_stands(scale: float) -> None:
    """Rule 6: overflow of the float32 product, or of its rounding to BF16, is an error."""
    codes = np.zeros((2, 3), np.uint8)
    codes[1, 1] = 0xFE
    with pytest.raises(ValueAt, match=r"overflow: -448 \* .*e\+3. exceeds bfloat16 at row 1, column 1"):
        decode(codes, np.full((1, 1), scale, np.float32), (128, 128))


# --- plain encoding -------------------------------------------------------------------------------------------------


def test_every_bfloat16_value_rounds_as_torch_rounds() -> None:
    """Rule 2: all finite BF16 values against an amax of 448 * 2^e give torch's saturated e4m3 cast of w/scale."""
    for exponent in (-126, -9, -1, 0, 3):
        amax = np.float32(448 * 2.0**exponent)
        bits = np.arange(0x7F80, dtype=np.uint16)
        bits = bits[bf16_to_float(bits) <= amax]
        weights = np.concatenate([bits, bits | np.uint16(0x8000)])[None]
        codes, scale, _ = encode(weights, (1, weights.size))
        assert scale.tolist() == [[amax / np.float32(448)]]
        expected = torch.from_numpy(bf16_to_float(weights) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        np.testing.assert_array_equal(codes, expected.view(torch.uint8).numpy())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(576, 512), (130, 200), (1, 1)], ids=str)
def test_an_ordinary_block_is_divided_by_amax_over_448(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Rule 2: scale = amax/448 in float32, one for each block, ragged ones too; codes = e4m3(w/scale)."""
    weights = gaussian(shape)
    codes, scale, figures = encode(weights, block)
    wide = bf16_to_float(weights)
    rows, columns = scale.shape
    padded = np.pad(abs(wide), ((0, rows * block[0] - shape[0]), (0, columns * block[1] - shape[1])))
    amax = padded.reshape(rows, block[0], columns, block[1]).max((1, 3))
    if shape != (1, 1) and block != (3, 5):  # tiny blocks may lie on the grid by chance
        np.testing.assert_array_equal(scale, amax / np.float32(448))
    quotient = torch.from_numpy(wide / spread(amax / np.float32(448), block, shape))
    expected = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, expected)
    assert figures == codecs.bf16.compare(weights, decode(codes, scale, block)) or figures.changed > 0
    after = bf16_to_float(decode(codes, scale, block))
    assert (figures.count, figures.changed, figures.worst) == (
        wide.size,
        (wide != after).sum(),
        abs(wide - after).max(),
    )


def test_a_block_of_zeros_has_the_scale_one_and_keeps_its_signs() -> None:
    """Rule 2: a zero block is stored as zeros times 1.0; -0 stays -0."""
    weights = np.array([[0, 0x8000, 0]], np.uint16)
    codes, scale, figures = encode(weights, (128, 128))
    assert (codes.tolist(), scale.tolist(), figures.changed) == ([[0, 0x80, 0]], [[1.0]], 0)


def test_the_figures_of_one_panel_do_not_depend_on_the_call() -> None:
    """Rule 2: two calls on one panel give equal figures to the last bit."""
    weights = gaussian((256, 300))
    assert encode(weights, (128, 128))[2] == encode(weights, (128, 128))[2]


@pytest.mark.parametrize(("bits", "name"), [(0x7F80, "inf"), (0xFF80, "inf"), (0x7FC0, "NaN")])
def test_a_non_finite_weight_is_refused_where_it_stands(bits: int, name: str) -> None:
    """Rule 6: NaN and infinity have no code."""
    weights = np.zeros((150, 200), np.uint16)
    weights[129, 131] = bits
    with pytest.raises(ValueAt, match=rf"non-finite weight {bits:#06x} \({name}\) at row 129, column 131"):
        encode(weights, (128, 128))


# --- recovery -------------------------------------------------------------------------------------------------------


def stored(seed: int, columns: int, *, normal: bool = True) -> tuple[U8, F32, U16]:
    """Return random codes with a 448 among them, a random scale, and their BF16 values, as one block of one row."""
    generator = np.random.default_rng(seed)
    codes = generator.choice(FINITE, (1, columns))
    codes[0, generator.integers(columns)] = 0x7E | (generator.integers(2) << 7)
    # Normal products: scale >= 2^-117, for the least code is 2^-9. The upper end keeps 448 * scale finite.
    low, high = (0x05000000, 0x7A000000) if normal else (1, 0x05000000)
    scale = generator.integers(low, high, (1, 1), np.uint32).view(np.float32)
    return codes, scale, decode(codes, scale, (1, columns))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([1, 5, 128, 4000]))
def test_fp8_to_bfloat16_and_back_gives_the_same_codes_and_values(seed: int, columns: int) -> None:
    """Rule 4: whatever the float32 scale, a block whose largest code is 448 comes back code for code."""
    codes, _, weights = stored(seed, columns)
    again, scale, figures = encode(weights, (1, columns))
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(decode(again, scale, (1, columns)), weights)
    assert figures.exact
    assert figures.error == 0


def test_without_recovery_most_blocks_would_change() -> None:
    """Rule 4: amax/448 alone gives other BF16 values for most of these blocks, so the tests above can fail."""
    changed = 0
    for seed in range(100):
        codes, _, weights = stored(seed, 4000)
        plain = (abs(bf16_to_float(weights)).max() / np.float32(448)).reshape(1, 1)
        changed += bool((decode(codes, plain, (1, 4000)) != weights).any())
    assert changed > 50


def test_a_full_ragged_matrix_comes_back() -> None:
    """Rule 4: each block of a 576-row matrix is recovered for itself."""
    generator = np.random.default_rng(3)
    codes = generator.choice(FINITE, (576, 300))
    codes[::128, ::128] = 0x7E
    codes[-1, -1] = 0xFE
    scale = generator.uniform(1e-5, 1e-3, (5, 3)).astype(np.float32)
    weights = decode(codes, scale, (128, 128))
    again, _, figures = encode(weights, (128, 128))
    np.testing.assert_array_equal(again, codes)
    assert figures == codecs.bf16.compare(weights, weights) or figures.exact


@pytest.mark.parametrize("seed", range(12))
def test_the_recovered_scale_is_the_nearest_that_fits(seed: int) -> None:
    """Rule 4: no float32 scale between amax/448 and the recovered one gives all weights, by trying every one."""
    codes, _, weights = stored(seed, 500)
    _, scale, _ = encode(weights, (1, 500))
    plain = int((abs(bf16_to_float(weights)).max() / np.float32(448)).reshape(1).view(np.uint32)[0])
    chosen = int(scale.reshape(-1).view(np.uint32)[0])
    closer = range(plain, chosen, 1 if chosen > plain else -1)
    magnitude, first = np.unique(codes & 0x7F, return_index=True)
    wanted = weights[0, first] & 0x7FFF
    for start in range(0, len(closer), 4096):
        scales = np.array(closer[start : start + 4096], np.uint32).view(np.float32)
        assert not (bf16(values(magnitude) * scales[:, None]) == wanted).all(1).any()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([1, 3, 128]))
def test_subnormal_products_are_recovered_or_rounded_by_the_plain_rule(seed: int, columns: int) -> None:
    """Rule 4: below the normal numbers a block either loses nothing or has the plain scale."""
    _, _, weights = stored(seed, columns, normal=False)
    _, scale, figures = encode(weights, (1, columns))
    amax = abs(bf16_to_float(weights)).max()
    assert figures.exact or scale[0, 0] == amax / np.float32(448)


def test_one_weight_off_the_grid_sends_the_block_to_the_plain_rule() -> None:
    """Rule 4: recovery is all or nothing; a neighbour of one weight has the same code, so two magnitudes share it."""
    _, _, weights = stored(0, 4000)
    weights[0, 17] += 1
    _, scale, figures = encode(weights, (1, 4000))
    assert scale[0, 0] == abs(bf16_to_float(weights)).max() / np.float32(448)
    assert figures.changed > 0


def test_a_weight_that_would_vanish_sends_the_block_to_the_plain_rule() -> None:
    """Rule 4: a weight that is not zero must not have the code 0, however well the others fit."""
    weights = bf16(np.array([[448.0, 1.0, 2.0**-12]], np.float32))
    codes, scale, figures = encode(weights, (1, 3))
    assert (codes.tolist(), scale.tolist(), figures.changed) == ([[0x7E, 0x38, 0]], [[1.0]], 1)
