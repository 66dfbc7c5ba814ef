"""Encoding in two halves: choosing scales, and storing codes at scales that are given, ours or others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import EACH, MAKERS, on_gpu
from k2quant.errors import UsageError
from k2quant.kernels.codecs import cpu, reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, I32, U8, U16, ValueAt, bf16_to_float, float_to_bf16

BOTH = pytest.mark.parametrize("maker", list(MAKERS.values())[:2], ids=list(MAKERS)[:2])
BLOCKS = pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
WIDTHS: list[tuple[Grid, bool, int]] = [
    ("moonshot", True, 4),
    ("moonshot", False, 4),
    ("moonshot", True, 3),
    ("moonshot", True, 2),
    ("compressed-tensors", True, 4),
]
RULES = pytest.mark.parametrize(("grid", "recover", "bits"), WIDTHS, ids=str)
KINDS = ["ordinary", "on the int4 grid", "on the fp8 grid", "zero", "denormal", "one outlier", "any"]

TWO_CODES = 15
"""BF16 bits of 15 * 2^-133: up to here two FP8 codes may stand for one weight."""


def weights(kind: str, shape: tuple[int, int]) -> U16:
    """Return BF16 bits of one kind, drawn afresh from the same seed."""
    generator = np.random.default_rng(5)
    rows, columns = shape
    out = float_to_bf16(generator.standard_normal(shape, np.float32) * np.float32(0.02))
    if kind == "on the int4 grid":
        words = generator.integers(-(2**31), 2**31, (rows, columns // 8)).astype(np.int32)
        cpu.int4.decode(words, generator.random((rows, columns // 32), np.float32), 32, out)
    elif kind == "on the fp8 grid":
        codes = generator.integers(0, 0x7F, shape, np.uint8) | (
            generator.integers(0, 2, shape, np.uint8) << np.uint8(7)
        )
        cpu.fp8.decode(codes, generator.random((-(-rows // 128), -(-columns // 128)), np.float32), (128, 128), out)
    elif kind == "zero":
        out = generator.integers(0, 2, shape).astype(np.uint16) << np.uint16(15)
    elif kind == "denormal":
        out = generator.integers(0, 0x300, shape).astype(np.uint16) | (out & np.uint16(0x8000))
    elif kind == "one outlier":
        out[:, ::32] = float_to_bf16(np.full((1, 1), 30.0, np.float32))[0, 0]
    elif kind == "any":
        out = generator.integers(0, 0x7E00, shape).astype(np.uint16) | (out & np.uint16(0x8000))
    return out


def fp8_room(bits: U16, block: tuple[int, int]) -> tuple[U8, F32]:
    """Return room for codes and scales."""
    return np.empty(bits.shape, np.uint8), np.empty(
        (-(-bits.shape[0] // block[0]), -(-bits.shape[1] // block[1])), np.float32
    )


def int4_room(bits: U16) -> tuple[I32, U16]:
    """Return room for words and scales."""
    rows, columns = bits.shape
    return np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // 32), np.uint16)


def same_figures(found: Figures, expected: Figures) -> None:
    """Compare figures: counts and the worst error exactly, sums but for their order."""
    assert (found.count, found.changed, found.worst) == (expected.count, expected.changed, expected.worst)
    assert found.energy == pytest.approx(expected.energy, rel=1e-12)
    assert found.error == pytest.approx(expected.error, rel=1e-12)


def int4_halves_agree(codecs: Codecs, bits: U16, grid: Grid, width: int = 4, *, recover: bool = True) -> None:
    """Encode at once, and choose, then store; scales go in read-only, as a mapped file's would."""
    packed, scale = int4_room(bits)
    whole = codecs.int4.encode(bits, grid, packed, scale, recover=recover, bits=width)
    words, chosen = int4_room(bits)
    codecs.int4.choose(bits, grid, chosen, recover=recover, bits=width)
    np.testing.assert_array_equal(chosen, scale)
    chosen.flags.writeable = False
    half = codecs.int4.store(bits, chosen, grid, words, bits=width)
    np.testing.assert_array_equal(words, packed)
    same_figures(half, whole)


