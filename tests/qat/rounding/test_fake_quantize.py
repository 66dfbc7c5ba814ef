"""Fake quantisation as functions: the converter's bits forward, the written-out formulas backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

import k2quant
from k2quant import qat
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.convert import convert
from k2quant.errors import UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.known import ExportFormat
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import ValueAt, bf16_to_float, double_to_bf16
from k2quant.model.decoding import decoded_rows
from k2quant.qat.config import Adapter
from k2quant.qat.rounding import estimators as rounding
from k2quant.qat.rounding.adapters import LowRank, adapted, merged, updated
from k2quant.qat.rounding.estimators import fake_quantize, fake_quantize_learned
from k2quant.qat.rounding.rules import Rule

LARGEST = {8: 127, 4: 7, 3: 3, 2: 1}
WIDTHS: list[tuple[Grid, int]] = [("compressed-tensors", 4), *(("moonshot", bits) for bits in LARGEST)]


# --- the forward pass: bits -------------------------------------------------------------------------------------------


def bf16(values: Any) -> Tensor:
    """Return BF16 values as float32."""
    return torch.as_tensor(values, dtype=torch.float32).bfloat16().float()


def by_the_book(weights: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round BF16 values, given as float32 `[.., 32]`, as docs/formats.md says it, in plain float32 steps."""
    largest = LARGEST[bits]
    amax = weights.abs().amax(-1, keepdim=True).numpy()
    scale = bf16(amax / np.float32(7.5 if grid == "compressed-tensors" else largest))
    scale = torch.where(scale == 0, 2.0**-7, scale)
    quotient = torch.from_numpy(weights.numpy() / scale.numpy())
    if grid == "compressed-tensors":
        return bf16(bf16(quotient).clamp(-8, 7).round() * scale)
    return bf16(quotient.round().clamp(-largest, largest) * scale)


def group(kind: str, random: np.random.Generator) -> Tensor:
    """Return a group of 32 BF16 values of a kind, as float32."""
    noise = random.standard_normal(32).astype(np.float32)
    if kind == "on the grid":
        return bf16(bf16(abs(float(noise[0])) + 0.01) * torch.from_numpy(random.integers(-7, 8, 32)))
    factor = {"zero": 0.0, "usual": 0.02, "small": 1e-30, "denormal": 3e-39, "least": 1e-40, "huge": 8e37}[kind]
    return bf16(noise * np.float32(factor))


KINDS = ("usual", "zero", "on the grid", "small", "denormal", "least", "huge")


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from(WIDTHS),
)
def test_int4_is_what_the_format_says(kinds: list[str], seed: int, width: tuple[Grid, int]) -> None:
    """Every grid and width has the book's bits, for groups of any size; what BF16 cannot hold is refused."""
    random = np.random.default_rng(seed)
    weights = torch.stack([group(kind, random) for kind in kinds])
    expected = by_the_book(weights, *width)
    matrix = weights.view(2, 64)
    if not expected.isfinite().all():
        with pytest.raises(ValueAt):
            fake_quantize(matrix, grid=width[0], bits=width[1])
        return
    for master in (matrix, matrix.bfloat16()):
        found = fake_quantize(master, grid=width[0], bits=width[1])
        assert found.dtype == master.dtype
        assert torch.equal(found.float(), expected.view(2, 64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-38, 36), shape=st.sampled_from([(130, 96), (5, 200)]))
