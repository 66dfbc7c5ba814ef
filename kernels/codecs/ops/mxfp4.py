"""Operators between BF16 and MXFP4, and rounding to MXFP4 and back."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.cpu import mxfp4 as on_cpu
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK
from k2quant.kernels.codecs.ops.checks import expect, expect_shape
from k2quant.kernels.codecs.ops.panels import Pair, new_bf16, new_fp4, over_rows
from k2quant.kernels.codecs.views import bits_of
from k2quant.kernels.devices.gpus import on_triton


def bf16_to_mxfp4(weights: Tensor) -> Pair:
    """Encode BF16 `[R, K]` as MXFP4 by the plain rule; K is a multiple of 32.

    Returns:
        uint8 codes `[R, K/2]`, the even column in the low nibble, and scales, E8M0 bytes, uint8 `[R, K/32]`.

    Raises:
        UsageError: the weights do not fit.
        ValueAt: on a CPU, a weight is not finite, or would not be after decoding.
    """
    expect(weights, "weights", torch.bfloat16, multiple=MXFP4_BLOCK)
    return cast("Pair", torch.ops.k2quant.bf16_to_mxfp4(weights))


def mxfp4_to_bf16(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode uint8 codes `[R, K/2]` with E8M0 bytes, uint8 `[R, K/32]`, to BF16 `[R, K]`; that is exact.

    Raises:
        UsageError: the tensors do not fit each other.
        ValueAt: on a CPU, a scale is NaN, or a product exceeds BF16.
    """
    expect(codes, "codes", torch.uint8, multiple=MXFP4_BLOCK // 2)
    expect(scale, "scale", torch.uint8)
    expect_shape(codes, scale, (len(codes), codes.shape[1] * 2 // MXFP4_BLOCK), f"codes {list(codes.shape)}")
    return cast("Tensor", torch.ops.k2quant.mxfp4_to_bf16(codes, scale))


def fake_quantize_mxfp4(weights: Tensor) -> Tensor:
    """Round BF16 `[R, K]` to MXFP4 and back, in one pass: what `bf16_to_mxfp4` decodes to. It has no gradient."""
    expect(weights, "weights", torch.bfloat16, multiple=MXFP4_BLOCK)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_mxfp4(weights))


@custom_op("k2quant::bf16_to_mxfp4", mutates_args=())
def _bf16_to_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.bf16_to_mxfp4(weights)[:2]
    if weights.device.type != "cpu":
        return reference.bf16_to_mxfp4(weights)[:2]
    codes, scale = new_fp4(weights, MXFP4_BLOCK)
    source, out, factors = bits_of(weights), bits_of(codes), bits_of(scale)
    over_rows(len(source), 1, lambda a, b: on_cpu.encode(source[a:b], out[a:b], factors[a:b]))
    return codes, scale


@_bf16_to_mxfp4.register_fake
def _(weights: Tensor) -> tuple[Tensor, Tensor]:
    return new_fp4(weights, MXFP4_BLOCK)


@custom_op("k2quant::mxfp4_to_bf16", mutates_args=())
def _mxfp4_to_bf16(codes: Tensor, scale: Tensor) -> Tensor:
    if on_triton(codes):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.mxfp4_to_bf16(codes, scale)
    if codes.device.type != "cpu":
        return reference.mxfp4_to_bf16(codes, scale)
    out = new_bf16(codes, codes.shape[1] * 2)
    source, factors, bits = bits_of(codes), bits_of(scale), bits_of(out)
    over_rows(len(source), 1, lambda a, b: on_cpu.decode(source[a:b], factors[a:b], bits[a:b]))
    return out


@_mxfp4_to_bf16.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return new_bf16(codes, codes.shape[1] * 2)


@custom_op("k2quant::fake_quantize_mxfp4", mutates_args=())
def _fake_quantize_mxfp4(weights: Tensor) -> Tensor:
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.fake_quantize_mxfp4(weights)
    if weights.device.type != "cpu":
        return reference.fake_quantize_mxfp4(weights)
    out = new_bf16(weights, weights.shape[1])
    source, values = bits_of(weights), bits_of(out)
    over_rows(len(source), 1, lambda a, b: on_cpu.fake_quantize(source[a:b], values[a:b]))
    return out


@_fake_quantize_mxfp4.register_fake
def _(weights: Tensor) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)
