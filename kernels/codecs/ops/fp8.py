"""Operators between BF16 and block FP8, and rounding to FP8 and back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.cpu import fp8 as on_cpu
from k2quant.kernels.codecs.grids import BLOCK
from k2quant.kernels.codecs.ops.checks import expect, expect_block, expect_fp8
from k2quant.kernels.codecs.ops.panels import Pair, new_bf16, new_fp8, over_rows, part, stored
from k2quant.kernels.codecs.views import as_bytes, as_codes, bits_of, widened
from k2quant.kernels.devices.gpus import on_triton


def bf16_to_fp8(weights: Tensor, block: tuple[int, int] = BLOCK) -> Pair:
    """Encode BF16 `[R, K]` as e4m3 codes `[R, K]` with float32 scales `[ceil(R/block[0]), ceil(K/block[1])]`."""
    expect_block(block)
    expect(weights, "weights", torch.bfloat16)
    codes, scale = torch.ops.k2quant.bf16_to_fp8(weights, *block)
    return as_codes(codes), scale


def fp8_to_bf16(codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Decode e4m3 codes `[R, K]` with float32 scales `[ceil(R/block[0]), ceil(K/block[1])]` to BF16 `[R, K]`."""
    expect_fp8(codes, scale, block)
    return cast("Tensor", torch.ops.k2quant.fp8_to_bf16(as_bytes(codes), scale, *block))


def fake_quantize_fp8(weights: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Round BF16 `[R, K]` to block FP8 and back, in one pass. It has no gradient either."""
    expect_block(block)
    expect(weights, "weights", torch.bfloat16)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_fp8(weights, *block))


@custom_op("k2quant::bf16_to_fp8", mutates_args=())
def _bf16_to_fp8(weights: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    block = block_rows, block_columns
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp8 as on_gpu

        return stored(on_gpu.bf16_to_fp8(weights, block))
    if weights.device.type != "cpu":
        return stored(reference.bf16_to_fp8(weights, block))
    codes, scale = new_fp8(weights, block)
    source, out, factors = bits_of(weights), bits_of(codes), bits_of(scale)
    over_rows(
        len(source),
        block_rows,
        lambda a, b: on_cpu.encode(source[a:b], block, out[a:b], part(factors, a, b, block_rows)),
    )
    return codes, scale


@_bf16_to_fp8.register_fake
def _(weights: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    return new_fp8(weights, (block_rows, block_columns))


@custom_op("k2quant::fp8_to_bf16", mutates_args=())
def _fp8_to_bf16(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    block = block_rows, block_columns
    if on_triton(codes):
        from k2quant.kernels.codecs.gpu import fp8 as on_gpu

        return on_gpu.fp8_to_bf16(as_codes(codes), scale, block)
    if codes.device.type != "cpu":
        return reference.fp8_to_bf16(as_codes(codes), scale, block)
    out = new_bf16(codes, codes.shape[1])
    source, factors, bits = bits_of(codes), widened(scale), bits_of(out)
    over_rows(
        len(source),
        block_rows,
        lambda a, b: on_cpu.decode(source[a:b], part(factors, a, b, block_rows), block, bits[a:b]),
    )
    return out


@_fp8_to_bf16.register_fake
def _(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return new_bf16(codes, codes.shape[1])


@custom_op("k2quant::fake_quantize_fp8", mutates_args=())
def _fake_quantize_fp8(weights: Tensor, block_rows: int, block_columns: int) -> Tensor:
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp8 as on_gpu

        return on_gpu.fake_quantize_fp8(weights, (block_rows, block_columns), recover=True)
    return cast("Tensor", _fp8_to_bf16(*_bf16_to_fp8(weights, block_rows, block_columns), block_rows, block_columns))


@_fake_quantize_fp8.register_fake
def _(weights: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)
