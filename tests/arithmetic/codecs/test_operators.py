"""The codecs as torch operators: the bits of a conversion, on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from k2quant.errors import UsageError
from k2quant.kernels import ops
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.grids import FAKE_BITS, PACKED_BITS, Grid
from k2quant.kernels.codecs.values import ValueAt

BLOCKS = [(128, 128), (1, 128)]
GRIDS: tuple[Grid, ...] = ("moonshot", "compressed-tensors")


def weights(rows: int = 300, columns: int = 160) -> Tensor:
    """Return BF16 weights of very different sizes, zeros and denormals among them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator) * 10 ** torch.randint(
        -6, 3, (rows, 1), generator=generator
    )
    values[0, :32], values[1, :32] = 0, 1e-40
    return values.bfloat16()


def same(found: tuple[Tensor, ...], expected: tuple[Any, ...]) -> bool:
    """Return whether two sets of tensors are equal bit for bit; what the second has beyond is not looked at."""
    return len(found) > 0 and all(
        one.dtype == two.dtype and torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
        for one, two in zip(found, expected[: len(found)], strict=True)
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("recover", [True, False])
def test_int4_has_the_bits_of_the_reference(grid: Grid, recover: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Encoding and decoding give the reference's bits, on any number of threads."""
    found = ops.bf16_to_int4(weights(), grid, recover=recover)
    assert same(found, reference.bf16_to_int4(weights(), grid, recover=recover))
    assert same((ops.int4_to_bf16(*found),), (reference.int4_to_bf16(found[0], found[1].float(), 32),))


@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_has_the_bits_of_the_reference(block: tuple[int, int]) -> None:
    """The same for FP8, ragged blocks included, and for both fused codecs."""
    found = ops.bf16_to_fp8(weights(), block)
    assert same(found, reference.bf16_to_fp8(weights(), block))
    assert same((ops.fp8_to_bf16(*found, block),), (reference.fp8_to_bf16(*found, block),))
    for grid in GRIDS:
        packed = ops.fp8_to_int4(*found, block, grid)
        assert same(packed, reference.fp8_to_int4(*found, block, grid))
        assert same(ops.int4_to_fp8(*packed, block), reference.int4_to_fp8(packed[0], packed[1].float(), 32, block))


@pytest.mark.parametrize("grid", GRIDS)
def test_fake_quantize_is_there_and_back(grid: Grid) -> None:
    """What fake quantisation returns is what plain rounding would decode to."""
    assert same(
        (ops.fake_quantize_int4(weights(), grid),),
        (ops.int4_to_bf16(*ops.bf16_to_int4(weights(), grid, recover=False)),),
    )
    for block in BLOCKS:
        there = ops.bf16_to_fp8(weights(), block)
        assert same((ops.fake_quantize_fp8(weights(), block),), (ops.fp8_to_bf16(*there, block),))


@pytest.mark.parametrize("bits", FAKE_BITS)
def test_other_widths_have_the_bits_of_the_reference(bits: int) -> None:
    """Rounding and back at each width, encoding at those that fit a nibble, and one is the other decoded."""
    found = ops.fake_quantize_int4(weights(), bits=bits)
    assert same((found,), (reference.fake_quantize_int4(weights(), "moonshot", bits),))
    if bits in PACKED_BITS:
        encoded = ops.bf16_to_int4(weights(), recover=False, bits=bits)
        assert same(encoded, reference.bf16_to_int4(weights(), "moonshot", recover=False, bits=bits))
        assert same((found,), (ops.int4_to_bf16(*encoded),))


def test_fake_quantize_compiles_at_each_width() -> None:
    """A compiled function keeps the operator and its width: one graph, the bits of the plain call."""

    def both(x: Tensor) -> Tensor:
        return ops.fake_quantize_int4(x, bits=8) - ops.fake_quantize_int4(x, bits=2)

    compiled: Callable[[Tensor], Tensor] = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert same((compiled(weights()),), (both(weights()),))


def test_strided_input_is_the_same_as_contiguous() -> None:
    """A transposed or cut weight gives the bits of its contiguous copy."""
    for view in (weights(160, 320).T, weights(64, 320)[:, ::2], weights(128, 64)[::2]):
        assert not view.is_contiguous()
        assert same(ops.bf16_to_int4(view), ops.bf16_to_int4(view.contiguous()))
        assert same(ops.bf16_to_fp8(view), ops.bf16_to_fp8(view.contiguous()))
        assert same((ops.fake_quantize_int4(view),), (ops.fake_quantize_int4(view.contiguous()),))


def test_opcheck() -> None:
    """The checks of torch itself of schema, fake kernels and tracing with dynamic shapes pass for all."""
    sample = weights(130, 96)
    found = torch.ops.k2quant
    int4, fp8 = found.bf16_to_int4(sample, "moonshot", True), found.bf16_to_fp8(sample, 128, 128)
    opcheck(found.bf16_to_int4.default, (sample, "moonshot", True, 3))
    opcheck(found.search_int4_scales.default, (sample, torch.rand(96), True, 3))
    opcheck(found.int4_to_bf16.default, int4)
    opcheck(found.bf16_to_fp8.default, (sample, 128, 128))
    opcheck(found.fp8_to_bf16.default, (*fp8, 128, 128))
    opcheck(found.fp8_to_int4.default, (*fp8, 128, 128, "moonshot"))
    opcheck(found.int4_to_fp8.default, (*int4, 128, 128))
    opcheck(found.fake_quantize_int4.default, (sample, "moonshot", 8))
    opcheck(found.fake_quantize_fp8.default, (sample, 128, 128))


def test_values_that_no_codec_can_carry() -> None:
    """On a CPU a NaN is refused, with its place."""
    bad = weights(1024)
    bad[900, 9] = float("nan")
    encoders: tuple[Callable[[Tensor], object], ...] = (ops.bf16_to_int4, ops.bf16_to_fp8, ops.fake_quantize_int4)
    for encode in encoders:
        with pytest.raises(ValueAt, match=r"NaN.*at row 900, column 9"):
            encode(bad)


FP8 = torch.zeros(130, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bf16_to_int4(weights().float()), "weights: expected torch.bfloat16 [R, K], found torch.float32"),
        (lambda: ops.bf16_to_int4(weights(), "plain"), "grid: expected moonshot or compressed-tensors, found plain"),  # type: ignore[arg-type]
        (lambda: ops.bf16_to_int4(weights(), bits=8), "bits: expected 4 or 3 or 2, found 8"),
        (lambda: ops.fake_quantize_int4(weights(), bits=5), "bits: expected 8 or 4 or 3 or 2, found 5"),
        (lambda: ops.bf16_to_int4(weights(), "compressed-tensors", bits=3), "bits: expected 4 for the grid compressed"),
        (lambda: ops.search_int4_scales(weights(), bits=8), "bits: expected 4 or 3 or 2, found 8"),
        (lambda: ops.search_int4_scales(weights(4, 40)), "expected a multiple of 32 columns, found 40"),
        (lambda: ops.search_int4_scales(weights(), torch.ones(32)), "importance: expected float32 [160], one for each"),
        (lambda: ops.search_int4_scales(weights(), torch.ones(160, device="meta")), "importance: expected on cpu, as"),
        (lambda: ops.bf16_to_fp8(weights(), (0, 128)), "block: expected its rows and columns"),
        (lambda: ops.bf16_to_fp8(weights(4, 0)), "expected at least one column, found [4, 0]"),
        (lambda: ops.bf16_to_int4(weights(4, 40)), "expected a multiple of 32 columns, found 40"),
        (lambda: ops.bf16_to_int4(weights()[0]), "expected torch.bfloat16 [R, K], found torch.bfloat16 [160]"),
        (lambda: ops.int4_to_bf16(torch.zeros(2, 8).int(), torch.ones(2, 1).bfloat16()), "scale: expected [2, 2] for"),
        (lambda: ops.fp8_to_bf16(FP8, torch.ones(1, 1)), "expected [2, 1] for codes [130, 8] in blocks of 128x128"),
    ],
)
def test_misfits_are_named(call: Callable[[], object], message: str) -> None:
    """What does not fit is refused with both sides named."""
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
