"""INT4: packing, both grids, the golden slices, Moonshot's recovery, and other widths than 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from k2quant.errors import UsageError
from k2quant.kernels.codecs import cpu as codecs
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import FAKE_BITS, PACKED_BITS, Grid
from k2quant.kernels.codecs.scales.recovery import CANDIDATES, SMALLEST_AMAX
from k2quant.kernels.codecs.values import F32, I32, U16, ValueAt, bf16_to_float, float_to_bf16
from places import DATA

SLICES = json.loads((DATA / "golden_int4_slices.json").read_text())["slices"]
BOTH = pytest.mark.parametrize("golden", SLICES, ids=[golden["grid"] for golden in SLICES])


def encode(weights: U16, grid: Grid = "moonshot", *, recover: bool = True, bits: int = 4) -> tuple[I32, U16, Figures]:
    """Return packed words, scale and figures of the codec."""
    rows, columns = weights.shape
    packed, scale = np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // 32), np.uint16)
    return packed, scale, codecs.int4.encode(weights, grid, packed, scale, recover=recover, bits=bits)


def fake(weights: U16, grid: Grid = "moonshot", *, bits: int = 4) -> U16:
    """Return the BF16 bits of the weights after rounding and back."""
    out = np.empty_like(weights)
    codecs.int4.fake_quantize(weights, grid, out, bits=bits)
    return out


def tensor(weights: U16) -> torch.Tensor:
    """Return BF16 bits as a tensor."""
    return torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16)


def decode(packed: I32, scale: U16 | F32, group: int = 32) -> U16:
    """Return the BF16 bits that the codec writes."""
    out = np.empty((packed.shape[0], packed.shape[1] * 8), np.uint16)
    codecs.int4.decode(packed, bf16_to_float(scale) if scale.dtype == np.uint16 else scale, group, out)  # type: ignore[arg-type]
    return out


def pack(codes: NDArray[Any]) -> I32:
    """Return words of codes -8..7, by torch."""
    words: I32 = reference.pack_int4(torch.from_numpy(codes.astype(np.int32))).numpy()
    return words


def unpack(packed: I32) -> NDArray[np.int8]:
    """Return the codes of words, by torch."""
    codes: NDArray[np.int8] = reference.unpack_int4(torch.from_numpy(packed.copy())).numpy()
    return codes


def hexadecimal(word: np.int32) -> str:
    """Return a word as its bits are written."""
    return f"{int(word) & 0xFFFFFFFF:#010x}"


# --- packing and decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        ([-8, 0, 0, 0, 0, 0, 0, 7], "0xf8888880"),
        ([0] * 8, "0x88888888"),
        ([1, 2, 3, 4, 5, 6, 7, -1], "0x7fedcba9"),
        ([-7, -6, -5, -4, -3, -2, -1, 0], "0x87654321"),
    ],
)
def test_the_lowest_column_lands_in_the_lowest_nibble(codes: list[int], word: str) -> None:
    """Rule 3: column 0 is stored in bits 0-3 of the word, as code + 8; encoder and decoder agree on it."""
    packed = np.array([[int(word, 16)]], np.uint32).view(np.int32)
    decoded = bf16_to_float(decode(packed, np.ones((1, 1), np.float32), 8))
    assert decoded[0].tolist() == codes
    group = np.array([[*codes, 7, *[0] * 23]], np.float32)
    if min(codes) >= -7:
        assert hexadecimal(encode(float_to_bf16(group))[0][0, 0]) == word


def test_words_are_those_of_compressed_tensors() -> None:
    """Rule 3: compressed-tensors reads our words as our codes, and packs those codes to our words."""
    weights = float_to_bf16(np.random.default_rng(0).standard_normal((16, 256), np.float32))
    packed, _, _ = encode(weights)
    codes = unpack_from_int32(torch.from_numpy(packed), 4, torch.Size((16, 256)))
    np.testing.assert_array_equal(codes.numpy(), unpack(packed))
    np.testing.assert_array_equal(pack_to_int32(codes.to(torch.int8), 4).numpy(), packed)


@pytest.mark.parametrize("group", [1, 2, 3, 6, 8, 24, 32, 48, 96], ids=str)
def test_any_group_that_divides_the_columns_decodes(group: int) -> None:
    """Rule 3: bf16(code * scale) for each group size, a single group and odd sizes among them; code 0 gives +0."""
    generator = np.random.default_rng(group)
    codes = generator.integers(-8, 8, (5, 96))
    scale = generator.random((5, 96 // group), np.float32)
    expected = torch.from_numpy(codes.astype(np.float32) * np.repeat(scale, group, 1)).bfloat16()
    np.testing.assert_array_equal(decode(pack(codes), scale, group), expected.view(torch.uint16).numpy())


@pytest.mark.parametrize(
    ("value", "what", "of"),
    [
        (-0.5, "negative scale -0.5 at row 1, column 2 of the scale", "scale"),
        (np.nan, "non-finite scale nan at row 1, column 2 of the scale", "scale"),
        (np.inf, "non-finite scale inf at row 1, column 2 of the scale", "scale"),
        (1e38, r"overflow: -8 \* 1e\+38 exceeds bfloat16 at row 1, column 64", "weight"),
    ],
)
def test_a_bad_scale_is_refused_where_it_stands(value: float, what: str, of: str) -> None:
    """Rule 6: a negative, non-finite or overflowing scale is named with its place."""
    scale = np.ones((2, 4), np.float32)
    scale[1, 2] = value
    with pytest.raises(ValueAt, match=what) as caught:
        decode(np.zeros((2, 16), np.int32), scale)
    assert caught.value.of == of


# --- the two grids --------------------------------------------------------------------------------------------------


@BOTH
def test_golden_slices_encode_bit_for_bit(golden: dict[str, Any]) -> None:
    """Rule 3: real weights of both grids, near-denormal groups among them, give the published words and scales."""
    weights = np.array(golden["weight_bf16_bits"], np.uint16)
    packed, scale, _ = encode(weights, golden["grid"])
    np.testing.assert_array_equal(packed, np.array(golden["weight_packed_int32"], np.int64).astype(np.int32))
    np.testing.assert_array_equal(scale, np.array(golden["weight_scale_bf16_bits"], np.uint16))


def test_the_golden_moonshot_slice_goes_around_unchanged() -> None:
    """Rule 4: published K2.6 words decode to the published BF16 values, and encode to themselves, exactly."""
    golden = SLICES[0]
    packed = np.array(golden["weight_packed_int32"], np.int64).astype(np.int32)
    scale = np.array(golden["weight_scale_bf16_bits"], np.uint16)
    weights = decode(packed, scale)
    np.testing.assert_array_equal(weights, np.array(golden["weight_bf16_bits"], np.uint16))
    again, scales, figures = encode(weights)
    np.testing.assert_array_equal(again, packed)
    np.testing.assert_array_equal(scales, scale)
    assert figures.exact


def test_moonshot_rounds_by_amax_over_seven() -> None:
    """Rule 3: bf16(amax/7), then half to even on w/scale, -7..7; scale and words written out."""
    group = np.zeros((1, 32), np.float32)
    group[0, :8] = 7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.75, 3.25
    packed, scale, figures = encode(float_to_bf16(group))
    assert scale.tolist() == [[0x3F80]]
    assert unpack(packed)[0, :8].tolist() == [7, 0, 2, 2, 0, -2, -7, 3]
    assert hexadecimal(packed[0, 0]) == "0xb168aa8f"
    assert figures == Figures(32, 7, 49 + 0.25 + 2.25 + 6.25 + 0.25 + 2.25 + 45.5625 + 10.5625, 1.375, 0.5)


def test_compressed_tensors_clamps_before_it_rounds() -> None:
    """Rule 3: +7.5 becomes 7 and -7.5 becomes -8, with scale bf16(amax/7.5)."""
    group = np.zeros((1, 32), np.float32)
    group[0, :4] = 7.5, -7.5, 6.5, -6.5
    packed, scale, _ = encode(float_to_bf16(group), "compressed-tensors")
    assert (scale.tolist(), unpack(packed)[0, :4].tolist()) == ([[0x3F80]], [7, -8, 6, -6])


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
def test_a_group_whose_scale_vanishes_is_zero_with_a_finite_scale(grid: Grid) -> None:
    """Rule 3: zeros, and weights so small that the scale underflows, get code 0 and the scale 2^-7."""
    weights = np.zeros((1, 64), np.uint16)
    weights[0, 1] = 0x8000
    weights[0, 32:] = 1
    packed, scale, figures = encode(weights, grid, recover=False)
    assert scale.tolist() == [[0x3C00, 0x3C00]]
    assert [hexadecimal(word) for word in packed[0]] == ["0x88888888"] * 8
    assert (figures.changed, figures.worst) == (32, 2.0**-133)


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
@pytest.mark.parametrize(("bits", "name"), [(0xFF80, "inf"), (0x7FC1, "NaN")])
def test_a_non_finite_weight_is_refused_where_it_stands(grid: Grid, bits: int, name: str) -> None:
    """Rule 6: NaN and infinity have no code on either grid."""
    weights = np.zeros((3, 64), np.uint16)
    weights[2, 40] = bits
    with pytest.raises(ValueAt, match=rf"non-finite weight {bits:#06x} \({name}\) at row 2, column 40"):
        encode(weights, grid)


def test_a_weight_whose_rounding_exceeds_bfloat16_is_refused() -> None:
    """Rule 6: the largest BF16 value would decode to infinity; that is an error, and its neighbour is none."""
    weights = np.zeros((2, 64), np.uint16)
    weights[1, 33], weights[1, 34] = 0x7F7F, 0x0001
    with pytest.raises(ValueAt, match=r"overflow: 3.389\d*e\+38 rounds to .* at row 1, column 33"):
        encode(weights)
    weights[1, 33] = 0x7F70
    encode(weights)


# --- recovery -------------------------------------------------------------------------------------------------------


def all_groups(largest: int) -> tuple[NDArray[np.int64], U16]:
    """Return, for every BF16 scale that fits, a group of all codes up to `largest`, with both signs: codes, scales."""
    scale = np.arange(1, 0x7F80, dtype=np.uint16)
    scale = scale[bf16_to_float(scale) <= np.float32(3.38e38 / 7.1)]
    codes = np.resize(np.concatenate([np.arange(largest, -1, -1), -np.arange(largest + 1)]), 32)
    return np.tile(codes, (scale.size, 1)), scale[:, None]


@pytest.mark.parametrize("largest", range(1, 8))
def test_every_scale_and_largest_code_comes_back(largest: int) -> None:
    """Rule 4: over all BF16 scales, subnormal too: the same values always, codes from 4 up, the scale at 7."""
    codes, scale = all_groups(largest)
    weights = decode(pack(codes), scale)
    packed, scales, figures = encode(weights)
    np.testing.assert_array_equal(decode(packed, scales), weights)
    assert figures.exact
    normal = scale[:, 0] >= 0x80
    if largest >= 4:
        np.testing.assert_array_equal(unpack(packed)[normal], codes[normal])
    if largest == 7:
        np.testing.assert_array_equal(scales[normal], scale[normal])


def test_without_recovery_some_scales_would_change() -> None:
    """Rule 4: section 5.1 alone misses the scale for the 14 known mantissas, so the test above can fail."""
    codes, scale = all_groups(7)
    _, scales, _ = encode(decode(pack(codes), scale), recover=False)
    normal = scale >= 0x80
    missed = {int(bits) & 0x7F for bits in scale[normal & (scales != scale)]}
    assert missed == {20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124}


def by_the_rule(group: U16) -> int:
    """Return the scale's bits of one group as section 5.3 says it, one candidate after the other, 0 for none."""
    magnitude = {bits & 0x7FFF for bits in group.tolist()}
    amax = float(bf16_to_float(np.array([max(magnitude)], np.uint16))[0])
    for k, ulp in CANDIDATES:
        bits = int(float_to_bf16(np.array([np.float32(amax) / np.float32(k)], np.float32))[0]) + ulp
        if amax > 0 and 0 < bits < 0x7F80:
            with np.errstate(over="ignore"):
                products = bf16_to_float(np.full(8, bits, np.uint16)) * np.arange(8, dtype=np.float32)
            if magnitude <= set(float_to_bf16(products.astype(np.float32)).tolist()):
                return bits
    return 0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    base=st.one_of(st.integers(1, 2 * SMALLEST_AMAX), st.integers(1, 0x7E00)),
    kind=st.sampled_from(["on the grid", "one off", "few magnitudes"]),
)
def test_the_table_finds_what_the_rule_finds(seed: int, base: int, kind: str) -> None:
    """Rule 4: for groups on, near and off the grid, subnormal ones too, the scale is the one the plain search finds."""
    generator = np.random.default_rng(seed)
    scale = np.full((16, 1), base, np.uint16)
    weights = decode(pack(generator.integers(-7, 8, (16, 32)).clip(-generator.integers(1, 8), None)), scale)
    if kind == "one off":
        weights[:, 3] += generator.integers(0, 2, 16, np.uint16)
    if kind == "few magnitudes":
        weights = generator.choice(weights[:, :3].reshape(-1) ^ generator.integers(0, 3, 48, np.uint16), (16, 32))
    weights = np.minimum(weights & 0x7FFF, np.uint16(0x7F70)) | (weights & 0x8000)
    _, found, _ = encode(weights)
    _, plain, _ = encode(weights, recover=False)
    expected = [by_the_rule(group) or int(plain[row, 0]) for row, group in enumerate(weights)]
    assert found[:, 0].tolist() == expected