def fp8_halves_agree(codecs: Codecs, bits: U16, block: tuple[int, int]) -> None:
    """The same for FP8; codes may differ where two stand for one weight, and decode to it then."""
    codes, scale = fp8_room(bits, block)
    whole = codecs.fp8.encode(bits, block, codes, scale)
    again, chosen = fp8_room(bits, block)
    codecs.fp8.choose(bits, block, chosen)
    np.testing.assert_array_equal(chosen, scale)
    chosen.flags.writeable = False
    half = codecs.fp8.store(bits, chosen, block, again)
    differ = again != codes
    assert (bits[differ] & 0x7FFF <= TWO_CODES).all()
    if differ.any():
        one, two = np.empty_like(bits), np.empty_like(bits)
        codecs.fp8.decode(codes, scale, block, one)
        codecs.fp8.decode(again, scale, block, two)
        np.testing.assert_array_equal(two, one)
    same_figures(half, whole)


# --- choose, then store, is encode ----------------------------------------------------------------------------------


@EACH
@RULES
@pytest.mark.parametrize("kind", KINDS)
def test_int4_is_chosen_and_stored_as_it_is_encoded(
    maker: Callable[[], Codecs], kind: str, grid: Grid, bits: int, *, recover: bool
) -> None:
    """Scales, words and figures of every width and grid, whatever the weights."""
    int4_halves_agree(maker(), weights(kind, (6, 160)), grid, bits, recover=recover)


@EACH
@BLOCKS
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_chosen_and_stored_as_it_is_encoded(
    maker: Callable[[], Codecs], kind: str, block: tuple[int, int]
) -> None:
    """Scales, codes and figures of blocks, ragged ones too, whatever the weights."""
    shape = (20, 160) if maker is on_gpu else (130, 160)  # the interpreter is slow
    fp8_halves_agree(maker(), weights(kind, shape), block)


@BOTH
@RULES
@pytest.mark.parametrize("largest", [7, 3, 1])
def test_int4_groups_of_every_scale(
    maker: Callable[[], Codecs], largest: int, grid: Grid, bits: int, *, recover: bool
) -> None:
    """Groups of all codes up to `largest` at each BF16 scale that fits, subnormal ones too, and with one weight off."""
    scale = np.arange(1, 0x7F80, dtype=np.uint16)
    scale = scale[bf16_to_float(scale) <= np.float32(3.38e38 / 8)][:, None]
    codes = np.resize(np.concatenate([np.arange(largest, -1, -1), -np.arange(largest + 1)]), 32)
    exact = float_to_bf16(codes.astype(np.float32) * bf16_to_float(scale))
    off = exact.copy()
    off[:, 3] += 1
    for bits_ in (exact, off):
        int4_halves_agree(maker(), bits_, grid, bits, recover=recover)


@BOTH
def test_fp8_blocks_of_every_pair_of_mantissas(maker: Callable[[], Codecs]) -> None:
    """Each mantissa of a block's largest weight, with every lesser weight of twelve binades."""
    lesser = np.resize(np.arange(0x3980, 0x3F80, dtype=np.uint16), (128, 13, 127))
    bits = np.empty((128 * 13, 128), np.uint16)
    bits[:, 0] = np.repeat(np.arange(0x3F80, 0x4000, dtype=np.uint16), 13)
    bits[:, 1:] = lesser.reshape(-1, 127)
    bits[:, 1::2] |= 0x8000
    fp8_halves_agree(maker(), bits, (1, 128))


