"""Operators from FP8 to INT4 and from INT4 to FP8: the bits of the two steps, and nothing written as BF16."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.cpu import fused as on_cpu
from k2quant.kernels.codecs.grids import BLOCK, GROUP, Grid
from k2quant.kernels.codecs.ops.checks import E4M3, expect, expect_block, expect_fp8, expect_grid, expect_int4
from k2quant.kernels.codecs.ops.panels import Pair, new_bf16, new_fp8, new_int4, over_rows, part, stored
from k2quant.kernels.codecs.views import as_bytes, as_codes, bits_of, widened
from k2quant.kernels.devices.gpus import on_triton


def fp8_to_int4(codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK, grid: Grid = "moonshot") -> Pair:
    """Do `fp8_to_bf16` and `bf16_to_int4` without writing BF16."""
    expect_grid(grid)
    expect_fp8(codes, scale, block)
    expect(codes, "codes", E4M3, multiple=GROUP)
    return cast("Pair", torch.ops.k2quant.fp8_to_int4(as_bytes(codes), scale, *block, grid))


def int4_to_fp8(packed: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Pair:
    """Do `int4_to_bf16` and `bf16_to_fp8` without writing BF16."""
    expect_block(block)
    expect_int4(packed, scale)
    codes, out_scale = torch.ops.k2quant.int4_to_fp8(packed, scale, *block)
    return as_codes(codes), out_scale


@custom_op("k2quant::fp8_to_int4", mutates_args=())
def _fp8_to_int4(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, grid: str) -> tuple[Tensor, Tensor]:
    block, rule = (block_rows, block_columns), cast("Grid", grid)
    if on_triton(codes):
        from k2quant.kernels.codecs.gpu import int4 as on_gpu

        return on_gpu.fp8_to_int4(as_codes(codes), scale, block, rule)[:2]
    if codes.device.type != "cpu":
        return reference.fp8_to_int4(as_codes(codes), scale, block, rule)[:2]
    packed, out_scale = new_int4(codes)
    source, factors, words, narrow = bits_of(codes), widened(scale), bits_of(packed), bits_of(out_scale)
    over_rows(
        len(source),
        block_rows,
        lambda a, b: on_cpu.fp8_to_int4(
            source[a:b], part(factors, a, b, block_rows), block, rule, words[a:b], narrow[a:b]
        ),
    )
    return packed, out_scale


@_fp8_to_int4.register_fake
def _(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, grid: str) -> tuple[Tensor, Tensor]:
    return new_int4(codes)


@custom_op("k2quant::int4_to_fp8", mutates_args=())
def _int4_to_fp8(packed: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    block = block_rows, block_columns
    if on_triton(packed):
        from k2quant.kernels.codecs.gpu import fp8 as on_gpu

        return stored(on_gpu.int4_to_fp8(packed, scale, block=block))
    if packed.device.type != "cpu":
        return stored(reference.int4_to_fp8(packed, scale.float(), GROUP, block))
    codes, out_scale = new_fp8(new_bf16(packed, packed.shape[1] * 8), block)
    words, wide, out, factors = bits_of(packed), widened(scale), bits_of(codes), bits_of(out_scale)
    over_rows(
        len(words),
        block_rows,
        lambda a, b: on_cpu.int4_to_fp8(words[a:b], wide[a:b], GROUP, block, out[a:b], part(factors, a, b, block_rows)),
    )
    return codes, out_scale


@_int4_to_fp8.register_fake
def _(packed: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    return new_fp8(new_bf16(packed, packed.shape[1] * 8), (block_rows, block_columns))