def test_the_table_finds_what_the_rule_finds_for_every_pair_of_magnitudes() -> None:
    """Rule 4: each mantissa of amax with each lesser magnitude down to 1/16, where the table begins and below."""
    for exponent in (SMALLEST_AMAX >> 7) - 1, SMALLEST_AMAX >> 7:
        pairs = [
            (amax, max(amax - step, 0)) for amax in range(exponent << 7, (exponent + 1) << 7) for step in range(513)
        ]
        weights = np.zeros((len(pairs), 32), np.uint16)
        weights[:, (5, 30)] = np.array(pairs, np.uint16) | np.array([0, 0x8000], np.uint16)
        _, found, _ = encode(weights)
        _, expected, _ = reference.bf16_to_int4(tensor(weights), "moonshot")
        np.testing.assert_array_equal(found, expected.view(torch.uint16).numpy())


# --- other widths ---------------------------------------------------------------------------------------------------


def in_numpy(weights: U16, bits: int) -> U16:
    """Return what fake quantisation at a width gives on the moonshot grid: the rule, in plain numpy."""
    largest = {8: 127, 4: 7, 3: 3, 2: 1}[bits]
    groups = bf16_to_float(weights).reshape(-1, 32)
    scale = float_to_bf16(abs(groups).max(1, keepdims=True) / np.float32(largest))
    factor = bf16_to_float(np.where(scale == 0, np.uint16(0x3C00), scale))
    quotient: F32 = np.rint(groups / factor)
    codes = quotient.clip(-largest, largest) + np.float32(0)  # code 0 has no sign
    return float_to_bf16(codes * factor).reshape(weights.shape)


