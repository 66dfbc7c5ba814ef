"""FP4's codecs as Triton kernels: the reference's bits, on a GPU where there is one, else in Triton's interpreter."""

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

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.gpu import fp4
from k2quant.kernels.codecs.gpu.figures import figures_of
from k2quant.kernels.codecs.gpu.fp4_rules import fp4_code, fp4_scale
from k2quant.kernels.codecs.gpu.seam import cuda_codecs
from k2quant.kernels.codecs.reference.e2m1 import e2m1_codes
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U8, U16, ValueAt
from k2quant.kernels.devices.launch import launch, recorded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["gaussian", "any", "subnormal", "decoded"]
SHAPE = (28, 160)  # ragged in every tile
FORMS = [pytest.param(False, id="multiplies"), pytest.param(True, id="divides")]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give every test the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def bf16(bits: Tensor) -> Tensor:
    """Return BF16 numbers, on the device, from their bits in any integer type."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)


def drawn(kind: str, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return BF16 weights of one kind; the first 32 are zeros of both signs."""
    if kind == "gaussian":
        found = (torch.randn(shape) * 0.02).bfloat16().to(DEVICE)
    elif kind == "decoded":
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
        scale = torch.randint(100, 140, (shape[0], shape[1] // 32), dtype=torch.uint8)
        found = reference.mxfp4_to_bf16(codes, scale).to(DEVICE)
    else:
        most = {"any": 0x7E00, "subnormal": 0x300}[kind]
        found = bf16(torch.randint(0, most, shape) | (torch.randint(0, 2, shape) << 15))
    found[0, :32] = torch.tensor([0.0, -0.0] * 16)
    return found


def tensor_scale(weights: Tensor, *, divides: bool) -> Tensor:
    """Return the rule's tensor scale, on the device of the weights."""
    return reference.nvfp4_tensor_scale(weights.abs().max().float(), divides=divides)


def flag() -> Tensor:
    """Return a flag for bad values, not set."""
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def same(found: Tensor, expected: Tensor) -> None:
    """Compare two tensors of one shape and dtype bit for bit."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def same_figures(found: Tensor | None, expected: Figures) -> None:
    """Compare figures: counts and the worst error exactly, sums but for their order."""
    assert found is not None
    figures = figures_of(expected.count, found)
    assert (figures.changed, figures.worst) == (expected.changed, expected.worst)
    assert figures.energy == pytest.approx(expected.energy, rel=1e-12)
    assert figures.error == pytest.approx(expected.error, rel=1e-12)


# --- the rules ------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _codes(quotient_ptr: Any, out_ptr: Any, COUNT: tl.constexpr) -> None:  # noqa: N803 - a compile-time constant
    """Store the code of each quotient."""
    i = tl.arange(0, COUNT)
    quotient = tl.load(quotient_ptr + i)
    tl.store(out_ptr + i, fp4_code(quotient, quotient < 0))


def test_ties_go_to_the_even_code() -> None:
    """At each threshold, one float32 below and above it, between, beyond 6, at NaN and at infinity, of both signs."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([ties.view(torch.int32) + step for step in (-1, 0, 1)]).view(torch.float32)
    more = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.9, 6.0, 7.0, 1e30, torch.inf, torch.nan])
    quotient = torch.zeros(128)
    quotient[:34], quotient[64:98] = torch.cat([near, more]), -torch.cat([near, more])
    found = torch.empty(128, dtype=torch.int32, device=DEVICE)
    launch(_codes, (1,), quotient.to(DEVICE), found, COUNT=128, exact=True)
    assert torch.equal(found.cpu(), e2m1_codes(quotient, quotient < 0).int())


@triton.jit  # type: ignore[untyped-decorator]
def _scales(
    amax_ptr: Any,
    tensor_ptr: Any,
    out_ptr: Any,
    FORMAT: tl.constexpr,  # noqa: N803 - compile-time constants
    DIVIDES: tl.constexpr,  # noqa: N803
    COUNT: tl.constexpr,  # noqa: N803
) -> None:
    """Store the scale of a block of each amax."""
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, fp4_scale(tl.load(amax_ptr + i), tl.load(tensor_ptr), FORMAT, DIVIDES).to(tl.uint8))


FINITE = 0x7F80


