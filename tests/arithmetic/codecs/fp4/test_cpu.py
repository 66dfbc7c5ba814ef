"""FP4's loops on the CPU give the bits of the reference in torch: what they look up, and what they do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import (
    FINITE,
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
from k2quant.kernels.codecs import cpu, fp4
from k2quant.kernels.codecs.cpu.fp4 import tables
from k2quant.kernels.codecs.cpu.fp4.rules import nvfp4_quotients, plain_nvfp4
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK, TensorScale, tensor_scale
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, U8, U16, ValueAt

HERE, TRUTH = cpu.CODECS, torch_codecs("cpu")
USUAL = (TensorScale(float(np.float32(0.1 / 2688)), divides=False), TensorScale(26880.0, divides=True))
STRANGE = tuple(
    TensorScale(float(np.float32(value)), divides)
    for divides in (False, True)
    for value in (2.0**-149, 3.7e-41, 1e-30, 1.0, 7777.0, 1e9, 3.3e38)
)
FORMS = pytest.mark.parametrize("tensor", USUAL, ids=["multiplies", "divides"])


def same(do: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Hold the CPU to the reference, bit for bit, and return what both found: a result, or an error and its place."""
    found = []
    for codecs in (HERE, TRUTH):
        try:
            found.append(do(codecs, *given, **named))
        except ValueAt as error:
            found.append((str(error), error.row, error.column, error.of))
    np.testing.assert_equal(found[0], found[1])
    return found[0]


def plain_nvfp4_of(codecs: Codecs, weights: U16, tensor: TensorScale) -> tuple[U8, U8]:
    """Return codes and block scales of the plain rule."""
    return to_nvfp4(codecs, weights, tensor)[:2]


# --- what is looked up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [*USUAL, *STRANGE], ids=str)
def test_the_scale_of_every_largest_magnitude(tensor: TensorScale) -> None:
    """For each of 32,640 magnitudes the table has what the rule says; tensor scales far off any use among them."""
    quotient = nvfp4_quotients(np.arange(0x7F80, dtype=np.uint16), tensor)
    expected, near = plain_nvfp4(quotient, tensor)
    np.testing.assert_array_equal(tables.nvfp4_tables(tensor).asked, expected)
    found = tables.nvfp4_trials(tensor)
    scales = found.scales[found.place]
    np.testing.assert_array_equal(scales[:, 0], expected)
    np.testing.assert_array_equal(
        scales[LEAST_AMAX:LARGE_AMAX, 2], np.minimum(np.maximum(near, 1) + 1, 126)[LEAST_AMAX:LARGE_AMAX]
    )
    assert (scales[LARGE_AMAX:] == expected[LARGE_AMAX:, None]).all()


@pytest.mark.parametrize("tensor", [*USUAL, *STRANGE], ids=str)
def test_every_code_begins_where_its_quotient_does(tensor: TensorScale) -> None:
    """At all scales that divide, the magnitude that the table names has the code, and the one before it has not."""
    factors = fp4.block_scales(np.arange(256, dtype=np.uint8), tensor)
    known = tables.nvfp4_tables(tensor)
    scales = np.flatnonzero(~known.refused)
    level = known.levels[scales].astype(np.int32)
    for bits, reached in ((level, True), (level - 1, False)):
        there = (bits >= 0) & (bits < 0x7F80)
        with np.errstate(over="ignore"):
            quotient = (np.maximum(bits, 0).astype(np.uint32) << np.uint32(16)).view(np.float32) / factors[scales, None]
        bounds = zip(fp4.THRESHOLDS, fp4.TIES_UP, strict=True)
        found = [quotient[:, i] >= t if up else quotient[:, i] > t for i, (t, up) in enumerate(bounds)]
        found.append(quotient[:, 7] > 0)
        assert (np.stack(found, 1) == reached)[there].all()


@pytest.mark.parametrize("tensor", [*USUAL, *STRANGE], ids=str)
def test_two_codes_at_every_scale(tensor: TensorScale) -> None:
    """All 256 bytes at all 127 NVFP4 scales decode as the reference has it; those beyond BF16 are named alike."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (127, 1))
    scale = np.repeat(np.arange(127, dtype=np.uint8)[:, None], 32, 1)
    for row in (0, 1, 63, 126):
        part = slice(row, row + 1)
        same(from_nvfp4, codes[part], scale[part], tensor)
    same(from_nvfp4, codes, scale, tensor)


def test_two_codes_at_every_power() -> None:
    """All 256 bytes at all 255 MXFP4 scales: those that BF16 holds, and by name those that it does not."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)
    same(from_mxfp4, codes[:253], scale[:253])
    for row in range(252, 256):
        part = slice(row, row + 1)
        same(from_mxfp4, codes[part], scale[part])