@pytest.mark.parametrize(
    ("bits", "weights", "scale", "word"),
    [
        (3, [3.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.75, 1.25], 0x3F80, "0x9568aa8b"),
        (3, [1.0, -0.5, 0.50390625, -0.1669921875, 0.0, 0.0, 0.0, 0.0], 0x3EAB, "0x88888a7b"),
        (2, [1.0, 0.5, -0.5, -1.0, 0.75, -0.25, 0.25, -0.75], 0x3F80, "0x78897889"),
        (2, [-0.75, 0.375, 0.376953125, -0.376953125, 0.0, 0.0, 0.75, 0.0], 0x3F40, "0x89887987"),
    ],
)
def test_three_and_two_bits_stand_in_nibbles(bits: int, weights: list[float], scale: int, word: str) -> None:
    """Scale bf16(amax/3) or bf16(amax); codes half to even, -3..3 or -1..1, as code + 8; words written out."""
    group = float_to_bf16(np.array([[*weights, *[0.0] * 24]], np.float32))
    packed, found, _ = encode(group, bits=bits)
    assert (f"{found[0, 0]:#06x}", hexadecimal(packed[0, 0])) == (f"{scale:#06x}", word)
    assert [hexadecimal(each) for each in packed[0, 1:]] == ["0x88888888"] * 3