def every_scale(weight_format: str, tensor: Tensor, *, divides: bool = False) -> Tensor:
    """Return the scale of a block for each finite BF16 magnitude as its largest."""
    amax = torch.arange(1 << 15, dtype=torch.int32, device=DEVICE) % FINITE
    found = torch.empty(1 << 15, dtype=torch.uint8, device=DEVICE)
    constants: dict[str, Any] = {"FORMAT": weight_format, "DIVIDES": divides, "COUNT": 1 << 15}
    launch(_scales, (1,), amax, tensor, found, exact=True, **constants)
    return found[:FINITE, None]


def every_amax(block: int) -> Tensor:
    """Return blocks `[32640, block]`: of each the first weight is one finite BF16 magnitude, its sign either."""
    amax = torch.arange(FINITE)
    weights = torch.zeros(FINITE, block, dtype=torch.bfloat16, device=DEVICE)
    weights[:, 0] = bf16(amax | (amax & 1) << 15)
    return weights


@pytest.mark.parametrize("divides", FORMS)
def test_block_scales_are_the_rules_for_every_amax(*, divides: bool) -> None:
    """All 32,640 finite magnitudes, at tensor scales at which they are clamped, rounded, subnormal or zero."""
    weights = every_amax(16)
    for value in (7.4e-5, 1e-45, 1e30, 3e38):
        tensor = torch.tensor(value, device=DEVICE)
        found = every_scale("nvfp4", tensor, divides=divides)
        same(found, reference.nvfp4_scales(weights, tensor, divides=divides))


def test_powers_are_the_rules_for_every_amax() -> None:
    """All 32,640 finite magnitudes; compressed-tensors' rule goes by the two highest bits of the mantissa."""
    same(every_scale("mxfp4", torch.ones((), device=DEVICE)), reference.mxfp4_scales(every_amax(32)))


@pytest.mark.parametrize("divides", FORMS)
def test_every_code_at_every_block_scale_decodes(*, divides: bool) -> None:
    """16 codes times 127 block scales, at tensor scales of which one makes subnormal products."""
    codes = (torch.arange(8, dtype=torch.uint8) * 0x22 + 0x10).repeat(127, 1).to(DEVICE)  # 0x10, 0x32 ... 0xFE
    scale = torch.arange(127, dtype=torch.uint8, device=DEVICE)[:, None]
    for value in (1.0, 0.37e-3, 1e-36):
        tensor, bad = torch.tensor([value], device=DEVICE), flag()
        found = fp4.nvfp4_to_bf16(codes, scale, tensor, divides=divides, bad=bad)
        if divides and value < 1e-30:  # 6 * 448 / 1e-36 exceeds BF16
            assert bad.item()
            continue
        same(found, reference.nvfp4_to_bf16(codes, scale, tensor, divides=divides))
        assert not bad.item()


def test_every_code_at_every_power_decodes() -> None:
    """16 codes times the powers from 2^-127 to 2^125; the next two exceed BF16, and 255 is none."""
    codes = (torch.arange(8, dtype=torch.uint8) * 0x22 + 0x10).repeat(253, 2).to(DEVICE)
    scale, bad = torch.arange(253, dtype=torch.uint8, device=DEVICE)[:, None], flag()
    same(fp4.mxfp4_to_bf16(codes, scale, bad=bad), reference.mxfp4_to_bf16(codes, scale))
    assert not bad.item()
    for byte in (254, 255):
        bad = flag()
        fp4.mxfp4_to_bf16(codes[:1], torch.full_like(scale[:1], byte), bad=bad)
        assert bad.item()


