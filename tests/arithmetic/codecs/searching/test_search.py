"""Rule 7: the search for INT4 scales of least error, which survive a round trip, and the error that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import EACH, on_gpu
from k2quant.errors import UsageError
from k2quant.kernels import ops
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.grids import PACKED_BITS
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX, candidate_table, column_weights
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, I32, U16, ValueAt, bf16_to_float, float_to_bf16

WIDTHS = pytest.mark.parametrize("bits", PACKED_BITS)
LARGEST = {4: 7, 3: 3, 2: 1}


def weights(rows: int = 12, columns: int = 160, seed: int = 0) -> U16:
    """Return BF16 bits of Gaussian weights, some groups zero, tiny, huge, or with one weight far beyond the others."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    values[0, :32], values[1, :32], values[2, :32], values[3, 7] = 0, 1e-40, values[2, :32] * np.float32(1e37), 3
    return float_to_bf16(values)


def importances(columns: int = 160, seed: int = 1) -> F32:
    """Return what columns weigh: numbers far apart, some of them zero."""
    generator = np.random.default_rng(seed)
    found = np.exp(2 * generator.standard_normal(columns)).astype(np.float32)
    found[generator.random(columns) < 0.1] = 0
    return found


def tensor(bits: U16) -> torch.Tensor:
    """Return BF16 bits as a tensor."""
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def searched(codecs: Codecs, bits: U16, importance: F32 | None = None, *, width: int = 4, recover: bool = True) -> U16:
    """Return the scales that a codec finds."""
    scale = np.empty((bits.shape[0], bits.shape[1] // 32), np.uint16)
    codecs.int4.search(bits, importance, scale, bits=width, recover=recover)
    return scale


def plain(bits: U16, width: int = 4, *, recover: bool = False) -> U16:
    """Return the scales of the plain rule, or of recovery."""
    scale = np.empty((bits.shape[0], bits.shape[1] // 32), np.uint16)
    cpu.int4.choose(bits, "moonshot", scale, recover=recover, bits=width)
    return scale


def stored(bits: U16, scale: U16, width: int = 4) -> tuple[I32, U16]:
    """Return the words at these scales and what they decode to."""
    packed, values = np.empty((bits.shape[0], bits.shape[1] // 8), np.int32), np.empty_like(bits)
    cpu.int4.store(bits, scale, "moonshot", packed, bits=width)
    cpu.int4.decode(packed, bf16_to_float(scale), 32, values)
    return packed, values


# --- candidates -----------------------------------------------------------------------------------------------------


@WIDTHS
def test_every_candidate_of_every_group_survives(bits: int) -> None:
    """Decoded at a candidate of any amax that is searched, all codes come back by the plain rule, with their scale."""
    amax = np.arange(LEAST_AMAX, LARGE_AMAX, dtype=np.uint16)
    moved = (amax & 0x7F80) - np.uint16(127 << 7)
    codes = np.resize(np.arange(LARGEST[bits], -LARGEST[bits] - 1, -1), 32).astype(np.float32)
    table = candidate_table(bits)
    assert (np.diff(table.astype(np.int32), axis=1) <= 0).all()  # each shrinks further, none grows
    np.testing.assert_array_equal(table[amax & 0x7F, 0] + moved, plain(np.repeat(amax, 32).reshape(-1, 32), bits)[:, 0])
    for candidate in np.unique(table, axis=1).T if bits == 2 else table.T:
        scale = (candidate[amax & 0x7F] + moved)[:, None]
        values = float_to_bf16(codes * bf16_to_float(scale))
        np.testing.assert_array_equal(plain(values, bits), scale)
        assert cpu.int4.store(values, scale, "moonshot", np.empty((len(amax), 4), np.int32), bits=bits).exact


def test_plain_scales_are_among_those_that_survive_of_which_there_are_114() -> None:
    """Of the 128 mantissas of a scale, 114 can come from an amax; moving another to one of them takes one step."""
    amax = np.arange(127 << 7, 131 << 7, dtype=np.uint16)
    known = set((float_to_bf16(bf16_to_float(amax) / np.float32(7)) & 0x7F).tolist())
    assert len(known) == 114
    assert set((candidate_table(4) & 0x7F).ravel().tolist()) <= known


# --- the rule, and who follows it -----------------------------------------------------------------------------------


@EACH
@WIDTHS
@pytest.mark.parametrize("importance", [None, importances()], ids=["equal", "weighed"])
def test_every_device_finds_the_same_scales(maker: Callable[[], Codecs], bits: int, importance: F32 | None) -> None:
    """The bits of the CPU's loops, of the reference in torch and of the GPU's kernels."""
    given = weights(4 if maker is on_gpu else 40)
    found = searched(maker(), given, importance, width=bits)
    np.testing.assert_array_equal(found, searched(cpu.CODECS, given, importance, width=bits))
    assert (found != plain(given, bits)).mean() > 0.5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    span=st.tuples(st.integers(0, 0x7F7F), st.integers(0, 0x7F7F)).map(sorted),
    exponent=st.integers(-120, 108),
    bits=st.sampled_from(PACKED_BITS),
    recover=st.booleans(),
)
def test_any_weights_have_the_scales_of_the_reference(
    seed: int, span: list[int], exponent: int, bits: int, *, recover: bool
) -> None:
    """Weights of any span of magnitudes, some zero, and importances of any size."""
    generator = np.random.default_rng(seed)
    given = generator.integers(span[0], span[1] + 1, (5, 96)).astype(np.uint16)
    given |= generator.integers(0, 2, given.shape, np.uint16) << np.uint16(15)
    given[np.asarray(generator.random(given.shape)) < 0.1] = 0
    importance = np.ldexp(importances(96, seed), exponent)
    found = searched(cpu.CODECS, given, importance, width=bits, recover=recover)
    np.testing.assert_array_equal(found, searched(torch_codecs("cpu"), given, importance, width=bits, recover=recover))


@WIDTHS
def test_every_pair_of_mantissas_is_rounded_as_it_is_stored(bits: int) -> None:
    """Each weight of five binades below each largest weight, which alone decides: by true division, as `store` does."""
    amax, lesser = np.arange(0x3F80, 0x4000, dtype=np.uint16), np.arange(0x3D00, 0x3F80, dtype=np.uint16)
    given = np.zeros((128, lesser.size * 32), np.uint16)
    given[:, ::32], given[:, 1::32] = amax[:, None], lesser
    importance = np.resize(np.array([0, 1] + [0] * 30, np.float32), given.shape[1])
    table = candidate_table(bits)
    weight, scale = bf16_to_float(lesser)[:, None], bf16_to_float(table)[:, None, :]
    codes = np.rint(weight / scale).clip(max=LARGEST[bits])  # [128, weights, candidates]
    best = np.abs(weight - bf16_to_float(float_to_bf16(codes * scale))).argmin(2)
    found = searched(cpu.CODECS, given, importance, width=bits, recover=False)
    np.testing.assert_array_equal(found, np.take_along_axis(table, best, 1))


@WIDTHS
@pytest.mark.parametrize("importance", [None, importances()], ids=["equal", "weighed"])
def test_no_candidate_is_better_and_the_plain_scale_never(bits: int, importance: F32 | None) -> None:
    """In exact sums of each group the scale that is found is the least of the 16, but for the rounding of float32."""
    given = weights()[4:]
    found = searched(cpu.CODECS, given, importance, width=bits)
    start = plain(given, bits).astype(np.int32)
    amax = (given & 0x7FFF).reshape(len(given), -1, 32).max(2)
    table = candidate_table(bits).astype(np.int32)
    for column in range(found.shape[1]):
        span = np.s_[:, column * 32 : column * 32 + 32]
        weigh = None if importance is None else importance[span[1]]
        group = np.ascontiguousarray(given[span])
        for row in range(len(given)):
            one = group[row : row + 1]
            offsets = table[amax[row, column] & 0x7F] - table[amax[row, column] & 0x7F, 0]
            every = [
                cpu.int4.weighted_error(one, np.array([[start[row, column] + offset]], np.uint16), weigh, bits=bits)
                for offset in offsets
            ]
            error = cpu.int4.weighted_error(one, found[row : row + 1, column : column + 1], weigh, bits=bits)
            assert error <= min(every) * (1 + 1e-6)
            assert error in every


@EACH
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (
            (
                "3f31bf58bf873fc5bf67bfe53f1b3f46bfa63f693e953f6b3e77c023be883b2d"
                "3e89bd04bfa43eb4bf353f0cbf063d253f95bef2bd313fc9bfb0bf813ff33fb2"
            ),
            0x3EA9,
        ),
        (
            (
                "bd6ebd0bbf9cbf9b3e69bf76bf0a3eb03d163eae3e8b3fa13ea9be863e38bee7"
                "3f4c3fbb3e83bf433fccbe2b3e9c3ff8bfbbbef4becb3f773f56bce63f23bdf7"
            ),
            0x3E83,
        ),
    ],
    ids=["products", "sums"],
)
def test_the_order_of_products_and_of_sums_decides_between_near_equals(
    maker: Callable[[], Codecs], group: str, expected: int
) -> None:
    """Of 150,000 Gaussian groups, one for which d * (d * importance) is another, and one for which other halves are."""
    given = np.frombuffer(bytes.fromhex(group), ">u2").astype(np.uint16)[None]
    importance = (1 + np.arange(32) * 7 % 11).astype(np.float32) / np.float32(10)
    assert searched(maker(), given, importance, recover=False)[0, 0] == expected


@EACH
def test_importance_decides(maker: Callable[[], Codecs]) -> None:
    """A group whose second weight alone matters gets the scale that comes closest to it: 0.66 as 7 * 0.0942."""
    given = float_to_bf16(np.array([[1.0, 0.66] + [0.01] * 30], np.float32))
    heavy = np.array([0, 1] + [0] * 30, np.float32)
    even, odd = (bf16_to_float(stored(given, searched(maker(), given, one))[1]) for one in (None, heavy))
    truth = bf16_to_float(given)
    assert abs(odd[0, 1] - truth[0, 1]) < abs(even[0, 1] - truth[0, 1])
    assert ((odd - truth) ** 2).sum() > ((even - truth) ** 2).sum()


@EACH
@WIDTHS
def test_among_equals_the_plain_scale_is_first(maker: Callable[[], Codecs], bits: int) -> None:
    """Where no column weighs anything, or only one whose weight is zero, all candidates are equal."""
    given = weights(4, 64, seed=3)
    given[:, 5::32] = 0
    nothing = np.zeros(64, np.float32)
    np.testing.assert_array_equal(searched(maker(), given, nothing, width=bits, recover=False), plain(given, bits))
    nothing[5::32] = 1
    np.testing.assert_array_equal(searched(maker(), given, nothing, width=bits, recover=False), plain(given, bits))


@EACH
def test_what_lies_on_the_grid_keeps_its_scale(maker: Callable[[], Codecs]) -> None:
    """Native INT4 values of any largest code have the scale of recovery, whatever the columns weigh."""
    generator = np.random.default_rng(4)
    words = generator.integers(-(2**31), 2**31, (12, 20)).astype(np.int32)
    words |= 0x11111111  # no code -8, which moonshot has not
    given = np.empty((12, 160), np.uint16)
    cpu.int4.decode(words, generator.random((12, 5), np.float32), 32, given)
    given[:4] = stored(given[:4], plain(given[:4]))[1]
    native = plain(given, recover=True)
    assert cpu.int4.weighted_error(given[:4], native[:4], None) == 0
    few = float_to_bf16(bf16_to_float(native[:4])[:, :, None] * (np.arange(32) % 9 - 4)).reshape(4, 160)
    given = np.concatenate([given[:4], few])  # largest codes 7, and 4
    for importance in (None, importances()):
        found = searched(maker(), given, importance)
        np.testing.assert_array_equal(found, plain(given, recover=True))
        assert cpu.int4.weighted_error(given, found, importance) == 0
    assert (searched(maker(), few, recover=False) != searched(maker(), few)).any()


@WIDTHS
def test_what_was_searched_comes_back_by_the_plain_rule(bits: int) -> None:
    """The promise that training builds on: decoded, rounded plainly, the same scales, codes and values."""
    given = weights(64, 320, seed=5)
    for importance in (None, importances(320)):
        scale = searched(cpu.CODECS, given, importance, width=bits, recover=False)
        packed, values = stored(given, scale, bits)
        again = plain(values, bits)
        asked = np.ones_like(scale, bool)
        asked[:2, 0] = False  # zeros, and below 2^-122
        np.testing.assert_array_equal(again[asked], scale[asked])
        words = stored(values, again, bits)[0].reshape(*scale.shape, 4)
        np.testing.assert_array_equal(words[asked], packed.reshape(*scale.shape, 4)[asked])
        fake = np.empty_like(values)
        cpu.int4.fake_quantize(values[2:], "moonshot", fake[2:], bits=bits)
        np.testing.assert_array_equal(fake[2:], values[2:])


# --- sizes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(weight=st.integers(-115, 124), importance=st.integers(-120, 120), bits=st.sampled_from(PACKED_BITS))
def test_size_changes_nothing(weight: int, importance: int, bits: int) -> None:
    """Weights and importances times powers of two give the same choice: no square overflows, none is lost."""
    given = weights(6, 64, seed=6)[4:] & np.uint16(0xFFF0)
    heavy = (1 + np.arange(64) % 5).astype(np.float32)
    scale = searched(cpu.CODECS, given, heavy, width=bits)
    exponent = weight - int((given & 0x7FFF).max() >> 7) + 127  # the largest weight becomes 2^weight or more
    with np.errstate(under="ignore"):
        moved = float_to_bf16(np.ldexp(bf16_to_float(given), exponent))
    found = searched(cpu.CODECS, moved, np.ldexp(heavy, importance), width=bits)
    inside = (moved & 0x7FFF).reshape(2, 2, 32).max(2) >= LEAST_AMAX + (8 << 7)
    np.testing.assert_array_equal(found[inside], (scale.astype(np.int32) + (exponent << 7))[inside])


@EACH
@WIDTHS
def test_the_smallest_and_the_largest_keep_the_plain_scale(maker: Callable[[], Codecs], bits: int) -> None:
    """Groups below 2^-122, where scales are no normal numbers, and from 2^126 on, where products may overflow."""
    shape = np.resize(np.arange(0x3F80, 0x3E00, -12, dtype=np.uint16), 32)  # falls from 1.0
    sizes = np.array([1 << 7, 4 << 7, 5 << 7, 0x7E00, 0x7E80], np.uint16)  # 5 << 7 is 2^-122, 0x7E80 2^126
    given = np.maximum(shape.astype(np.int32) - 0x3F80 + sizes[:, None], 0).astype(np.uint16)
    given[-1, 1:] = 0x7E00
    searched_too = searched(maker(), given, width=bits, recover=False) != plain(given, bits)
    assert searched_too[:, 0].tolist() == [False, False, True, True, False]
    assert searched(maker(), np.zeros((1, 32), np.uint16), width=bits)[0, 0] == 0x3C00


# --- the error ------------------------------------------------------------------------------------------------------


@EACH
@WIDTHS
def test_the_weighted_error_is_one_number_everywhere(maker: Callable[[], Codecs], bits: int) -> None:
    """The same float64 on every device, the exact sum but for rounding, and the error of storing where all is 1."""
    given, importance = weights(8 if maker is on_gpu else 40, 320), importances(320)
    given[2, :32] = 0
    scale = searched(cpu.CODECS, given, importance, width=bits)
    found = maker().int4.weighted_error(given, scale, importance, bits=bits)
    assert found == cpu.int4.weighted_error(given, scale, importance, bits=bits)
    difference = bf16_to_float(given) - bf16_to_float(stored(given, scale, bits)[1])
    assert found == pytest.approx(float((difference.astype(np.float64) ** 2 @ importance).sum()), rel=1e-12)
    even = maker().int4.weighted_error(given, scale, None, bits=bits)
    assert even == maker().int4.weighted_error(given, scale, np.ones(320, np.float32), bits=bits)
    figures = cpu.int4.store(given, scale, "moonshot", np.empty((len(given), 40), np.int32), bits=bits)
    assert even == pytest.approx(figures.error, rel=1e-12)


def test_rows_are_added_exactly() -> None:
    """The order of rows has no part in the sum, and the error of one row is what it adds."""
    given = weights(30)
    given[2, :32] = 0
    scale = plain(given)
    whole = cpu.int4.weighted_error(given, scale, importances())
    turned = cpu.int4.weighted_error(given[::-1].copy(), scale[::-1].copy(), importances())
    rows = [cpu.int4.weighted_error(given[i : i + 1], scale[i : i + 1], importances()) for i in range(30)]
    assert whole == turned == math.fsum(rows)


# --- refusals -------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("bad", [0x7F80, 0xFFC0], ids=["inf", "nan"])
def test_a_weight_that_is_not_finite_is_named(maker: Callable[[], Codecs], bad: int) -> None:
    """As in `choose` and `store`, whatever the scales."""
    given = weights(4, 64, seed=7)
    given[2, :32], given[1, 33] = 0, bad
    for call in (
        lambda: searched(maker(), given),
        lambda: maker().int4.weighted_error(given, np.full((4, 2), 0x3F80, np.uint16), None),
        lambda: maker().int4.weighted_error(given, np.zeros((4, 2), np.uint16), None),
    ):
        with pytest.raises(ValueAt, match=f"non-finite weight {bad:#06x} .* at row 1, column 33"):
            call()


@EACH
def test_scales_at_which_nothing_can_be_stored_are_refused(maker: Callable[[], Codecs]) -> None:
    """The sentences of `store`."""
    given = np.zeros((2, 64), np.uint16)
    given[1, 33] = 0x7F77
    for scale, said in ((0, "a scale of zero at row 1, column 1"), (0x7E88, "overflow: 4 .* at row 1, column 33")):
        narrow = np.array([[0x3F80, 0x3F80], [0x3F80, scale]], np.uint16)
        with pytest.raises(ValueAt, match=said):
            maker().int4.weighted_error(given, narrow, None)


@EACH
@pytest.mark.parametrize(
    ("importance", "said"),
    [
        (np.ones(32, np.float32), r"expected float32 \[64\], one for each column, found float32 \[32\]"),
        (np.ones(64), r"expected float32 \[64\], one for each column, found float64 \[64\]"),
        (np.where(np.arange(64) == 3, np.float32(-1), 1).astype(np.float32), "found -1.0 at column 3"),
        (np.where(np.arange(64) == 40, np.nan, 1).astype(np.float32), "found nan at column 40"),
        (np.where(np.arange(64) == 40, np.inf, 1).astype(np.float32), "found inf at column 40"),
    ],
)
def test_importances_that_do_not_fit_are_refused(maker: Callable[[], Codecs], importance: F32, said: str) -> None:
    """One finite number for each column, none negative."""
    given = np.zeros((2, 64), np.uint16)
    with pytest.raises(UsageError, match=f"importance: .*{said}"):
        searched(maker(), given, importance)
    with pytest.raises(UsageError, match=f"importance: .*{said}"):
        maker().int4.weighted_error(given, np.full((2, 2), 0x3F80, np.uint16), importance)


@EACH
def test_there_are_three_widths(maker: Callable[[], Codecs]) -> None:
    """Eight bits fit no nibble."""
    given = np.zeros((2, 64), np.uint16)
    with pytest.raises(UsageError, match="expected 4 or 3 or 2, found 8"):
        searched(maker(), given, width=8)
    with pytest.raises(UsageError, match="expected 4 or 3 or 2, found 8"):
        maker().int4.weighted_error(given, np.full((2, 2), 0x3F80, np.uint16), None, bits=8)


def test_scales_of_another_shape_are_refused() -> None:
    """A shape that contradicts another is an error before anything is written."""
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\), found \(2, 1\)"):
        cpu.int4.search(np.zeros((2, 64), np.uint16), None, np.empty((2, 1), np.uint16))
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\), found \(2, 1\)"):
        cpu.int4.weighted_error(np.zeros((2, 64), np.uint16), np.empty((2, 1), np.uint16), None)


# --- tensors --------------------------------------------------------------------------------------------------------


@WIDTHS
def test_the_operator_has_the_bits_of_the_codec(bits: int) -> None:
    """On any number of threads, strided or not, and an error counts rows from the first."""
    given, importance = weights(300), importances()
    for weigh in (None, importance):
        for recover in (True, False):
            heavy = None if weigh is None else torch.from_numpy(weigh)
            found = ops.search_int4_scales(tensor(given), heavy, recover=recover, bits=bits)
            expected = searched(cpu.CODECS, given, weigh, width=bits, recover=recover)
            np.testing.assert_array_equal(found.view(torch.uint16).numpy(), expected)
    turned = tensor(given).T.contiguous().T
    assert not turned.is_contiguous()
    assert torch.equal(ops.search_int4_scales(turned, bits=bits), ops.search_int4_scales(tensor(given), bits=bits))
    given[250, 9] = 0x7FC0
    with pytest.raises(ValueAt, match=r"NaN.*at row 250, column 9"):
        ops.search_int4_scales(tensor(given), bits=bits)


def test_no_rows_have_no_scales() -> None:
    """A matrix without rows is none of the things that are refused."""
    nothing = torch.empty((0, 64), dtype=torch.bfloat16)
    assert ops.search_int4_scales(nothing).shape == (0, 2)
    assert cpu.int4.weighted_error(np.empty((0, 64), np.uint16), np.empty((0, 2), np.uint16), None) == 0


def test_columns_weigh_what_float32_can_hold() -> None:
    """Each group of columns is scaled by a power of two of its own: nothing overflows, and the least is not lost."""
    given = np.array([3e38] * 32 + [2.0**-149] * 32 + [0] * 32, np.float32)
    found = column_weights(given, 96)
    assert found[0] == np.float32(3e38) / np.float32(2.0**127) / 2
    assert found[32:].tolist() == [0.5] * 32 + [0] * 32