@BOTH
def test_fp8_blocks_of_every_code(maker: Callable[[], Codecs]) -> None:
    """All codes, at scales of every size: blocks that are recovered, subnormal ones among them."""
    scale = np.concatenate([np.arange(1, 1 << 17, 97), np.arange(1 << 17, 0x7A000000, (1 << 20) + 77)])
    wide = scale.astype(np.uint32).view(np.float32)[:, None]
    codes = np.tile(np.resize(np.arange(127, dtype=np.uint8), 128), (len(wide), 1))
    bits = np.empty(codes.shape, np.uint16)
    cpu.fp8.decode(codes, wide, (1, 128), bits)
    fp8_halves_agree(maker(), bits, (1, 128))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    span=st.tuples(st.integers(0, 0x7E00), st.integers(0, 0x7E00)).map(sorted),
    rule=st.sampled_from(WIDTHS),
    block=st.sampled_from([(128, 128), (1, 128)]),
)
def test_any_weights_are_chosen_and_stored_as_they_are_encoded(
    seed: int, span: list[int], rule: tuple[Grid, bool, int], block: tuple[int, int]
) -> None:
    """Weights of any span of magnitudes, a tenth of them zero."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(span[0], span[1] + 1, (5, 160)).astype(np.uint16)
    bits |= generator.integers(0, 2, bits.shape, np.uint16) << np.uint16(15)
    bits[np.asarray(generator.random(bits.shape)) < 0.1] = 0
    for codecs in (cpu.CODECS, torch_codecs("cpu")):
        int4_halves_agree(codecs, bits, rule[0], rule[2], recover=rule[1])
        fp8_halves_agree(codecs, bits, block)


@EACH
def test_where_two_fp8_codes_stand_for_a_weight_the_halves_may_take_the_other(maker: Callable[[], Codecs]) -> None:
    """The corner that `seam.Fp8Codec.store` names: encoding keeps the codes of amax/448, storing divides anew."""
    bits = np.array([[18, 5, 16]], np.uint16)
    codes, scale = fp8_room(bits, (1, 128))
    whole = maker().fp8.encode(bits, (1, 128), codes, scale)
    again = np.empty_like(codes)
    assert maker().fp8.store(bits, scale, (1, 128), again) == whole
    assert whole.exact
    assert (codes.tolist(), again.tolist()) == ([[0x7E, 0x70, 0x7C]], [[0x7E, 0x6F, 0x7C]])


def test_two_fp8_codes_that_stand_for_a_weight_are_told_apart_nowhere_else() -> None:
    """Codes times scales of all sizes down to the least: stored at that scale, each product decodes to itself."""
    scale = np.concatenate([np.arange(1, 1 << 17, 5), np.arange(1 << 17, 0x04000000, 4099)])
    wide = scale.astype(np.uint32).view(np.float32)[:, None]
    codes = np.tile(np.arange(1, 127, dtype=np.uint8), (len(wide), 1))
    bits, after, again = np.empty(codes.shape, np.uint16), np.empty(codes.shape, np.uint16), np.empty_like(codes)
    cpu.fp8.decode(codes, wide, (1, 126), bits)
    assert cpu.fp8.store(bits, wide, (1, 126), again).exact
    cpu.fp8.decode(again, wide, (1, 126), after)
    np.testing.assert_array_equal(after, bits)
    assert (bits[again != codes] <= TWO_CODES).all()


# --- at scales of others --------------------------------------------------------------------------------------------


def tensor(bits: U16) -> torch.Tensor:
    """Return BF16 bits as a tensor."""
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def said(call: Callable[[], object]) -> str:
    """Return what a call refuses; nothing if it does not."""
    try:
        call()
    except ValueAt as refused:
        return str(refused)
    return ""


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weight=st.tuples(st.integers(0, 0x7F7F), st.integers(0, 0x7F7F)).map(sorted),
    factor=st.tuples(st.integers(1, 0x7F7F), st.integers(1, 0x7F7F)).map(sorted),
    rule=st.sampled_from(WIDTHS),
)
def test_int4_at_any_scale_is_what_the_reference_says(
    seed: int, weight: list[int], factor: list[int], rule: tuple[Grid, bool, int]
) -> None:
    """Words, figures and refusals of any weights at any scales; codes are w/scale by the grid's rule, clamped."""
    generator, (grid, _, bits) = np.random.default_rng(seed), rule
    given = generator.integers(weight[0], weight[1] + 1, (4, 64)).astype(np.uint16)
    given |= generator.integers(0, 2, given.shape, np.uint16) << np.uint16(15)
    scale = generator.integers(factor[0], factor[1] + 1, (4, 2)).astype(np.uint16)
    packed, words = int4_room(given)[0], int4_room(given)[0]
    plain = torch_codecs("cpu")
    refused = said(lambda: plain.int4.store(given, scale, grid, packed, bits=bits))
    assert said(lambda: cpu.int4.store(given, scale, grid, words, bits=bits)) == refused
    if refused:
        assert "exceeds bfloat16" in refused
        return
    np.testing.assert_array_equal(words, packed)
    same_figures(
        cpu.int4.store(given, scale, grid, words, bits=bits), plain.int4.store(given, scale, grid, packed, bits=bits)
    )
    codes = reference.unpack_int4(torch.from_numpy(words)).numpy()
    with np.errstate(over="ignore"):
        quotient = bf16_to_float(given) / np.repeat(bf16_to_float(scale), 32, 1)
    if grid == "moonshot":
        np.testing.assert_array_equal(codes, reference.int4_at_scale(tensor(given), tensor(scale), bits)[0].numpy())
        largest = {4: 7, 3: 3, 2: 1}[bits]
        np.testing.assert_array_equal(codes, np.rint(quotient.clip(-largest, largest)))
    else:
        narrow = torch.from_numpy(quotient).bfloat16().float().numpy()
        np.testing.assert_array_equal(codes, np.rint(narrow.clip(-8, 7)))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weight=st.tuples(st.integers(0, 0x7F7F), st.integers(0, 0x7F7F)).map(sorted),
    factor=st.tuples(st.integers(1, 0x7F7FFFFF), st.integers(1, 0x7F7FFFFF)).map(sorted),
    block=st.sampled_from([(128, 128), (1, 128), (2, 24)]),
)
def test_fp8_at_any_scale_is_what_the_reference_says(
    seed: int, weight: list[int], factor: list[int], block: tuple[int, int]
) -> None:
    """Codes, figures and refusals of any weights at any scales; codes are torch's cast of w/scale, saturated."""
    generator = np.random.default_rng(seed)
    given = generator.integers(weight[0], weight[1] + 1, (5, 160)).astype(np.uint16)
    given |= generator.integers(0, 2, given.shape, np.uint16) << np.uint16(15)
    shape = -(-5 // block[0]), -(-160 // block[1])
    scale = generator.integers(factor[0], factor[1] + 1, shape).astype(np.uint32).view(np.float32)
    codes, expected = np.empty(given.shape, np.uint8), np.empty(given.shape, np.uint8)
    plain = torch_codecs("cpu")
    refused = said(lambda: plain.fp8.store(given, scale, block, expected))
    assert said(lambda: cpu.fp8.store(given, scale, block, codes)) == refused
    if refused:
        assert "exceeds bfloat16" in refused
        return
    np.testing.assert_array_equal(codes, expected)
    same_figures(cpu.fp8.store(given, scale, block, codes), plain.fp8.store(given, scale, block, expected))
    spread = np.repeat(np.repeat(scale, block[0], 0)[:5], block[1], 1)[:, :160]
    with np.errstate(over="ignore"):
        quotient = torch.from_numpy(bf16_to_float(given) / spread)
    cast = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, cast)