def test_fp8_is_what_the_converter_decodes(seed: int, exponent: int, shape: tuple[int, int]) -> None:
    """FP8 has the bits of `quantize` and back, recovered scales included, whatever the magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(shape, generator=generator) * 10.0**exponent).bfloat16()
    if not weights.isfinite().all():
        return
    once = k2quant.dequantize(k2quant.quantize(weights, "fp8"))
    assert torch.equal(fake_quantize(weights, to="fp8"), once)
    assert torch.equal(fake_quantize(once.float(), to="fp8"), once.float())  # recovered: rounding twice is rounding


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([*WIDTHS, None]))
def test_float32_masters_are_rounded_to_bf16_first(seed: int, width: tuple[Grid, int] | None) -> None:
    """The amax comes from the BF16 weight: bits below BF16 change nothing but what the BF16 weight is."""
    weights = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"to": "fp8"} if width is None else {"grid": width[0], "bits": width[1]}
    found = fake_quantize(weights, **options)
    assert found.dtype == torch.float32
    assert torch.equal(found, fake_quantize(weights.bfloat16(), **options).float())


def test_a_float32_amax_would_round_otherwise() -> None:
    """The rule above matters: scales from float32 weights give other values in some groups."""
    weights = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    seen = fake_quantize(weights)
    assert torch.equal(seen, by_the_book(bf16(weights), "moonshot", 4))
    otherwise = (by_the_book(weights, "moonshot", 4) != seen).any(1)
    assert 0 < int(otherwise.sum()) < 500


def decoded(checkpoint: Checkpoint, weight: StoredWeight) -> Tensor:
    """Return a weight of a checkpoint in BF16."""
    return decoded_rows(checkpoint, weight, 0, weight.shape[0])


@pytest.mark.parametrize("to", ["int4", "fp8"])
@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors", None])
def test_files_of_a_conversion_hold_the_same_values(
    to: ExportFormat, grid: Grid | None, k2_bf16: Path, tmp_path: Path
) -> None:
    """What `convert` writes decodes to what fake quantisation makes of the source, for every quantised weight."""
    if (grid is None) != (to == "fp8"):
        return
    convert(k2_bf16, tmp_path / "out", to=to, grid=grid)
    source, written = open_checkpoint(k2_bf16), open_checkpoint(tmp_path / "out")
    before = {weight.base: weight for weight in group_tensors(source.tensors).weights}
    chosen = [w for w in group_tensors(written.tensors).weights if w.format is not None and w.format.name == to]
    for weight in chosen[::7]:
        seen = fake_quantize(decoded(source, before[weight.base]), to=to, grid=grid or "moonshot")
        assert torch.equal(seen, decoded(written, weight)), weight.base


OPTIONS: list[dict[str, Any]] = [{}, {"grid": "compressed-tensors"}, {"bits": 2}, {"bits": 8}, {"to": "fp8"}]


@pytest.mark.parametrize("height", [96, 128, 200])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_matrix_of_a_stack_is_rounded_for_itself(height: int, options: dict[str, Any]) -> None:
    """A stack gives what its matrices give alone: no block of FP8 spans two, whatever their height."""
    stack = torch.randn(2, 3, height, 64, generator=torch.Generator().manual_seed(height))
    stack *= torch.tensor([1.0, 100.0, 0.01]).view(1, 3, 1, 1)
    alone = torch.stack([fake_quantize(matrix, **options) for matrix in stack.flatten(0, 1)])
    assert torch.equal(fake_quantize(stack, **options), alone.view_as(stack))


def test_pieces_are_as_small_as_rows_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary copies stay small: no more weights at once than a piece has, but for rows that belong together."""
    monkeypatch.setattr(rounding, "PIECE", 128)
    cut = [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(rounding.pieces(torch.Size((5, 64)))) == cut
    assert list(rounding.pieces(torch.Size((3, 1000)))) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(rounding.pieces(torch.Size((2, 3, 1000)), 3)) == [slice(0, 3), slice(3, 6)]
    seen: list[int] = []

    class Watched(Rule):
        def values(self, weights: Tensor) -> Tensor:
            seen.append(len(weights))
            return super().values(weights)

    master = torch.randn(5, 64)
    rounding.round_into(torch.empty_like(master), master, Watched(Bf16(), 16))
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("options", [*OPTIONS, {"estimator": "clipped"}])
def test_pieces_change_no_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Working on a few rows at a time gives the values and gradients of working on all at once."""
    weights = torch.randn(3, 256, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    pull = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for piece in (2**22, 1, 64 * 130):
        monkeypatch.setattr(rounding, "PIECE", piece)
        found = fake_quantize(weights, **options)
        results.append((found.detach(), *torch.autograd.grad(found, weights, pull)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_that_cannot_be_served_are_refused(
    bad: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinities and what becomes infinite in BF16: the message says the row of the stack, pieces or not."""
    weights = torch.zeros(2, 200, 64)
    weights[1, 101, 7] = bad
    monkeypatch.setattr(rounding, "PIECE", 64 * 16)
    with pytest.raises(ValueAt, match="row 301, column 7"):
        fake_quantize(weights, **options)
    if options in ({}, {"bits": 2}):
        with pytest.raises(ValueAt, match="row 301, column 7"):
            fake_quantize_learned(weights, torch.ones(2, 200, 2), bits=options.get("bits", 4))


@pytest.mark.parametrize("options", OPTIONS)
def test_views_give_the_bits_of_their_copies(options: dict[str, Any]) -> None:
    """A transposed stack and a cut matrix are rounded as contiguous ones, forward and backward."""
    stack = torch.randn(64, 3, 128, generator=torch.Generator().manual_seed(5))
    for view in (stack.transpose(0, 1), stack[:, 0, :64], stack[..., 0]):
        copy = view.contiguous().requires_grad_()
        seen = view.detach().requires_grad_()
        for estimator in ("plain", "clipped") if options.get("to") != "fp8" else ("plain",):
            pull = torch.randn(view.shape[::-1]).permute(*reversed(range(view.ndim)))  # a gradient that is a view, too
            pairs = []
            for weights in (seen, copy) if view.shape[-1] % 32 == 0 else ():
                found = fake_quantize(weights, estimator=estimator, **options)
                pairs.append((found.detach(), *torch.autograd.grad(found, weights, pull)))
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)) if pairs else view.shape[-1] == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: fake_quantize(torch.ones(2, 64, dtype=torch.float16)),
        lambda: fake_quantize(torch.ones(2, 64, dtype=torch.float64)),
        lambda: fake_quantize(torch.ones(2, 64, dtype=torch.int32)),
        lambda: fake_quantize(torch.tensor(1.0)),
        lambda: fake_quantize(torch.ones(32)),
        lambda: fake_quantize(torch.ones(4, 0)),
        lambda: fake_quantize(torch.ones(4, 33)),
        lambda: fake_quantize(torch.ones(4, 32), bits=5),
        lambda: fake_quantize(torch.ones(4, 32), grid="compressed-tensors", bits=3),
        lambda: fake_quantize(torch.ones(4, 32), to="fp8", estimator="clipped"),
        lambda: fake_quantize(torch.ones(4, 32), estimator="learned"),
        lambda: fake_quantize_learned(torch.ones(4, 64), torch.ones(4, 1)),
        lambda: fake_quantize_learned(torch.ones(4, 40), torch.ones(4, 1)),
        lambda: fake_quantize_learned(torch.ones(4, 32), torch.zeros(4, 1)),
        lambda: fake_quantize_learned(torch.ones(4, 32), -torch.ones(4, 1)),
        lambda: fake_quantize_learned(torch.ones(4, 32), torch.full((4, 1), 1e-45)),
        lambda: fake_quantize_learned(torch.ones(4, 32), torch.ones(4, 1), bits=5),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor]) -> None:
    """Dtypes, shapes, widths and scales that make no sense end in one sentence of ours."""
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_stack_without_experts_and_a_matrix_without_rows() -> None:
    """Nothing in, nothing out."""
    for options in OPTIONS:
        assert fake_quantize(torch.ones(0, 64, 64), **options).shape == (0, 64, 64)
        assert fake_quantize(torch.ones(0, 64), **options).shape == (0, 64)