@FORMS
def test_every_weight_at_scales_far_apart(tensor: TensorScale) -> None:
    """All 65,280 finite weights at scales from the least to the largest: codes and signs are the reference's."""
    weights = FINITE.reshape(-1, 64)
    for bits in (1, 7, 8, 60, 101, 126):
        scale = np.full((len(weights), 4), bits, np.uint8)
        same(nvfp4_at, weights, scale, tensor)
    for byte in (0, 1, 100, 127, 251):
        scale = np.full((len(weights), 2), byte, np.uint8)
        same(mxfp4_at, weights, scale)


# --- whole matrices -------------------------------------------------------------------------------------------------


def everything(codecs: Codecs, weights: U16, tensor: TensorScale, known: tuple[F32 | None, F32 | None]) -> list[Any]:
    """Return what NVFP4 makes of a matrix: plain and searched scales, codes at both, values, errors."""
    codes, scale, figures = to_nvfp4(codecs, weights, tensor)
    searched = searched_nvfp4(codecs, weights, tensor, *known)
    again = nvfp4_at(codecs, weights, searched, tensor)
    error = codecs.nvfp4.weighted_error(weights, searched, tensor, known[0], mean=known[1])
    counts = figures.count, figures.changed, figures.worst
    return [codes, scale, searched, again, from_nvfp4(codecs, again, searched, tensor), error, counts]


def everything_in_mxfp4(codecs: Codecs, weights: U16, known: tuple[F32 | None, F32 | None]) -> list[Any]:
    """Return what MXFP4 makes of a matrix, likewise."""
    codes, scale, figures = to_mxfp4(codecs, weights)
    searched = searched_mxfp4(codecs, weights, *known)
    again = mxfp4_at(codecs, weights, searched)
    error = codecs.mxfp4.weighted_error(weights, searched, known[0], mean=known[1])
    counts = figures.count, figures.changed, figures.worst
    found = codecs.mxfp4.exponents(codes, scale)
    return [codes, scale, searched, again, from_mxfp4(codecs, again, searched), error, counts, found]


def columns(count: int, seed: int) -> tuple[F32, F32]:
    """Return importances and means of columns, some of them zero."""
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(count).astype(np.float32)
    importance = (mean * mean + generator.lognormal(0, 2, count)).astype(np.float32)
    importance[generator.random(count) < 0.1] = 0
    return importance, mean


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 35),
    power=st.integers(-120, 110),
    moved=st.integers(-14, 6),
    divides=st.booleans(),
    known=st.sampled_from(["nothing", "importance", "means"]),
)
def test_a_matrix(seed: int, rows: int, blocks: int, power: int, moved: int, divides: bool, known: str) -> None:  # noqa: FBT001 - hypothesis names it
    """Matrices of any size and range, at tensor scales of their own and others, searched by all that can be known."""
    generator = np.random.default_rng(seed)
    bottom = int(generator.integers(-25, 1))
    weights = uneven(rows, 16 * blocks, seed, bottom)
    shifted = (weights & 0x7F80).astype(np.int32) + (power << 7)
    moved_weights = (weights & 0x807F) | np.clip(shifted, 0, 0x7F00).astype(np.uint16)
    weights = np.where(weights & 0x7FFF, moved_weights, weights).astype(np.uint16)
    amax = HERE.nvfp4.amax(weights) * 2.0**moved
    tensor = tensor_scale(float(np.float32(amax)), divides=divides)
    importance, mean = columns(16 * blocks, seed)
    given_columns = {"nothing": (None, None), "importance": (importance, None), "means": (importance, mean)}[known]
    same(everything, weights, tensor, given_columns)
    if blocks % 2 == 0:
        same(everything_in_mxfp4, weights, given_columns)


@pytest.mark.parametrize("tensor", STRANGE, ids=str)
def test_tensor_scales_far_off_any_use(tensor: TensorScale) -> None:
    """Block scales of zero, or infinite ones, are refused by name as the reference does, and never win a search."""
    for sigma in (1e-36, 0.02, 1e30):
        weights = gaussian(2, 64, sigma=sigma)
        same(plain_nvfp4_of, weights, tensor)
        same(searched_nvfp4, weights, tensor)