# --- refusals -------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (0.0, "a scale of zero at row 1, column 1 of the scale"),
        (-0.0, "negative scale -0.0 at row 1, column 1 of the scale"),
        (-0.5, "negative scale -0.5 at row 1, column 1 of the scale"),
        (np.inf, "non-finite scale inf at row 1, column 1 of the scale"),
        (np.nan, "non-finite scale nan at row 1, column 1 of the scale"),
    ],
)
def test_there_are_no_codes_at_a_bad_scale_or_at_zero(maker: Callable[[], Codecs], value: float, what: str) -> None:
    """Scales that are given are checked as those of a file, and must not be zero."""
    bits, scale = np.zeros((2, 64), np.uint16), np.ones((2, 2), np.float32)
    scale[1, 1] = value
    with pytest.raises(ValueAt) as caught:
        maker().fp8.store(bits, scale, (1, 32), np.empty((2, 64), np.uint8))
    assert str(caught.value) == what
    narrow = (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with pytest.raises(ValueAt) as caught:
        maker().int4.store(bits, narrow, "moonshot", np.empty((2, 8), np.int32))
    assert str(caught.value) == what


@EACH
def test_neither_half_takes_a_weight_that_is_not_finite(maker: Callable[[], Codecs]) -> None:
    """NaN and infinity have no scale and no code."""
    bits, codecs = np.zeros((2, 64), np.uint16), maker()
    bits[1, 33] = 0xFF80
    codes, scale = fp8_room(bits, (1, 32))
    packed, narrow = int4_room(bits)
    jobs: list[Callable[[], object]] = [
        lambda: codecs.fp8.choose(bits, (1, 32), scale),
        lambda: codecs.fp8.store(bits, np.ones_like(scale), (1, 32), codes),
        lambda: codecs.int4.choose(bits, "moonshot", narrow),
        lambda: codecs.int4.store(bits, np.full_like(narrow, 0x3F80), "moonshot", packed),
    ]
    for job in jobs:
        with pytest.raises(ValueAt, match=r"non-finite weight 0xff80 \(inf\) at row 1, column 33"):
            job()


@EACH
@pytest.mark.parametrize("bad", [0x7F80, 0x7FC0], ids=["inf", "nan"])
def test_a_bad_weight_is_named_before_a_bad_scale(maker: Callable[[], Codecs], bad: int) -> None:
    """Where both are there, all implementations blame the same one."""
    bits, scale, codecs = np.zeros((2, 64), np.uint16), np.zeros((2, 2), np.float32), maker()
    bits[1, 33] = bad
    jobs: list[Callable[[], object]] = [
        lambda: codecs.fp8.store(bits, scale, (1, 32), np.empty((2, 64), np.uint8)),
        lambda: codecs.int4.store(bits, scale.astype(np.uint16), "moonshot", np.empty((2, 8), np.int32)),
    ]
    for job in jobs:
        with pytest.raises(ValueAt, match=f"non-finite weight {bad:#06x} .* at row 1, column 33"):
            job()


@EACH
def test_what_would_decode_to_infinity_is_refused_where_it_stands(maker: Callable[[], Codecs]) -> None:
    """A code times the scale that was given exceeds BF16: both are named, not the largest weight of another group."""
    bits = np.zeros((2, 64), np.uint16)
    bits[0, 0] = 0x7F7F
    bits[1, 33] = 0x7F77
    narrow = np.array([[0x7F7F, 0x3F80], [0x3F80, 0x7E88]], np.uint16)
    with pytest.raises(ValueAt, match=r"overflow: 4 \* 9.03\d*e\+37 exceeds bfloat16 at row 1, column 33"):
        maker().int4.store(bits, narrow, "moonshot", np.empty((2, 8), np.int32))
    wide = np.array([[3.3895e38, 1.0], [1.0, 7.59e35]], np.float32)
    with pytest.raises(ValueAt, match=r"overflow: 448 \* 7.59e\+35 exceeds bfloat16 at row 1, column 33"):
        maker().fp8.store(bits, wide, (1, 32), np.empty((2, 64), np.uint8))


@BOTH
def test_the_halves_know_the_widths_that_encoding_knows(maker: Callable[[], Codecs]) -> None:
    """Eight bits fit no nibble, and the other grid has four."""
    bits, packed, scale = np.zeros((1, 32), np.uint16), np.empty((1, 4), np.int32), np.full((1, 1), 0x3F80, np.uint16)
    codecs = maker()
    wrong: list[tuple[Grid, int, str]] = [
        ("moonshot", 8, "expected 4 or 3 or 2, found 8"),
        ("compressed-tensors", 3, "expected 4 for the grid"),
    ]
    for grid, width, message in wrong:
        with pytest.raises(UsageError, match=message):
            codecs.int4.choose(bits, grid, scale, bits=width)
        with pytest.raises(UsageError, match=message):
            codecs.int4.store(bits, scale, grid, packed, bits=width)


def test_scales_that_do_not_fit_are_refused() -> None:
    """A shape that contradicts another is an error before anything is written."""
    bits = np.zeros((2, 64), np.uint16)
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\), found \(2, 1\)"):
        cpu.int4.choose(bits, "moonshot", np.empty((2, 1), np.uint16))
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\), found \(2, 1\)"):
        cpu.int4.store(bits, np.empty((2, 1), np.uint16), "moonshot", np.empty((2, 8), np.int32))
    with pytest.raises(ValueError, match=r"expected shape \(1, 1\), found \(2, 1\)"):
        cpu.fp8.choose(bits, (128, 128), np.empty((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"expected shape \(1, 1\), found \(2, 1\)"):
        cpu.fp8.store(bits, np.empty((2, 1), np.float32), (128, 128), np.empty((2, 64), np.uint8))