def test_the_package_gives_the_functions() -> None:
    """`k2quant.qat.fake_quantize` is the function, also once every module of the package has been imported."""
    assert qat.fake_quantize is fake_quantize
    assert qat.fake_quantize_learned is fake_quantize_learned


# --- the backward pass: gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_passes_the_gradient_unchanged(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The gradient of the master weight is that of the rounded one, to the bit."""
    weights = torch.randn(4, 64).to(dtype).requires_grad_()
    pull = torch.randn(4, 64).to(dtype)
    assert torch.equal(torch.autograd.grad(fake_quantize(weights, **options), weights, pull)[0], pull)


def clamped_by_the_book(weights: Tensor, grid: Grid, bits: int) -> Tensor:
    """Fake quantisation written out for autograd: rounding passes gradients, clamping after it stops them."""
    largest = LARGEST[bits]
    low, high = (-8, 7) if grid == "compressed-tensors" else (-largest, largest)
    groups = bf16(weights.detach()).view(-1, 32)
    scale = bf16(groups.abs().amax(-1, keepdim=True).numpy() / np.float32(7.5 if low == -8 else largest))
    scale = torch.where(scale == 0, 2.0**-7, scale)
    quotient = weights.view(-1, 32) / scale
    whole = (bf16(groups / scale) if low == -8 else groups / scale).round()
    rounded = whole + (quotient - quotient.detach())  # exactly whole, where whole less quotient plus quotient is not
    return (rounded.clamp(low, high) * scale).view_as(weights)