MISSED = {127: {64}, 7: {*range(20, 125, 8)}, 3: {*range(46, 127, 4)}, 1: set[int]()}
"""Mantissas of scales s that bf16(bf16(L*s)/L) misses, for each largest code L."""


@pytest.mark.parametrize("largest", MISSED)
def test_a_scale_survives_times_and_divided_by_the_largest_code(largest: int) -> None:
    """The scale s is bf16(bf16(L*s)/L) but for these mantissas of 128, exhaustively; the rule makes none of those."""

    def divided(amax: U16) -> U16:
        return float_to_bf16(bf16_to_float(amax) / np.float32(largest))

    def missed(scale: U16) -> set[int]:
        there = float_to_bf16(bf16_to_float(scale) * np.float32(largest))
        return {int(bits) & 0x7F for bits in scale[divided(there) != scale]}

    finite = np.arange(1, 0x7C00, dtype=np.uint16)
    assert missed(finite) == MISSED[largest]
    assert missed(divided(finite)) == set()


@pytest.mark.parametrize(("bits", "largest"), [(3, 3), (2, 1)])
def test_plain_rounding_brings_back_what_it_made(bits: int, largest: int) -> None:
    """Groups of all codes with every scale that the rule makes: codes, scales and weights return without a search."""
    codes, scale = all_groups(largest)
    made = np.array([int(each) & 0x7F not in MISSED[largest] or each < 0x80 for each in scale[:, 0]])
    weights = decode(pack(codes), scale)
    packed, scales, figures = encode(weights[made], bits=bits)
    np.testing.assert_array_equal(scales, scale[made])
    np.testing.assert_array_equal(unpack(packed), codes[made])
    np.testing.assert_array_equal(fake(weights[made], bits=bits), weights[made])
    assert figures.exact