# --- weights of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divides", FORMS)
def test_nvfp4_has_the_bits_and_figures_of_the_reference(kind: str, *, divides: bool) -> None:
    """Codes, scales, decoded weights, figures; at scales that are given; there and back in one launch."""
    truth, bad = drawn(kind), flag()
    form: dict[str, Any] = {"tensor": tensor_scale(truth, divides=divides), "divides": divides}
    codes, scale, expected = reference.bf16_to_nvfp4(truth, **form)
    found = fp4.bf16_to_nvfp4(truth, **form, figures=True, bad=bad)
    same(found[0], codes)
    same(found[1], scale)
    same_figures(found[2], expected)
    after = reference.nvfp4_to_bf16(codes, scale, **form)
    same(fp4.nvfp4_to_bf16(codes, scale, **form, bad=bad), after)
    same(fp4.fake_quantize_nvfp4(truth, **form, bad=bad), after)
    other = scale.clamp(3, 125) + 1
    at, figures = fp4.bf16_to_nvfp4_at(truth, other, **form, figures=True, bad=bad)
    known, totals = reference.bf16_to_nvfp4_at(truth, other, **form)
    same(at, known)
    same_figures(figures, totals)
    assert not bad.item()


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp4_has_the_bits_and_figures_of_the_reference(kind: str) -> None:
    """Codes, scales, decoded weights, figures; at scales that are given; there and back in one launch."""
    truth, bad = drawn(kind), flag()
    codes, scale, expected = reference.bf16_to_mxfp4(truth)
    found = fp4.bf16_to_mxfp4(truth, figures=True, bad=bad)
    same(found[0], codes)
    same(found[1], scale)
    same_figures(found[2], expected)
    after = reference.mxfp4_to_bf16(codes, scale)
    same(fp4.mxfp4_to_bf16(codes, scale, bad=bad), after)
    same(fp4.fake_quantize_mxfp4(truth, bad=bad), after)
    other = scale.clamp(max=250) + 1
    at, figures = fp4.bf16_to_mxfp4_at(truth, other, figures=True, bad=bad)
    known, totals = reference.bf16_to_mxfp4_at(truth, other)
    same(at, known)
    same_figures(figures, totals)
    assert not bad.item()


def test_a_master_weight_is_rounded_to_bfloat16_first() -> None:
    """Fake quantisation of experts in float32 is that of their BF16 values, matrix by matrix."""
    masters = torch.randn(2, 5, 96, device=DEVICE) * 0.02
    tensor = tensor_scale(masters.bfloat16(), divides=False)
    for found, one in (
        (fp4.fake_quantize_mxfp4(masters), reference.fake_quantize_mxfp4),
        (
            fp4.fake_quantize_nvfp4(masters, tensor, divides=False),
            lambda part: reference.fake_quantize_nvfp4(part, tensor, divides=False),
        ),
    ):
        for master, part in zip(masters, found, strict=True):
            same(part, one(master.bfloat16()))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spreads_over_its_block(value: float) -> None:
    """A block of 16, or of 32, becomes NaN and raises the flag; its neighbours are as they were."""
    weights = drawn("gaussian", (2, 64))
    tensor = tensor_scale(weights, divides=False)
    spoilt = weights.clone()
    spoilt[1, 20] = value
    works: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
        16: lambda given, bad: fp4.fake_quantize_nvfp4(given, tensor, divides=False, bad=bad),
        32: lambda given, bad: fp4.fake_quantize_mxfp4(given, bad=bad),
    }
    for size, work in works.items():
        bad = flag()
        found, expected = work(spoilt, bad), work(weights, flag())
        start = 20 // size * size
        expected[1, start : start + size] = torch.nan
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert bad.item()