@pytest.mark.parametrize(("grid", "bits"), WIDTHS)
def test_clipped_is_autograd_of_the_formula(grid: Grid, bits: int) -> None:
    """Where a code was clamped the gradient is zero, elsewhere it passes: as autograd has it of clamp(round(w / s))."""
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    # On moonshot's grid the largest weight has the largest code, but where BF16 holds a scale with a bit or two.
    weights[0, :32] = torch.linspace(-1, 1, 32) * {8: 190, 4: 10, 3: 4, 2: 1}[bits] * 2.0**-133
    weights.requires_grad_()
    pull = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    (expected,) = torch.autograd.grad(clamped_by_the_book(weights, grid, bits), weights, pull)
    (found,) = torch.autograd.grad(fake_quantize(weights, grid=grid, bits=bits, estimator="clipped"), weights, pull)
    assert torch.equal(found == 0, expected == 0)
    assert torch.equal(found[found != 0], pull[found != 0])
    assert bool((found == 0).any()) == (bits != 2)


def lsq(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    """LSQ written out for autograd in float64 (Esser et al., section 2), with both operands rounded to BF16 first."""
    largest = LARGEST[bits]
    slow = 1 / math.sqrt(32 * largest)
    w = weights + (bf16(weights.detach()).double() - weights).detach()
    s = scale * slow + (bf16(scale.detach()).double() - scale * slow).detach()
    groups = w.view(*scale.shape, 32)
    clamped = (groups / s[..., None]).clamp(-largest, largest)
    rounded = clamped + (clamped.round() - clamped).detach()
    return (rounded * s[..., None]).view_as(weights)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(6, 96), (2, 3, 64)])