NORMAL_SCALES = 0x0480
"""BF16 bits of 2^-118: below this largest weight a scale may be subnormal, and amax need not get the largest code."""


def said(call: Callable[[], object]) -> str:
    """Return what a call refuses; nothing if it does not."""
    try:
        call()
    except ValueAt as refused:
        return str(refused)
    return ""


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    span=st.tuples(st.integers(0, 0x7F7F), st.integers(0, 0x7F7F)).map(sorted),
    grid=st.sampled_from([("moonshot", bits) for bits in FAKE_BITS] + [("compressed-tensors", 4)]),
)
def test_any_bit_pattern_is_rounded_as_the_reference_rounds(seed: int, span: list[int], grid: tuple[Grid, int]) -> None:
    """Words, scales, weights and refusals; fake quantisation is there and back, and a second time changes nothing."""
    generator, (rule, bits) = np.random.default_rng(seed), grid
    weights = generator.integers(span[0], span[1] + 1, (8, 64)).astype(np.uint16)
    weights |= generator.integers(0, 2, weights.shape, np.uint16) << np.uint16(15)
    weights[np.asarray(generator.random((8, 64))) < 0.1] = 0
    truth = tensor(weights)
    refused = said(lambda: reference.fake_quantize_int4(truth, rule, bits))
    assert said(lambda: fake(weights, rule, bits=bits)) == refused
    if refused:
        return
    after = reference.fake_quantize_int4(truth, rule, bits).view(torch.uint16).numpy()
    np.testing.assert_array_equal(fake(weights, rule, bits=bits), after)
    if rule == "moonshot":
        np.testing.assert_array_equal(after, in_numpy(weights, bits))
        normal = (weights & 0x7FFF).reshape(-1, 32).max(1) >= NORMAL_SCALES
        np.testing.assert_array_equal(fake(after, bits=bits).reshape(-1, 32)[normal], after.reshape(-1, 32)[normal])
    if bits in PACKED_BITS:
        packed, scale, figures = encode(weights, rule, recover=False, bits=bits)
        expected = reference.bf16_to_int4(truth, rule, recover=False, bits=bits)
        np.testing.assert_array_equal(packed, expected[0].numpy())
        np.testing.assert_array_equal(scale, expected[1].view(torch.uint16).numpy())
        np.testing.assert_array_equal(decode(packed, scale), after)
        assert (figures.changed, figures.worst) == (expected[2].changed, expected[2].worst)