def test_codes_may_begin_at_any_byte_and_scales_must_fit() -> None:
    """A view that is not aligned is copied; scales of other columns would be read beside their end."""
    codes, scale, _ = reference.bf16_to_mxfp4(drawn("gaussian"))
    buffer = torch.zeros(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    buffer[1:] = codes.flatten()
    same(fp4.mxfp4_to_bf16(buffer[1:].view(codes.shape), scale), reference.mxfp4_to_bf16(codes, scale))
    with pytest.raises(ValueError, match=r"expected scales \[28, 5\] of 32 columns each, found \[28, 4\]"):
        fp4.mxfp4_to_bf16(codes, scale[:, :4])
    with pytest.raises(ValueError, match=r"expected scales \[28, 10\] of 16 columns each, found \[28, 5\]"):
        fp4.bf16_to_nvfp4_at(drawn("gaussian"), scale, torch.tensor(1.0, device=DEVICE), divides=False)


def test_each_codec_is_one_launch() -> None:
    """Tensors without data suffice, the tensor scale too: the host waits for nothing, and memory is read once."""
    with torch.device("meta"), recorded() as launches:
        weights, tensor = torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(())
        codes, scale, _ = fp4.bf16_to_nvfp4(weights, tensor, divides=True)
        fp4.nvfp4_to_bf16(codes, scale, tensor, divides=True)
        fp4.fake_quantize_nvfp4(weights, tensor, divides=True)
        codes, scale, _ = fp4.bf16_to_mxfp4(weights)
        fp4.mxfp4_to_bf16(codes, scale)
        fp4.fake_quantize_mxfp4(weights)
    assert len(launches) == 6
    assert all(each.exact for each in launches)


# --- the seam -------------------------------------------------------------------------------------------------------

Job = Callable[[Codecs, U16, U8, U8], object]

JOBS: dict[str, Job] = {
    "encoded": lambda c, w, a, s: c.nvfp4.encode(w, TensorScale(3e-3, divides=False), a, s),
    "encoded, divided": lambda c, w, a, s: c.nvfp4.encode(w, TensorScale(3e3, divides=True), a, s),
    "chosen": lambda c, w, _, s: c.nvfp4.choose(w, TensorScale(3e-3, divides=False), s),
    "stored": lambda c, w, a, s: c.nvfp4.store(w, s, TensorScale(3e-3, divides=False), a),
    "searched": lambda c, w, _, s: c.nvfp4.search(w, None, TensorScale(3e-3, divides=False), s),
    "MXFP4, encoded": lambda c, w, a, s: c.mxfp4.encode(w, a, s[:, :5].copy()),
    "MXFP4, stored": lambda c, w, a, s: c.mxfp4.store(w, s[:, :5].copy(), a),
    "an infinite weight": lambda c, w, a, s: c.nvfp4.encode(w | np.uint16(0x7F80), TensorScale(1.0, False), a, s),
    "an infinite weight, chosen": lambda c, w, _, s: c.nvfp4.choose(w | np.uint16(0x7F80), TensorScale(1, False), s),
    "a weight of NaN to MXFP4": lambda c, w, a, s: c.mxfp4.encode(w | np.uint16(0x7FC0), a, s[:, :5].copy()),
    "a weight of NaN, chosen": lambda c, w, _, s: c.mxfp4.choose(w | np.uint16(0x7FC0), s[:, :5].copy()),
    "a tensor scale of zero": lambda c, w, a, s: c.nvfp4.encode(w, TensorScale(0.0, False), a, s),
    "a tensor scale of zero, chosen": lambda c, w, _, s: c.nvfp4.choose(w, TensorScale(0.0, False), s),
    "a tensor scale of NaN": lambda c, w, a, s: c.nvfp4.store(w, s, TensorScale(float("nan"), False), a),
    "a negative tensor scale": lambda c, w, a, s: c.nvfp4.decode(a, s, TensorScale(-1.0, False), w),
    "a divisor of zero": lambda c, w, a, s: c.nvfp4.decode(a, s, TensorScale(0.0, True), w),
    "a block scale of zero": lambda c, w, a, s: c.nvfp4.store(w, s * np.uint8(0), TensorScale(1.0, False), a),
    "a block scale of NaN": lambda c, w, a, s: c.nvfp4.store(w, s | np.uint8(0x7F), TensorScale(1.0, False), a),
    "a negative block scale": lambda c, w, a, s: c.nvfp4.decode(a, s | np.uint8(0x80), TensorScale(1.0, False), w),
    "a product beyond BF16": lambda c, w, a, s: c.nvfp4.decode(a | np.uint8(0x77), s, TensorScale(3e38, False), w),
    "a scale of 255": lambda c, w, a, s: c.mxfp4.decode(a, s[:, :5] | np.uint8(0xFF), w),
    "a scale of 255, stored": lambda c, w, a, s: c.mxfp4.store(w, s[:, :5] | np.uint8(0xFF), a),
    "a power beyond BF16": lambda c, w, a, s: c.mxfp4.decode(a | np.uint8(0x77), s[:, :5] | np.uint8(0xFE), w),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_seam_says_and_writes_what_the_reference_does(name: str) -> None:
    """Arrays and figures, or the same sentence at the same place."""
    outcomes: list[tuple[Any, ...]] = []
    truth = drawn("gaussian").cpu().view(torch.uint16).numpy()
    for codecs in (torch_codecs("cpu"), cuda_codecs(DEVICE)):
        weights, codes, scale = truth.copy(), np.full((28, 80), 0x21, np.uint8), np.full((28, 10), 0x38, np.uint8)
        try:
            figures = JOBS[name](codecs, weights, codes, scale)
        except ValueAt as error:
            outcomes.append((str(error), error.row, error.column, error.of))
        else:
            said = str((figures.count, figures.changed, figures.worst)) if isinstance(figures, Figures) else ""
            outcomes.append((said, codes.tobytes(), scale.tobytes(), weights.tobytes()))
    assert outcomes[0] == outcomes[1]
    assert (" " in name.replace("MXFP4, ", "").replace("encoded, divided", "")) == isinstance(outcomes[0][1], int)
