"""The codecs as Triton kernels: the reference's bits, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.gpu import figures as figures_triton
from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton
from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton
from k2quant.kernels.codecs.gpu.bf16 import round_to_bf16
from k2quant.kernels.codecs.gpu.fp8_rules import fp8_code, least_scale
from k2quant.kernels.codecs.gpu.int4_rules import int4_nibble
from k2quant.kernels.codecs.gpu.seam import cuda_codecs
from k2quant.kernels.codecs.grids import FAKE_BITS, PACKED_BITS, Grid
from k2quant.kernels.codecs.reference.fp8 import least_scale as least_scale_of_all
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import ValueAt
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.products.gpu.repack import repack_int4, unpack_int4
from k2quant.kernels.products.packed import fp8 as fp8_weight
from k2quant.kernels.products.packed import int4 as int4_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["gaussian", "any", "subnormal", "few", "fp8", "int4", "near int4"]
GRIDS = [("moonshot", True), ("moonshot", False), ("compressed-tensors", True)]
BLOCKS = [(128, 128), (1, 128), (24, 40)]
SHAPE = (28, 160)  # ragged in every tile and block


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give every test the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def bf16(bits: Tensor) -> Tensor:
    """Return BF16 numbers, on the device, from their bits in any integer type."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)


def signs(shape: tuple[int, ...]) -> Tensor:
    """Return random sign bits of BF16."""
    return torch.randint(0, 2, shape) << 15


