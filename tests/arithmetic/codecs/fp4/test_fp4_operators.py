"""FP4's torch operators give the bytes of a conversion, in eager mode and compiled, and say what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codec_makers import bf16, bits, from_mxfp4, from_nvfp4, to_mxfp4, to_nvfp4, uneven
from k2quant.errors import UsageError
from k2quant.kernels import ops
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.fp4 import tensor_scale
from k2quant.kernels.codecs.values import ValueAt

FORMS = pytest.mark.parametrize("divides", [False, True], ids=["multiplies", "divides"])
WEIGHTS = uneven(5, 96)
ONE = torch.tensor(1.0)


@FORMS
def test_nvfp4_is_that_of_a_conversion(*, divides: bool) -> None:
    """Tensor scale, codes, block scales and values are those of the codecs; fake quantisation is both ways at once."""
    weights = bf16(WEIGHTS)
    tensor = tensor_scale(CODECS.nvfp4.amax(WEIGHTS), divides=divides)
    one = ops.nvfp4_tensor_scale(weights.abs().amax(), divides=divides)
    assert (one.dtype, one.shape, float(one)) == (torch.float32, (), tensor.value)
    codes, scale = ops.bf16_to_nvfp4(weights, one, divides=divides)
    expected = to_nvfp4(CODECS, WEIGHTS, tensor)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(scale, expected[1])
    values = ops.nvfp4_to_bf16(codes, scale, one.reshape(1), divides=divides)
    assert np.array_equal(bits(values), from_nvfp4(CODECS, expected[0], expected[1], tensor))
    assert np.array_equal(bits(ops.fake_quantize_nvfp4(weights, one, divides=divides)), bits(values))


def test_mxfp4_is_that_of_a_conversion() -> None:
    """Codes, scales and values are those of the codecs; fake quantisation is both ways at once."""
    codes, scale = ops.bf16_to_mxfp4(bf16(WEIGHTS))
    expected = to_mxfp4(CODECS, WEIGHTS)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(scale, expected[1])
    values = ops.mxfp4_to_bf16(codes, scale)
    assert np.array_equal(bits(values), from_mxfp4(CODECS, expected[0], expected[1]))
    assert np.array_equal(bits(ops.fake_quantize_mxfp4(bf16(WEIGHTS))), bits(values))


def test_zeros_have_a_tensor_scale() -> None:
    """1.0 in either form, as where it is written; so fake quantisation of zeros gives zeros."""
    zeros = torch.zeros(2, 32, dtype=torch.bfloat16)
    for divides in (False, True):
        one = ops.nvfp4_tensor_scale(zeros.abs().amax(), divides=divides)
        assert float(one) == 1.0
        assert not ops.fake_quantize_nvfp4(zeros, one, divides=divides).any()


def test_operators_are_sound() -> None:
    """Schema, fake kernels and dispatch of each operator hold what torch asks of them, so they can be compiled."""
    weights = bf16(WEIGHTS[:2])
    scale = ops.nvfp4_tensor_scale(weights.abs().amax(), divides=False)
    codes = ops.bf16_to_nvfp4(weights, scale, divides=False)
    packed = ops.bf16_to_mxfp4(weights)
    for operator, arguments in (
        (torch.ops.k2quant.bf16_to_nvfp4, (weights, scale, False)),
        (torch.ops.k2quant.nvfp4_to_bf16, (*codes, scale, False)),
        (torch.ops.k2quant.fake_quantize_nvfp4, (weights, scale, False)),
        (torch.ops.k2quant.bf16_to_mxfp4, (weights,)),
        (torch.ops.k2quant.mxfp4_to_bf16, packed),
        (torch.ops.k2quant.fake_quantize_mxfp4, (weights,)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_values_are_named_with_their_rows() -> None:
    """Rows are shared out among threads; a bad value is counted from the first."""
    weights = torch.zeros(600, 32, dtype=torch.bfloat16)
    weights[590, 17] = torch.inf
    for act in (
        ops.bf16_to_mxfp4,
        ops.fake_quantize_mxfp4,
        nvfp4,
        lambda bad: ops.fake_quantize_nvfp4(bad, ONE, divides=False),
    ):
        with pytest.raises(ValueAt, match="row 590, column 17"):
            act(weights)
    scale = torch.full((600, 2), 0x38, dtype=torch.uint8)
    scale[511, 1] = 0xC0
    with pytest.raises(ValueAt, match="negative scale 0xC0 at row 511, column 1 of the scale"):
        ops.nvfp4_to_bf16(torch.zeros(600, 16, dtype=torch.uint8), scale, ONE, divides=False)
    with pytest.raises(ValueAt, match=r"tensor scale 0\.0: expected a finite number above 0"):
        nvfp4(torch.zeros(2, 32, dtype=torch.bfloat16), ONE * 0)


def nvfp4(weights: Tensor, tensor: Tensor = ONE) -> tuple[Tensor, Tensor]:
    """Encode at a tensor scale that multiplies."""
    return ops.bf16_to_nvfp4(weights, tensor, divides=False)


BYTES = torch.zeros(2, 32, dtype=torch.uint8)
MISFITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: nvfp4(torch.zeros(2, 24, dtype=torch.bfloat16)), "weights: expected a multiple of 16 columns, found 24"),
    (lambda: nvfp4(torch.zeros(2, 32)), r"weights: expected torch.bfloat16 \[R, K\], found torch.float32"),
    (lambda: nvfp4(bf16(WEIGHTS), ONE.double()), "tensor: expected torch.float32 of one number, found torch.float64"),
    (lambda: nvfp4(bf16(WEIGHTS), torch.ones(2)), r"tensor: expected torch.float32 of one number, found .* \[2\]"),
    (lambda: nvfp4(bf16(WEIGHTS), ONE.to("meta")), "tensor: expected on cpu, found on meta"),
    (
        lambda: ops.nvfp4_to_bf16(BYTES, BYTES[:, :3], ONE, divides=False),
        r"scale: expected \[2, 4\] for codes \[2, 32\]",
    ),
    (lambda: ops.nvfp4_to_bf16(BYTES[:, :4], BYTES, ONE, divides=False), "codes: expected a multiple of 8 columns"),
    (lambda: ops.mxfp4_to_bf16(BYTES, BYTES[:, :4]), r"scale: expected \[2, 2\] for codes \[2, 32\], found \[2, 4\]"),
    (lambda: ops.mxfp4_to_bf16(BYTES.float(), BYTES), r"codes: expected torch.uint8 \[R, K\]"),
    (lambda: ops.bf16_to_mxfp4(torch.zeros(2, 48, dtype=torch.bfloat16)), "weights: expected a multiple of 32 columns"),
    (
        lambda: ops.fake_quantize_mxfp4(torch.zeros(32, dtype=torch.bfloat16)),
        r"weights: expected torch.bfloat16 \[R, K\]",
    ),
]


@pytest.mark.parametrize(("act", "said"), MISFITS)
def test_what_does_not_fit(act: Callable[[], Any], said: str) -> None:
    """Another dtype, shape or device than the format has is named with what was expected."""
    with pytest.raises(UsageError, match=said):
        act()