@pytest.mark.parametrize("bits", FAKE_BITS)
def test_each_quotient_of_a_width_is_rounded_by_the_rule(bits: int) -> None:
    """For each mantissa of amax, every lesser weight of nine binades, ties and amax's own overshoot among them."""
    amax = np.repeat(np.arange(0x3F80, 0x4000, dtype=np.uint16), 1152 // 31 + 1)
    weights = np.empty((128, 38 * 32), np.uint16)
    weights.reshape(-1, 32)[:, 0] = amax
    lesser = np.resize(np.arange(0x3B00, 0x3F80, dtype=np.uint16), 38 * 31)
    weights.reshape(128, 38, 32)[:, :, 1:] = lesser.reshape(38, 31)
    weights[:, 1::2] |= 0x8000
    np.testing.assert_array_equal(fake(weights, bits=bits), in_numpy(weights, bits))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_recovery_belongs_to_four_bits(bits: int) -> None:
    """A group with the codes 0 and 2 alone is recovered with 4 bits; with fewer, `recover` changes nothing."""
    weights = decode(pack(np.resize([2, 0, -2, 0], (1, 32))), np.array([[0x3F94]], np.uint16))
    weights[0, 5] = float_to_bf16(np.array([1.15625], np.float32))[0]
    plain, asked = encode(weights, recover=False, bits=bits), encode(weights, bits=bits)
    assert (asked[1][0, 0] == plain[1][0, 0]) == (bits != 4)
    assert bits == 4 or asked[0].tolist() == plain[0].tolist()


@pytest.mark.parametrize("bits", FAKE_BITS)
def test_fake_quantisation_refuses_what_no_codec_can_carry(bits: int) -> None:
    """NaN and infinity with their place; the largest BF16 weight where its code times the scale exceeds BF16."""
    weights = np.zeros((3, 64), np.uint16)
    for wrong, name in (0xFF80, "inf"), (0x7FC1, "NaN"):
        weights[2, 40] = wrong
        with pytest.raises(ValueAt, match=rf"non-finite weight {wrong:#06x} \({name}\) at row 2, column 40"):
            fake(weights, bits=bits)
    weights[2, 40] = 0x7F7F
    if bits in {8, 4}:
        with pytest.raises(ValueAt, match=rf"rounds to an INT{bits} value that exceeds bfloat16 at row 2, column 40"):
            fake(weights, bits=bits)
    else:
        np.testing.assert_array_equal(fake(weights, bits=bits), weights)


@pytest.mark.parametrize("bits", [8, 5, 1, 0])
def test_a_width_without_nibbles_is_refused(bits: int) -> None:
    """The encoder knows 4, 3 and 2 bits, in the codec and in the reference."""
    message = rf"bits: expected 4 or 3 or 2, found {bits}"
    with pytest.raises(UsageError, match=message):
        encode(np.zeros((1, 32), np.uint16), bits=bits)
    with pytest.raises(UsageError, match=message):
        reference.bf16_to_int4(torch.zeros(1, 32).bfloat16(), "moonshot", bits=bits)


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_other_widths_belong_to_the_moonshot_grid(bits: int) -> None:
    """compressed-tensors has 4 bits here, whether encoded or rounded and back."""
    message = f"bits: expected 4 for the grid compressed-tensors, found {bits}"
    with pytest.raises(UsageError, match=message):
        fake(np.zeros((1, 32), np.uint16), "compressed-tensors", bits=bits)
    with pytest.raises(UsageError, match=message):
        reference.fake_quantize_int4(torch.zeros(1, 32).bfloat16(), "compressed-tensors", bits)


def test_the_reference_tells_which_codes_were_clamped() -> None:
    """Of amax/7.5 on -8..7 the largest weight is 8 and clamped, unless it is negative; of amax/7 none is."""
    weights = torch.zeros((2, 32), dtype=torch.bfloat16)
    weights[0, :4] = torch.tensor([7.5, 6.5, -7.5, 1.0])
    weights[1, :3] = torch.tensor([7.0, -7.0, 6.0])
    inside = torch.ones((2, 32), dtype=torch.bool)
    assert torch.equal(reference.int4_inside(weights, "moonshot"), inside)
    inside[0, 0] = inside[1, 0] = False
    assert torch.equal(reference.int4_inside(weights, "compressed-tensors"), inside)


@pytest.mark.parametrize(("bits", "recover"), [(4, True), (4, False), (3, True), (2, True)])
def test_the_reference_s_scales_are_those_of_its_encoder(bits: int, recover: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Recovered with 4 bits where it is asked for, else plain: of one weight a group, some mantissas differ."""
    weights = torch.zeros((64, 64), dtype=torch.bfloat16)
    weights[:, ::32] = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16).view(64, 2)
    scales = reference.int4_scales(weights, "moonshot", recover=recover, bits=bits)
    _, expected, _ = reference.bf16_to_int4(weights, "moonshot", recover=recover, bits=bits)
    assert torch.equal(scales, expected)
    plain = reference.plain_int4_scale(weights, "moonshot", bits)
    assert torch.equal(scales, plain) is not (recover and bits == 4)