def random_int4(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return random words and BF16 scales of INT4 `[R, K]`."""
    packed = torch.randint(-(2**31), 2**31, (shape[0], shape[1] // 8)).int()
    return packed.to(DEVICE), torch.rand(shape[0], shape[1] // 32).bfloat16().to(DEVICE)


def random_fp8(shape: tuple[int, int], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return random e4m3 codes, none of them NaN, and float32 scales of `[R, K]`."""
    codes = torch.randint(0, 0x7F, shape).to(torch.uint8) | (torch.randint(0, 2, shape) << 7).to(torch.uint8)
    scale = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return codes.view(torch.float8_e4m3fn).to(DEVICE), scale.to(DEVICE)


def drawn(kind: str, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return BF16 weights of one kind; the first group is zeros."""
    if kind == "gaussian":
        found = (torch.randn(shape) * 0.02).bfloat16().to(DEVICE)
    elif kind == "fp8":
        found = reference.fp8_to_bf16(*random_fp8(shape, (16, 32)), (16, 32))
    elif kind in {"int4", "near int4"}:
        packed, scale = random_int4(shape)
        found = reference.int4_to_bf16(packed, scale.float(), 32)
        if kind == "near int4":
            found.view(torch.int16)[::2, ::32] += 1
    else:
        magnitude = torch.randint(0, {"any": 0x7E00, "subnormal": 0x300, "few": 4}[kind], shape)
        found = bf16(magnitude | signs(shape))
    found[0, :32] = 0.0
    return found


def same(found: Tensor, expected: Tensor) -> None:
    """Compare two tensors of one shape and dtype bit for bit."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def same_figures(found: Tensor | None, expected: Figures) -> None:
    """Compare figures: counts and the worst error exactly, sums but for their order."""
    assert found is not None
    figures = figures_triton.figures_of(expected.count, found)
    assert (figures.changed, figures.worst) == (expected.changed, expected.worst)
    assert figures.energy == pytest.approx(expected.energy, rel=1e-12)
    assert figures.error == pytest.approx(expected.error, rel=1e-12)


def flag() -> Tensor:
    """Return a flag for bad values, not set."""
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


# --- the rules ------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _apply(a_ptr, b_ptr, out_ptr, RULE: tl.constexpr, COUNT: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    i = tl.arange(0, COUNT)
    a = tl.load(a_ptr + i)
    if RULE == "bf16":
        tl.store(out_ptr + i, round_to_bf16(a).to(tl.int32))
    elif RULE == "fp8":
        tl.store(out_ptr + i, fp8_code(a, tl.load(b_ptr + i), False).to(tl.int32))
    elif RULE == "least":
        value = tl.load(b_ptr + i).to(tl.float64)
        tl.store(out_ptr + i, least_scale(value, 1.0 / value, a))
    else:
        group = i.reshape(COUNT // 32, 4, 8)
        scale = tl.load(b_ptr + tl.arange(0, COUNT // 32))
        tl.store(out_ptr + group, int4_nibble(tl.load(a_ptr + group), scale, RULE, LARGEST))


def apply(rule: str, a: Tensor, b: Tensor, largest: int = 7) -> Tensor:
    """Run one rule on numbers; returns int32 on the CPU. Numbers are filled up to a power of two."""
    count = 1 << (a.numel() - 1).bit_length()
    filled = torch.ones(count, dtype=a.dtype)
    filled[: a.numel()] = a
    others = torch.ones(count, dtype=b.dtype)
    others[: b.numel()] = b
    out = torch.empty(count, dtype=torch.int32, device=DEVICE)
    constants: dict[str, Any] = {"RULE": rule, "COUNT": count, "LARGEST": float(largest)}
    launch(_apply, (1,), filled.to(DEVICE), others.to(DEVICE), out, exact=True, **constants)
    return out[: a.numel()].cpu()


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """Every BF16 number, the ties above it, and what is just off them round as torch rounds them."""
    high = torch.arange(0x10000)[:, None] << 16
    bits = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    values = values[values.isfinite()]
    expected = values.bfloat16().view(torch.int16).int()
    torch.testing.assert_close(apply("bf16", values, torch.ones(1)), expected)


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
@pytest.mark.parametrize("exponent", [-133, -126, -1, 0, 100], ids=str)
def test_int4_codes_are_those_of_a_true_division(grid: str, exponent: int) -> None:
    """The product with the reciprocal gives the code of the quotient for every pair of mantissas and each binade."""
    scale = ((torch.arange(128) + 128).double() * 2.0 ** (exponent - 7)).float()
    scale = scale.bfloat16().float().clamp(min=2.0**-133)
    mantissa = (torch.arange(128) + 128).double()
    steps = torch.cat([mantissa * 2.0 ** (exponent - 7 + binade) for binade in range(-3, 4)])
    magnitude = steps.float().bfloat16().float().repeat(128, 1)
    magnitude = magnitude.minimum(7.9 * scale[:, None]).bfloat16().float()  # [128, 896]
    magnitude[:, ::2] *= -1
    quotient = magnitude / scale[:, None]
    plain, narrow = quotient.round().clamp(-7, 7), quotient.bfloat16().float().clamp(-8, 7).round()
    expected = plain if grid == "moonshot" else narrow
    found = apply(grid, magnitude.flatten(), scale.repeat_interleave(28))
    torch.testing.assert_close(found, (expected.int() + 8).flatten())


@pytest.mark.parametrize("largest", [127, 3, 1])
@pytest.mark.parametrize("exponent", [-133, -1, 100], ids=str)
def test_codes_of_other_widths_are_those_of_a_true_division(largest: int, exponent: int) -> None:
    """The same for codes up to 127, 3 and 1, and up to quotients of 191, where a subnormal scale was rounded down."""
    scale = ((torch.arange(128) + 128).double() * 2.0 ** (exponent - 7)).float()
    scale = scale.bfloat16().float().clamp(min=2.0**-133)
    mantissa = (torch.arange(128) + 128).double()
    steps = torch.cat([mantissa * 2.0 ** (exponent - 7 + binade) for binade in range(-3, 9)])
    magnitude = steps.float().bfloat16().float().repeat(128, 1)
    magnitude = magnitude.minimum(min(191, 1.6 * largest) * scale[:, None]).bfloat16().float()  # [128, 1536]
    magnitude[:, ::2] *= -1
    expected = (magnitude / scale[:, None]).round().clamp(-largest, largest)
    found = apply("moonshot", magnitude.flatten(), scale.repeat_interleave(48), largest)
    torch.testing.assert_close(found, (expected.int() + 8).flatten())


@pytest.mark.parametrize("low", [1, 0x2800, 0x3F80, 0x6000], ids=hex)
def test_fp8_codes_are_those_of_a_true_division(low: int) -> None:
    """Weights up to the largest of a block, divided by its scale, give torch's e4m3 code at every size."""
    amax = torch.randint(low, low + 0x400, (1 << 14,))
    weights_ = (torch.rand(1 << 14) * amax).int() + torch.where(torch.rand(1 << 14) < 0.5, 0, amax).int()
    weights_ = weights_.minimum(amax.int()) | signs((1 << 14,)).int()
    wide = (amax.int() << 16).view(torch.float32)
    scale = wide / torch.full_like(wide, 448)
    quotient = (weights_ << 16).view(torch.float32) / scale
    expected = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()
    torch.testing.assert_close(apply("fp8", weights_.to(torch.int16), scale), expected)


def test_the_least_scale_is_the_one_that_bisection_finds() -> None:
    """For codes from the least to 448 and targets of every size, subnormal ones too."""
    target = torch.cat([torch.arange(1, 200), torch.randint(1, 0x7F81, (1848,)), torch.tensor([0x7F80])])
    every = least_scale_of_all(target[:, None].repeat(1, 127))
    for code in (1, 2, 7, 8, 9, 0x37, 0x38, 0x3D, 0x7D, 0x7E):
        value = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().expand(target.shape)
        torch.testing.assert_close(apply("least", target.int(), value).long(), every[:, code])


# --- INT4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "recover"), GRIDS, ids=str)
def test_int4_has_the_bits_and_figures_of_the_reference(kind: str, grid: Grid, *, recover: bool) -> None:
    """Words, scales, decoded weights and figures; rounding and back in one launch gives the same weights."""
    truth, bad = drawn(kind), flag()
    packed, scale, expected = reference.bf16_to_int4(truth, grid, recover=recover)
    after = reference.int4_to_bf16(packed, scale.float(), 32)
    found = int4_codecs_triton.bf16_to_int4(truth, grid, recover=recover, figures=True, bad=bad)
    same(found[0], packed)
    same(found[1], scale)
    same_figures(found[2], expected)
    same(int4_codecs_triton.int4_to_bf16(packed, scale, bad=bad), after)
    same(int4_codecs_triton.fake_quantize_int4(truth, grid, recover=recover, bad=bad), after)
    assert not bad.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", FAKE_BITS)
def test_other_widths_have_the_bits_and_figures_of_the_reference(kind: str, bits: int) -> None:
    """Rounding and back at each width; words, scales and figures at those that fit a nibble, never recovered."""
    truth, bad = drawn(kind), flag()
    after = reference.fake_quantize_int4(truth, "moonshot", bits)
    same(int4_codecs_triton.fake_quantize_int4(truth, bits=bits, bad=bad), after)
    if bits in PACKED_BITS:
        packed, scale, expected = reference.bf16_to_int4(truth, "moonshot", recover=False, bits=bits)
        found = int4_codecs_triton.bf16_to_int4(truth, recover=bits != 4, bits=bits, figures=True, bad=bad)
        same(found[0], packed)
        same(found[1], scale)
        same_figures(found[2], expected)
        same(int4_codecs_triton.int4_to_bf16(packed, scale), after)
    assert not bad.item()


@pytest.mark.parametrize("bits", FAKE_BITS)
def test_other_widths_raise_the_flag_where_the_reference_refuses(bits: int) -> None:
    """The largest BF16 weight, whose code times the scale exceeds BF16 with 8 and 4 bits alone."""
    truth, bad = bf16(torch.zeros(2, 64).int()), flag()
    truth[1, 40] = 3.3895313892515355e38
    if bits in {8, 4}:
        with pytest.raises(ValueAt, match=f"INT{bits} value"):
            reference.fake_quantize_int4(truth, "moonshot", bits)
    else:
        same(reference.fake_quantize_int4(truth, "moonshot", bits), truth)
    int4_codecs_triton.fake_quantize_int4(truth, bits=bits, bad=bad)
    assert bool(bad.item()) == (bits in {8, 4})


def test_widths_that_there_are_not_are_refused() -> None:
    """Eight bits fit no nibble, five are unknown, and the other grid has four, as on the CPU."""
    truth = drawn("gaussian", (1, 32))
    with pytest.raises(UsageError, match="bits: expected 4 or 3 or 2, found 8"):
        int4_codecs_triton.bf16_to_int4(truth, bits=8)
    with pytest.raises(UsageError, match="bits: expected 8 or 4 or 3 or 2, found 5"):
        int4_codecs_triton.fake_quantize_int4(truth, bits=5)
    with pytest.raises(UsageError, match="expected 4 for the grid compressed-tensors, found 2"):
        int4_codecs_triton.fake_quantize_int4(truth, "compressed-tensors", bits=2)


@pytest.mark.parametrize("group", [1, 6, 8, 24, 32, 96], ids=str)
def test_any_group_that_divides_the_columns_decodes(group: int) -> None:
    """Scales of groups that are shorter or longer than a word, in float32."""
    packed, _ = random_int4((5, 96))
    scale = torch.rand(5, 96 // group, device=DEVICE)
    same(int4_codecs_triton.int4_to_bf16(packed, scale, group), reference.int4_to_bf16(packed, scale, group))


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
def test_a_master_weight_is_rounded_to_bfloat16_first(grid: Grid) -> None:
    """Fake quantisation of experts in float32 is that of their BF16 values."""
    masters = torch.randn(2, 5, 96, device=DEVICE) * 0.02
    found = int4_codecs_triton.fake_quantize_int4(masters, grid)
    same(found, int4_codecs_triton.fake_quantize_int4(masters.bfloat16(), grid))
    packed, scale, _ = reference.bf16_to_int4(masters.bfloat16().flatten(0, 1), grid, recover=False)
    same(found.flatten(0, 1), reference.int4_to_bf16(packed, scale.float(), 32))
    narrow = fp8_codecs_triton.fake_quantize_fp8(masters, (4, 32), recover=True)
    for master, part in zip(masters, narrow, strict=True):
        codes, factors, _ = reference.bf16_to_fp8(master.bfloat16(), (4, 32))
        same(part, reference.fp8_to_bf16(codes, factors, (4, 32)))


def test_what_is_not_finite_spreads_instead_of_passing_unseen() -> None:
    """Fake quantisation without a flag: a group, or block, that holds NaN or infinity becomes NaN, others stay."""
    for wrong in (float("nan"), float("inf"), -float("inf")):
        truth = drawn("gaussian", (2, 64))
        truth[1, 40] = wrong
        groups = int4_codecs_triton.fake_quantize_int4(truth).isnan().view(2, 2, 32)
        assert groups.all(2).tolist() == groups.any(2).tolist() == [[False, False], [False, True]]
        blocks = fp8_codecs_triton.fake_quantize_fp8(truth, (1, 32)).isnan().view(2, 2, 32)
        assert blocks.all(2).tolist() == blocks.any(2).tolist() == [[False, False], [False, True]]


# --- FP8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "any", "subnormal", "fp8"])
def test_fp8_has_the_bits_and_figures_of_the_reference(kind: str, block: tuple[int, int]) -> None:
    """Codes, scales, decoded weights and figures of ragged blocks, some of which are recovered."""
    truth, bad = drawn(kind), flag()
    codes, scale, expected = reference.bf16_to_fp8(truth, block)
    after = reference.fp8_to_bf16(codes, scale, block)
    found = fp8_codecs_triton.bf16_to_fp8(truth, block, figures=True, bad=bad)
    same(found[0], codes)
    same(found[1], scale)
    same_figures(found[2], expected)
    same(fp8_codecs_triton.fp8_to_bf16(codes, scale, block, bad=bad), after)
    same(fp8_codecs_triton.fake_quantize_fp8(truth, block, recover=True, bad=bad), after)
    assert not bad.item()


def test_a_block_of_128_by_128_that_came_from_fp8_comes_back() -> None:
    """The search goes through all steps of a whole block, and loses nothing; one weight off turns it away."""
    codes, scale = random_fp8((130, 128), (128, 128))
    codes.view(torch.uint8)[::64, ::64] = 0x7E
    truth = reference.fp8_to_bf16(codes, scale, (128, 128))
    truth[129, 127] = truth[129, 126] * 1.01
    found, chosen, totals = fp8_codecs_triton.bf16_to_fp8(truth, figures=True)
    expected = reference.bf16_to_fp8(truth, (128, 128))
    same(found, expected[0])
    same(chosen, expected[1])
    same_figures(totals, expected[2])
    assert torch.equal(found.view(torch.uint8)[:128], codes.view(torch.uint8)[:128])


def test_without_recovery_a_block_is_divided_by_amax_over_448() -> None:
    """The plain rule alone, for a matrix of each expert; a block does not cross from one matrix to the next."""
    truth = torch.stack([drawn("fp8", (20, 96)), drawn("gaussian", (20, 96))])
    codes, scale, _ = fp8_codecs_triton.bf16_to_fp8(truth, (16, 32), recover=False)
    padded = torch.nn.functional.pad(truth.float(), (0, 0, 0, 12)).abs()
    amax = padded.view(2, 2, 16, 3, 32).amax((2, 4))
    plain = torch.where(amax > 0, amax / torch.full_like(amax, 448), 1.0)
    same(scale, plain)
    quotient = truth.float() / fp8_weight.spread(plain, (16, 32), (20, 96))
    same(codes, quotient.clamp(-448, 448).to(torch.float8_e4m3fn))
    assert not torch.equal(scale[0], fp8_codecs_triton.bf16_to_fp8(truth[0], (16, 32))[1])


# --- fused pairs, figures, layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fused_pairs_have_the_bits_and_figures_of_their_two_steps(block: tuple[int, int]) -> None:
    """FP8 to INT4 on both grids and INT4 to FP8, with blocks that groups do not divide."""
    codes, scale = random_fp8(SHAPE, block)
    for grid in ("moonshot", "compressed-tensors"):
        expected = reference.fp8_to_int4(codes, scale, block, grid)
        found = int4_codecs_triton.fp8_to_int4(codes, scale, block, grid, figures=True, bad=(bad := flag()))
        same(found[0], expected[0])
        same(found[1], expected[1])
        same_figures(found[2], expected[2])
        assert not bad.item()
    packed, factors = random_int4(SHAPE)
    wanted = reference.int4_to_fp8(packed, factors.float(), 32, block)
    for given in (factors, factors.float()):
        got = fp8_codecs_triton.int4_to_fp8(packed, given, 32, block, figures=True)
        same(got[0], wanted[0])
        same(got[1], wanted[1])
        same_figures(got[2], wanted[2])


@pytest.mark.parametrize("kind", ["gaussian", "any", "subnormal"])
def test_compare_gives_the_figures_of_the_reference(kind: str) -> None:
    """Also twice the same to the last bit, and zeros for nothing at all."""
    before, after = drawn(kind), drawn(kind).flip(0)
    same_figures(figures_triton.compare(before, after), reference.compare(before, after))
    assert torch.equal(figures_triton.compare(before, after), figures_triton.compare(before, after))
    assert figures_triton.compare(before[:0], after[:0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(130, 192), (3, 70, 544), (2, 1, 32), (0, 64)], ids=str)
def test_repacking_is_that_of_the_weights_and_goes_back(shape: tuple[int, ...]) -> None:
    """Layout `groups` of a matrix and of a stack of experts, ragged in both directions."""
    packed = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8)).int().to(DEVICE)
    scale = torch.rand(*shape[:-1], shape[-1] // 32).bfloat16().to(DEVICE)
    codes, turned = repack_int4(packed, scale)
    expected = int4_weight._to_groups(packed, scale)  # noqa: SLF001 - the truth
    same(codes, expected[0])
    same(turned, expected[1])
    back = unpack_int4(codes, turned)
    same(back[0], packed)
    same(back[1], scale)


# --- the seam -------------------------------------------------------------------------------------------------------


def spoilt(part: str) -> Callable[[Codecs], object]:
    """Return a job for the seam whose input holds one bad value."""
    codes, out = np.zeros((3, 64), np.uint8), np.empty((3, 64), np.uint16)
    packed, narrow = np.full((3, 8), -0x77777778, np.int32), np.empty((3, 2), np.uint16)
    wide, one = np.ones((3, 2), np.float32), np.ones((1, 1), np.float32)
    bits, block = np.zeros((3, 64), np.uint16), (128, 128)
    name, _, value = part.partition(" ")
    if name == "code":
        codes[2, 5] = int(value, 16)
        return lambda c: c.fp8.decode(codes, one, block, out)
    if name in {"scale8", "scale8-int4"}:
        codes[1, 1], scale = 0xFE, np.full((1, 1), float(value), np.float32)
        if name == "scale8":
            return lambda c: c.fp8.decode(codes, scale, block, out)
        return lambda c: c.fused["fp8", "int4"](codes, scale, block, "moonshot", packed, narrow)
    if name in {"scale4", "scale4-fp8"}:
        packed[1, 5], wide[1, 1] = 0, float(value)
        if name == "scale4":
            return lambda c: c.int4.decode(packed, wide, 32, out)
        return lambda c: c.fused["int4", "fp8"](packed, wide, 32, block, codes, one)
    bits[2, 40] = int(value, 16)
    bits[2, 41] = 1
    jobs: dict[str, Callable[[Codecs], object]] = {
        "int4": lambda c: c.int4.encode(bits, "moonshot", packed, narrow),
        "plain": lambda c: c.int4.encode(bits, "compressed-tensors", packed, narrow),
        "fp8": lambda c: c.fp8.encode(bits, block, codes, one),
        "before": lambda c: c.floats.compare(bits, out * 0),
        "after": lambda c: c.floats.compare(out * 0, bits),
    }
    return jobs[name]


@pytest.mark.parametrize(
    "part",
    [
        *("code 7f", "code ff"),
        *(f"{name} {value}" for name in ("scale8", "scale8-int4") for value in ("-1", "-0.0", "nan", "inf", "1e36")),
        *(f"{name} {value}" for name in ("scale4", "scale4-fp8") for value in ("-1", "-0.0", "nan", "inf", "1e38")),
        *(f"{name} {value}" for name in ("int4", "plain", "fp8", "before", "after") for value in ("7fc0", "ff80")),
        *("int4 7f7f", "plain ff7f"),
    ],
)
def test_bad_values_are_refused_as_on_the_cpu(part: str) -> None:
    """What the CPU codecs refuse is refused in the same words: NaN codes, bad scales, infinities, overflow."""
    sentences = []
    for each in (codecs("cpu"), cuda_codecs(DEVICE)):
        with pytest.raises(ValueAt) as caught:
            spoilt(part)(each)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize("part", ["scale8 7.4e35", "scale8-int4 0.0", "scale4 4e37", "scale4 0.0", "int4 7f70"])
def test_what_is_just_good_is_not_refused(part: str) -> None:
    """Values next to the limits, among them a scale of zero, raise no flag."""
    spoilt(part)(cuda_codecs(DEVICE))


def test_the_codecs_of_the_seam_fill_the_callers_arrays() -> None:
    """All of them, in the types of the seam, with the bits and figures of the CPU."""
    bits, words, block = drawn("int4", (4, 64)).cpu().view(torch.uint16).numpy(), np.empty((4, 8), np.int32), (2, 32)

    def run(each: Codecs) -> list[object]:
        found: list[object] = []
        packed, scale = words.copy(), bits[:, ::32].copy()
        found += [each.int4.encode(bits, "moonshot", packed, scale), packed, scale]
        packed, scale = words.copy(), bits[:, ::32].copy()
        found += [each.int4.encode(bits, "moonshot", packed, scale, bits=3), packed, scale]
        packed, scale = words.copy(), bits[:, ::32].copy()
        each.int4.encode(bits, "moonshot", packed, scale)
        wide = (scale.astype(np.uint32) << 16).view(np.float32)
        codes, scale8, out = np.empty(bits.shape, np.uint8), np.empty((2, 2), np.float32), bits.copy()
        each.int4.decode(packed, wide, 32, out)
        found += [each.fused["int4", "fp8"](packed, wide, 32, block, codes, scale8), codes, scale8, out]
        codes, scale8, again = codes.copy(), scale8.copy(), bits.copy()
        found += [each.fp8.encode(bits, block, codes, scale8), codes, scale8]
        each.fp8.decode(codes, scale8, block, again)
        packed, scale = words.copy(), bits[:, ::32].copy()
        found += [each.fused["fp8", "int4"](codes, scale8, block, "moonshot", packed, scale), packed, scale, again]
        return [*found, each.floats.compare(bits, again)]

    for one, two in zip(run(codecs("cpu")), run(cuda_codecs(DEVICE)), strict=True):
        if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
            np.testing.assert_array_equal(one, two)
        else:
            assert isinstance(one, Figures)
            assert isinstance(two, Figures)
            assert (one.count, one.changed, one.worst) == (two.count, two.changed, two.worst)
            assert two.energy == pytest.approx(one.energy, rel=1e-12)
            assert two.error == pytest.approx(one.error, rel=1e-12)