@FORMS
def test_a_search_begins_and_ends_where_the_rule_says(tensor: TensorScale) -> None:
    """Blocks whose largest weight is just outside what is searched keep the plain scale, those just inside need not."""
    amaxes = [LEAST_AMAX - 1, LEAST_AMAX, LEAST_AMAX + 77, LARGE_AMAX - 1, LARGE_AMAX]
    weights = gaussian(len(amaxes), 32) & np.uint16(0xF)
    weights[:, ::3] = np.array(amaxes, np.uint16)[:, None]
    weights[:, 1::3] = np.array(amaxes, np.uint16)[:, None] - np.uint16(0x90)
    for factor in (2.0**-100, 1.0, 2.0**100):
        moved = TensorScale(float(np.float32(tensor.value * factor)), tensor.divides)
        same(searched_nvfp4, weights, moved)
    same(searched_mxfp4, weights)


def test_figures_are_those_of_a_comparison() -> None:
    """Encoding says of a matrix, to the bit, what comparing it with its decoded codes says."""
    weights = gaussian(7, 1056)
    for tensor in USUAL:
        codes, scale, figures = to_nvfp4(HERE, weights, tensor)
        assert figures == HERE.floats.compare(weights, from_nvfp4(HERE, codes, scale, tensor))
    codes, scale, figures = to_mxfp4(HERE, weights)
    assert figures == HERE.floats.compare(weights, from_mxfp4(HERE, codes, scale))