def test_learned_scales_have_the_gradients_of_lsq(bits: int, shape: tuple[int, ...]) -> None:
    """Values, and gradients of weights and scales, are autograd's of the formula."""
    generator = torch.Generator().manual_seed(bits)
    weights = torch.randn(shape, generator=generator)
    start = weights.view(*shape[:-1], -1, 32).abs().amax(-1) / LARGEST[bits]
    scale = start * (0.5 + torch.rand(start.shape, generator=generator))  # some clamp, some do not
    pull = torch.randn(shape, generator=generator)
    wide = [tensor.double().requires_grad_() for tensor in (weights, scale)]
    expected = lsq(wide[0], wide[1], bits)
    gradients = torch.autograd.grad(expected, wide, pull.double())
    ours = [tensor.clone().requires_grad_() for tensor in (weights, scale)]
    found = fake_quantize_learned(ours[0], ours[1], bits=bits)
    assert torch.equal(found, bf16(expected.detach().float()))
    for mine, theirs in zip(torch.autograd.grad(found, ours, pull), gradients, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_learned_scales_at_their_start_are_plain_rounding() -> None:
    """With the scales of plain rounding, learned scales give its values."""
    weights = torch.randn(8, 64).bfloat16()
    for bits in LARGEST:
        scale = reference.plain_int4_scale(weights, "moonshot", bits).float()
        assert torch.equal(fake_quantize_learned(weights, scale, bits=bits), fake_quantize(weights, bits=bits))


def kept_by(call: Callable[[], Tensor]) -> list[Tensor]:
    """Return what a forward pass saves for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


def test_no_copy_of_a_weight_is_saved() -> None:
    """`plain` saves nothing; the others save references to the parameters, which live anyway."""
    weights, scale = torch.randn(4, 64, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    for options in OPTIONS:
        assert kept_by(lambda options=options: fake_quantize(weights, **options)) == []  # type: ignore[misc]
    for call, parameters in (
        (lambda: fake_quantize(weights, estimator="clipped"), [weights]),
        (lambda: fake_quantize_learned(weights, scale), [weights, scale]),
    ):
        assert [tensor.data_ptr() for tensor in kept_by(call)] == [tensor.data_ptr() for tensor in parameters]


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(master: Tensor, rank: int = 4) -> LowRank:
    """Return an adapter whose B is no longer zero."""
    update = LowRank(master, Adapter(rank=rank, alpha=8), seed=1)
    torch.nn.init.normal_(update.b, std=0.02, generator=torch.Generator().manual_seed(2))
    return update


@pytest.mark.parametrize("shape", [(48, 64), (3, 48, 64)])
def test_an_adapter_is_merged_before_rounding(shape: tuple[int, ...]) -> None:
    """The merged weight is bf16(bf16(W) + s B A), summed in float64, rounded as `merge` rounds; with B = 0 it is W."""
    master = torch.randn(shape)
    update = adapter(master)
    product = update.b.detach().double() @ update.a.detach().double()
    bits = double_to_bf16((bf16(master).double() + 2 * product).numpy())
    assert np.array_equal(update.merged(master).view(torch.uint16).numpy(), bits)
    assert torch.equal(LowRank(master, Adapter(), seed=1).merged(master), master.bfloat16())


def test_a_sum_next_to_a_tie_is_rounded_once() -> None:
    """1 + 2**-8 + 2**-30 lies above the middle of two BF16 numbers; torch's cast of a float64 goes to the one below."""
    update = torch.tensor([2.0**-8 + 2.0**-30, 2.0**-8, 3 * 2.0**-8 - 2.0**-30], dtype=torch.float64)
    assert updated(torch.ones(3), update, 1.0).tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-7]
    assert (1 + update).to(torch.bfloat16).tolist() == [1.0, 1.0, 1 + 2.0**-6], "torch rounds once: drop our own"


@given(hnp.arrays(np.uint16, 64), hnp.arrays(np.int64, 64, elements=st.integers(-3, 3)))
def test_both_roundings_of_float64_are_one(bits: NDArray[np.uint16], off: NDArray[np.int64]) -> None:
    """Torch's and numpy's give the same BF16 bits, for numbers near ties, tiny ones and ones that are too large."""
    low = bf16_to_float(bits & np.uint16(0xFF7F)).astype(np.float64)  # an exponent less than infinity's
    high = bf16_to_float((bits & np.uint16(0xFF7F)) + np.uint16(1)).astype(np.float64)
    values = (low + high) / 2 * (1 + off * 2.0**-50)
    found = reference.double_to_bf16(torch.from_numpy(values))
    assert np.array_equal(found.view(torch.uint16).numpy(), double_to_bf16(values))


def test_merging_in_pieces_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time give the bits of all at once."""
    master = torch.randn(2, 200, 64)
    update = adapter(master, rank=16)
    whole = update.merged(master)
    monkeypatch.setattr("k2quant.qat.rounding.adapters.PIECE", 64 * 7)
    assert torch.equal(merged(master, update.a.detach(), update.b.detach(), update.scaling), whole)


@pytest.mark.parametrize("shape", [(48, 64), (3, 48, 64)])
def test_gradients_of_an_adapter_are_autograds(shape: tuple[int, ...]) -> None:
    """A and B have the gradients of W + s B A with rounding passed straight through."""
    master, pull = torch.randn(shape), torch.randn(shape)
    update = adapter(master)
    values = fake_quantize(update.merged(master)).float()
    full = master + update.scaling * (update.b @ update.a)
    expected = torch.autograd.grad(full + (values - full).detach(), (update.a, update.b), pull)
    found = torch.autograd.grad(adapted(update, values), (update.a, update.b), pull)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))
