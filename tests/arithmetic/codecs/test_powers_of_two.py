"""FP8 whose values are e4m3 codes times a power of two comes back through BF16, whatever a block's largest code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import DEVICE, EACH, MAKERS, on_gpu
from k2quant.kernels import ops
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, U8, U16, bf16_to_float, float_to_bf16

PLAIN = torch_codecs("cpu")

LARGEST = np.arange(1, 127, dtype=np.uint8)
"""Magnitudes of e4m3 codes, one of which is a block's largest."""

NAMED = np.uint8(0x77)
"""Code of 240: from here on, up to 448, a block's largest code means that the scale is the one that the rule names."""

EDGES = [*range(-149, -116), -110, 0, 60, *range(110, 128)]
"""Exponents of scales: subnormal float32, products subnormal in BF16, the middle, and products next to the largest."""


def power(exponent: int, shape: tuple[int, int] = (1, 1)) -> F32:
    """Return scales of 2^exponent."""
    return np.full(shape, 2.0**exponent, np.float64).astype(np.float32)


def decoded(codes: U8, scale: F32, block: tuple[int, int]) -> U16:
    """Return BF16 bits."""
    out = np.empty(codes.shape, np.uint16)
    cpu.fp8.decode(codes, scale, block, out)
    return out


def encoded(codecs: Codecs, weights: U16, block: tuple[int, int]) -> tuple[U8, F32, Figures]:
    """Return codes, scales and figures."""
    codes = np.empty(weights.shape, np.uint8)
    scale = np.empty((-(-weights.shape[0] // block[0]), -(-weights.shape[1] // block[1])), np.float32)
    return codes, scale, codecs.fp8.encode(weights, block, codes, scale)


def ladders(exponent: int) -> U8:
    """Return a row for each code that can be the largest at a scale of 2^exponent: it, and all lesser ones, signed."""
    magnitudes = np.minimum(np.arange(127, dtype=np.uint8), LARGEST[:, None])
    codes = np.concatenate([magnitudes, magnitudes | np.uint8(0x80)], axis=1)
    numbers = torch.from_numpy(LARGEST.copy()).view(torch.float8_e4m3fn).double().numpy()
    return np.ascontiguousarray(codes[numbers * 2.0**exponent < 2.0**128])


def least(weights: U16) -> F32:
    """Return for each row the least normal power of two that times 448 reaches the largest weight: the rule."""
    amax = bf16_to_float((weights & 0x7FFF).max(1))
    powers = 2.0 ** np.arange(-126, 128)
    first = (448 * powers >= amax[:, None].astype(np.float64)).argmax(1)
    found: F32 = powers[first].astype(np.float32)[:, None]
    return found


def comes_back(codecs: Codecs, exponent: int, step: int = 1) -> None:
    """Send ladders through BF16 and FP8; compare values, and codes and scales where the rule names the source's."""
    codes = ladders(exponent)[::-step].copy()
    block = (1, codes.shape[1])
    weights = decoded(codes, power(exponent, (len(codes), 1)), block)
    again, scale, figures = encoded(codecs, weights, block)
    assert figures.exact
    np.testing.assert_array_equal(decoded(again, scale, block), weights)
    many = codes.max(1) >= 0x90  # of fewer codes the largest may also be 448 times a scale, which comes first
    if exponent >= -110:  # below, 448 times 2^e comes first even where 2^e is subnormal
        np.testing.assert_array_equal(scale[many], least(weights)[many])
    named = (codes & 0x7F).max(1) >= NAMED
    if exponent >= -124:
        np.testing.assert_array_equal(again[named], codes[named])
        assert (scale[named] == np.float32(2.0**exponent)).all()


# --- values always, codes and scales where the source's scale is the one that the rule names ------------------------


@pytest.mark.parametrize("maker", [MAKERS["cpu"], MAKERS["torch"]], ids=["cpu", "torch"])
def test_every_largest_code_with_every_lesser_one_comes_back_at_the_edges(maker: Callable[[], Codecs]) -> None:
    """Power-of-two scales that were lost without a word: each of 126 codes as a block's largest, at 54 scales."""
    for exponent in EDGES:
        comes_back(maker(), exponent)


@pytest.mark.parametrize("exponent", [-149, -124, 120])
def test_largest_codes_of_each_kind_come_back_on_a_gpu(exponent: int) -> None:
    """Power-of-two scales that were lost without a word: Triton's kernel, for every code if there is a GPU."""
    comes_back(on_gpu(), exponent, 1 if DEVICE == "cuda" else 9)


@pytest.mark.parametrize("exponent", [-149, -134, -133, -130, -126, -124, 0, 119])
def test_every_pair_of_codes_comes_back(exponent: int) -> None:
    """Power-of-two scales that were lost without a word: blocks of two weights, where many scales would do."""
    one, two = np.tril_indices(127)
    codes = np.stack([one, two | 0x80], axis=1).astype(np.uint8)
    weights = decoded(codes, power(exponent, (len(codes), 1)), (1, 2))
    again, scale, figures = encoded(cpu.CODECS, weights, (1, 2))
    assert figures.exact
    np.testing.assert_array_equal(decoded(again, scale, (1, 2)), weights)
    few = np.random.default_rng(0).integers(len(codes), size=500)
    expected, wanted, _ = encoded(PLAIN, np.ascontiguousarray(weights[few]), (1, 2))
    np.testing.assert_array_equal(again[few], expected)
    np.testing.assert_array_equal(scale[few], wanted)


@EACH
def test_the_bytes_of_one_block(maker: Callable[[], Codecs]) -> None:
    """Power-of-two scales that were lost without a word: 240, 2^-9, -1.875 * 2^-6, -0, 1, -224 and 5 * 2^-9 by 2^-8."""
    weights = np.array([[0x3F70, 0x3700, 0xB8F0, 0x8000, 0x3B80, 0xBF60, 0x3820, 0x0000]], np.uint16)
    codes, scale, figures = encoded(maker(), weights, (128, 128))
    assert codes.tobytes().hex() == "77018f8038f60500"
    assert scale.tobytes().hex() == "0000803b"
    assert figures.exact


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    largest=st.integers(1, 126),
    exponent=st.integers(-149, 118),
    shape=st.sampled_from([(1, 1), (5, 160), (130, 131), (33, 300)]),
    block=st.sampled_from([(128, 128), (1, 128), (3, 5)]),
)
def test_random_blocks_come_back(
    seed: int, largest: int, exponent: int, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    """Power-of-two scales that were lost without a word: ragged blocks, a scale for each, the same bits everywhere."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, largest + 1, shape, np.uint8) | (generator.integers(0, 2, shape, np.uint8) << 7)
    places = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scale = (2.0 ** np.clip(exponent + generator.integers(-2, 3, places), -149, 118)).astype(np.float32)
    weights = decoded(codes, scale, block)
    again, found, figures = encoded(cpu.CODECS, weights, block)
    assert figures.exact
    np.testing.assert_array_equal(decoded(again, found, block), weights)
    expected, wanted, _ = encoded(PLAIN, weights, block)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(found, wanted)
    chosen, stored = np.empty_like(found), np.empty_like(codes)
    cpu.fp8.choose(weights, block, chosen)
    np.testing.assert_array_equal(chosen, found)
    assert cpu.fp8.store(weights, chosen, block, stored).exact


# --- which scale ----------------------------------------------------------------------------------------------------


def test_the_largest_weight_at_448_comes_first() -> None:
    """A block that both scales would carry has the one of rule 4's first search: its promise is as it was."""
    weights = float_to_bf16(np.array([[0.5, -0.5, 0.25]], np.float32))
    codes, scale, _ = encoded(cpu.CODECS, weights, (1, 3))
    assert codes.tolist() == [[0x7E, 0xFE, 0x76]]
    assert scale.tolist() == [[np.float32(0.5) / np.float32(448)]]


@EACH
@pytest.mark.parametrize(
    ("bits", "why"),
    [
        (0x3F08, "five significant bits"),
        (0x3680, "a bit below 2^-9 of the scale"),
        (0x3708, "five significant bits, below the least normal code"),
        (0x0001, "subnormal in BF16"),
    ],
    ids=lambda case: f"{case:#06x}" if isinstance(case, int) else "",
)
def test_one_weight_that_is_no_multiple_sends_the_block_to_the_plain_rule(
    maker: Callable[[], Codecs], bits: int, why: str
) -> None:
    """It is all or nothing, and the codes are those of amax/448, wherever in the block the one weight stands."""
    ladder = decoded(ladders(-8)[0x77 - 1][None], power(-8), (1, 254))
    weights = np.tile(ladder, (5, 1))
    whole = encoded(maker(), weights, (5, 254))
    assert whole[2].exact
    for row, column in ((0, 0), (4, 253)):
        other = weights.copy()
        other[row, column] = bits
        codes, scale, figures = encoded(maker(), other, (5, 254))
        assert scale.tolist() == [[np.float32(240 / 256) / np.float32(448)]], why
        quotient = torch.from_numpy(bf16_to_float(other) / scale)
        expected = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(codes, expected)
        assert figures.changed > 0


@EACH
def test_the_largest_bfloat16_finds_no_power_of_two_and_no_infinity(maker: Callable[[], Codecs]) -> None:
    """255 * 2^120 has eight significant bits; at 2^120 its code would be 256, which exceeds BF16."""
    weights = np.array([[0x7F7F, 0x7F70, 0x7F10, 0x7F20, 0x7F30]], np.uint16)
    _, scale, figures = encoded(maker(), weights, (1, 5))
    assert (scale == bf16_to_float(weights)[0, 0] / np.float32(448)).all()
    assert 0 < figures.worst < np.inf


# --- other ways in --------------------------------------------------------------------------------------------------


@EACH
def test_int4_with_power_of_two_scales_keeps_its_values(maker: Callable[[], Codecs]) -> None:
    """Rule 5: -8..7 times powers of two within a block are multiples, and the fused pair finds what two steps find."""
    generator = np.random.default_rng(0)
    packed = generator.integers(-(2**31), 2**31, (40, 16)).astype(np.int32)
    scale = (2.0 ** generator.integers(-12, -8, (40, 4))).astype(np.float32)
    pivot = np.empty((40, 128), np.uint16)
    cpu.int4.decode(packed, scale, 32, pivot)
    expected, wanted, _ = encoded(PLAIN, pivot, (16, 32))
    codes, found = np.empty_like(expected), np.empty_like(wanted)
    assert maker().fused["int4", "fp8"](packed, scale, 32, (16, 32), codes, found).exact
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(decoded(codes, found, (16, 32)), pivot)
    assert (np.frexp(found)[0] == 0.5).any()


def test_training_sees_what_an_export_writes() -> None:
    """Rounding to FP8 and back leaves such weights as they are, and the exported codes decode to the same."""
    codes = np.tile(ladders(-6)[99], (4, 1))
    bits = decoded(codes, power(-6), (128, 254))
    weights = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    block = (128, 254)
    assert torch.equal(ops.fake_quantize_fp8(weights, block), weights)
    assert torch.equal(ops.fp8_to_bf16(*ops.bf16_to_fp8(weights, block), block), weights)