def test_panels_give_the_bits_of_the_whole() -> None:
    """Rows know nothing of each other, in a search neither."""
    weights, tensor = gaussian(6, 96), USUAL[0]
    importance, _ = columns(96, 0)
    whole = searched_nvfp4(HERE, weights, tensor, importance)
    parts = [searched_nvfp4(HERE, weights[i : i + 2], tensor, importance) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def off_by_one(array: U8) -> U8:
    """Return a read-only copy that begins at an odd address, as a mapped file's may."""
    found = np.empty(array.size + 1, np.uint8)[1:].reshape(array.shape)
    found[...] = array
    found.flags.writeable = False
    return found


def test_inputs_may_be_read_only_and_lie_anywhere() -> None:
    """Codes and scales in a mapped file need no alignment, and nothing is written to them."""
    weights, tensor = gaussian(3, 64), USUAL[0]
    codes, scale, _ = to_nvfp4(HERE, weights, tensor)
    there = off_by_one(codes), off_by_one(scale)
    np.testing.assert_array_equal(from_nvfp4(HERE, *there, tensor), from_nvfp4(HERE, codes, scale, tensor))
    codes, scale, _ = to_mxfp4(HERE, weights)
    there = off_by_one(codes), off_by_one(scale)
    assert HERE.mxfp4.exponents(*there) == TRUTH.mxfp4.exponents(codes, scale)
    np.testing.assert_array_equal(restated(HERE, *there, -10)[0], codes)


# --- bad values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_a_weight_that_is_no_number_is_named_by_its_place(bits: int) -> None:
    """NaN and infinity, in whatever is done with weights: row 2, column 33."""
    weights = gaussian(4, 64)
    weights[2, 33] = bits
    tensor = USUAL[0]
    plain, powers = np.full((4, 4), 50, np.uint8), np.full((4, 2), 120, np.uint8)
    jobs: list[Callable[[], Any]] = [
        lambda: to_nvfp4(HERE, weights, tensor),
        lambda: HERE.nvfp4.amax(weights),
        lambda: HERE.nvfp4.choose(weights, tensor, plain.copy()),
        lambda: nvfp4_at(HERE, weights, plain, tensor),
        lambda: searched_nvfp4(HERE, weights, tensor),
        lambda: HERE.nvfp4.weighted_error(weights, plain, tensor, None),
        lambda: cpu.nvfp4.fake_quantize(weights, tensor, np.empty_like(weights)),
        lambda: to_mxfp4(HERE, weights),
        lambda: HERE.mxfp4.choose(weights, powers.copy()),
        lambda: mxfp4_at(HERE, weights, powers),
        lambda: searched_mxfp4(HERE, weights),
        lambda: HERE.mxfp4.weighted_error(weights, powers, None),
        lambda: cpu.mxfp4.fake_quantize(weights, np.empty_like(weights)),
    ]
    for job in jobs:
        with pytest.raises(ValueAt, match="row 2, column 33") as caught:
            job()
        assert (caught.value.row, caught.value.column, caught.value.of) == (2, 33, "weight")


def error_at(codecs: Codecs, weights: U16, scale: U8, tensor: TensorScale) -> float:
    """Return what rounding at block scales loses."""
    return codecs.nvfp4.weighted_error(weights, scale, tensor, None)


@pytest.mark.parametrize("bits", [0x7F, 0x80, 0xFF, 0x00])
def test_a_block_scale_that_is_none_is_named_by_its_place(bits: int) -> None:
    """NaN and signs, to read and to write at; a zero to write at alone."""
    scale = np.full((3, 4), 50, np.uint8)
    scale[1, 3] = bits
    codes = np.zeros((3, 32), np.uint8)
    for tensor in USUAL:
        assert same(nvfp4_at, gaussian(3, 64), scale, tensor)[1:] == (1, 3, "scale")
        assert same(error_at, gaussian(3, 64), scale, tensor)[1:] == (1, 3, "scale")
        if bits:
            assert same(from_nvfp4, codes, scale, tensor)[1:] == (1, 3, "scale")


def test_a_power_that_is_none_is_named_by_its_place() -> None:
    """Byte 255, to read and to write at, and in what is told of exponents where its block holds more than zeros."""
    scale = np.full((3, 2), 120, np.uint8)
    scale[1, 1] = 255
    codes = np.full((3, 32), 0x80, np.uint8)
    assert same(from_mxfp4, codes, scale)[1:] == (1, 1, "scale")
    assert same(mxfp4_at, gaussian(3, 64), scale)[1:] == (1, 1, "scale")
    assert same(lambda codecs: codecs.mxfp4.exponents(codes, scale)) is None
    codes[1, 20] = 0x10
    assert same(lambda codecs: codecs.mxfp4.exponents(codes, scale))[1:] == (1, 1, "scale")


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Columns that blocks do not divide, and arrays of another matrix."""
    for block, codec in ((NVFP4_BLOCK, "NVFP4"), (MXFP4_BLOCK, "MXFP4")):
        weights = gaussian(2, 2 * block)
        codes, scale = room(weights, block)
        write = (lambda w, c, s: HERE.nvfp4.encode(w, USUAL[0], c, s)) if codec == "NVFP4" else HERE.mxfp4.encode
        with pytest.raises(ValueError, match=f"multiple of {block} columns, found {2 * block - 8}"):
            write(np.ascontiguousarray(weights[:, :-8]), codes, scale)
        with pytest.raises(ValueError, match="expected shape"):
            write(weights, codes, scale[:1])
        with pytest.raises(ValueError, match="expected shape"):
            write(weights, codes[:, 1:], scale)


# --- from MXFP4 to NVFP4 --------------------------------------------------------------------------------------------


def restated(codecs: Codecs, codes: U8, scale: U8, exponent: int, *, divides: bool = False) -> tuple[U8, U8, int]:
    """Return codes, block scales and the count of what was rounded."""
    written, scales = np.empty_like(codes), np.empty((len(codes), codes.shape[1] // 8), np.uint8)
    tensor = TensorScale(2.0 ** (-exponent if divides else exponent), divides)
    return written, scales, codecs.nvfp4.restate(codes, scale, exponent, tensor, written, scales)


@pytest.mark.parametrize("exponent", [-126, -30, 0, 117, 126])
def test_every_power_restated(exponent: int) -> None:
    """All bytes of codes at all 256 scales: copied, rounded and counted, or refused, as the reference has it."""
    codes = np.concatenate([np.arange(256, dtype=np.uint8), np.array([0, 8, 0x80, 0x88] * 4, np.uint8)])
    for byte in range(256):
        scale = np.full((1, len(codes) // 16), byte, np.uint8)
        same(restated, codes[None], scale, exponent, divides=bool(exponent % 4))


def test_restated_weights_mean_the_same() -> None:
    """Scales 17 powers of two apart: every weight keeps its value, with zeros of both signs, in both forms."""
    generator = np.random.default_rng(0)
    codes, scale = generator.integers(0, 256, (8, 64), np.uint8), generator.integers(100, 118, (8, 4), np.uint8)
    codes[3] &= 0x88
    low, high = HERE.mxfp4.exponents(codes, scale) or (0, 0)
    for divides in (False, True):
        form = fp4.closed_form(low, high, divides=divides)
        assert form is not None
        written, scales, count = restated(HERE, codes, scale, form.exponent, divides=divides)
        assert count == 0
        np.testing.assert_array_equal(written, codes)
        np.testing.assert_array_equal(from_nvfp4(HERE, written, scales, form.tensor), from_mxfp4(HERE, codes, scale))
