"""Operators between BF16 and NVFP4, and rounding to NVFP4 and back.

The tensor scale goes in as a tensor, float32 of one number on the device of the weights, so that nothing waits for a
GPU. `divides` says which of its two forms it has: ModelOpt's multiplies, compressed-tensors' divides.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.cpu import nvfp4 as on_cpu
from k2quant.kernels.codecs.fp4 import NVFP4_BLOCK, TensorScale
from k2quant.kernels.codecs.ops.checks import expect, expect_shape
from k2quant.kernels.codecs.ops.panels import Pair, new_bf16, new_fp4, over_rows
from k2quant.kernels.codecs.views import bits_of
from k2quant.kernels.devices.gpus import on_triton


def bf16_to_nvfp4(weights: Tensor, tensor: Tensor, *, divides: bool) -> Pair:
    """Encode BF16 `[R, K]` as NVFP4 by the plain rule; K is a multiple of 16.

    Args:
        weights: BF16 `[R, K]`.
        tensor: float32 of one number, the tensor scale: `nvfp4_tensor_scale` gives that of the weights' amax.
        divides: whether it divides (compressed-tensors) or multiplies (ModelOpt); the rules differ in more than that.

    Returns:
        uint8 codes `[R, K/2]`, the even column in the low nibble, and block scales, E4M3 bits, uint8 `[R, K/16]`.

    Raises:
        UsageError: the weights or the tensor scale do not fit.
        ValueAt: on a CPU, a weight is not finite, or would not be after decoding; a tensor scale is not above 0.
    """
    expect(weights, "weights", torch.bfloat16, multiple=NVFP4_BLOCK)
    _expect_tensor(tensor, weights)
    return cast("Pair", torch.ops.k2quant.bf16_to_nvfp4(weights, tensor, divides))


def nvfp4_to_bf16(codes: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Decode uint8 codes `[R, K/2]` with E4M3 bits, uint8 `[R, K/16]`, and a tensor scale, to BF16 `[R, K]`.

    Raises:
        UsageError: the tensors do not fit each other.
        ValueAt: on a CPU, a scale or the tensor scale is bad, or a product exceeds BF16.
    """
    expect(codes, "codes", torch.uint8, multiple=NVFP4_BLOCK // 2)
    expect(scale, "scale", torch.uint8)
    expect_shape(codes, scale, (len(codes), codes.shape[1] * 2 // NVFP4_BLOCK), f"codes {list(codes.shape)}")
    _expect_tensor(tensor, codes)
    return cast("Tensor", torch.ops.k2quant.nvfp4_to_bf16(codes, scale, tensor, divides))


def fake_quantize_nvfp4(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Round BF16 `[R, K]` to NVFP4 and back, in one pass: what `bf16_to_nvfp4` decodes to. It has no gradient.

    Arguments and errors are those of `bf16_to_nvfp4`.
    """
    expect(weights, "weights", torch.bfloat16, multiple=NVFP4_BLOCK)
    _expect_tensor(tensor, weights)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_nvfp4(weights, tensor, divides))


def nvfp4_tensor_scale(amax: Tensor, *, divides: bool) -> Tensor:
    """Return the tensor scale for weights whose largest magnitude is `amax`, by the rule of the layout's own tool.

    Args:
        amax: float32 or BF16 of one number, finite, such as `weights.abs().amax()`.
        divides: which form is asked for.

    Returns:
        float32, in the shape of `amax`. Nothing waits for its device.
    """
    return reference.nvfp4_tensor_scale(amax.float(), divides=divides)


@custom_op("k2quant::bf16_to_nvfp4", mutates_args=())
def _bf16_to_nvfp4(weights: Tensor, tensor: Tensor, divides: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - an operator's schema
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.bf16_to_nvfp4(weights, tensor, divides=divides)[:2]
    if weights.device.type != "cpu":
        return reference.bf16_to_nvfp4(weights, tensor, divides=divides)[:2]
    codes, scale = new_fp4(weights, NVFP4_BLOCK)
    source, out, factors, form = bits_of(weights), bits_of(codes), bits_of(scale), _form(tensor, divides=divides)
    over_rows(len(source), 1, lambda a, b: on_cpu.encode(source[a:b], form, out[a:b], factors[a:b]))
    return codes, scale


@_bf16_to_nvfp4.register_fake
def _(weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return new_fp4(weights, NVFP4_BLOCK)


@custom_op("k2quant::nvfp4_to_bf16", mutates_args=())
def _nvfp4_to_bf16(codes: Tensor, scale: Tensor, tensor: Tensor, divides: bool) -> Tensor:  # noqa: FBT001 - an operator's schema
    if on_triton(codes):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.nvfp4_to_bf16(codes, scale, tensor, divides=divides)
    if codes.device.type != "cpu":
        return reference.nvfp4_to_bf16(codes, scale, tensor, divides=divides)
    out = new_bf16(codes, codes.shape[1] * 2)
    source, factors, bits, form = bits_of(codes), bits_of(scale), bits_of(out), _form(tensor, divides=divides)
    over_rows(len(source), 1, lambda a, b: on_cpu.decode(source[a:b], factors[a:b], form, bits[a:b]))
    return out


@_nvfp4_to_bf16.register_fake
def _(codes: Tensor, *_: Any) -> Tensor:
    return new_bf16(codes, codes.shape[1] * 2)


@custom_op("k2quant::fake_quantize_nvfp4", mutates_args=())
def _fake_quantize_nvfp4(weights: Tensor, tensor: Tensor, divides: bool) -> Tensor:  # noqa: FBT001 - an operator's schema
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp4 as on_gpu

        return on_gpu.fake_quantize_nvfp4(weights, tensor, divides=divides)
    if weights.device.type != "cpu":
        return reference.fake_quantize_nvfp4(weights, tensor, divides=divides)
    out = new_bf16(weights, weights.shape[1])
    source, values, form = bits_of(weights), bits_of(out), _form(tensor, divides=divides)
    over_rows(len(source), 1, lambda a, b: on_cpu.fake_quantize(source[a:b], form, values[a:b]))
    return out


@_fake_quantize_nvfp4.register_fake
def _(weights: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


def _form(tensor: Tensor, *, divides: bool) -> TensorScale:
    return TensorScale(float(tensor), divides)


def _expect_tensor(tensor: Tensor, codes: Tensor) -> None:
    """Refuse what is no tensor scale beside these codes."""
    if tensor.dtype != torch.float32 or tensor.numel() != 1:
        raise UsageError(f"tensor: expected torch.float32 of one number, found {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != codes.device:
        raise UsageError(f"tensor: expected on {codes.device}, found on {tensor.device}; put both on one device")
