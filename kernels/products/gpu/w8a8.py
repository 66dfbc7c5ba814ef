"""FP8 by FP8 on a GPU: activations are rounded to e4m3 in 1x128 blocks, then multiplied by block-FP8 weights.

The matrix units add FP8 products with about 14 bits, so only 128 of them are added there; their sums are scaled and
added in float32. It needs a GPU with FP8 units, compute capability 8.9 or later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import INTERPRETED, round_to, round_to_e4m3
from k2quant.kernels.products.gpu.linear import add_splits, divisor, swizzled
from k2quant.kernels.products.gpu.tiles import fp8_numbers, fp8_scale
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.tables.configs import Config

BLOCK = 128
"""Columns that share a scale, of activations and of weights."""

CHUNK = 1024
"""Columns that a program of `_quantize` rounds: 8 for each of its lanes, 16 bytes of BF16."""


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `[M, K]` to e4m3 codes `[M, K]` with float32 scales `[M, ceil(K/128)]`, in one pass.

    Bit for bit `reference.fp8_quantize_activations`.

    Args:
        x: BF16, FP16 or float32, its last stride 1.
    """
    count, columns = x.shape
    codes = x.new_empty(count, columns, dtype=torch.uint8)
    scale = x.new_empty(count, triton.cdiv(columns, BLOCK), dtype=torch.float32)
    grid = (count, triton.cdiv(columns, CHUNK))
    launch(_quantize, grid, x, codes, scale, x.stride(0), K=columns, COLUMNS=CHUNK, exact=True)
    return codes.view(torch.float8_e4m3fn), scale


def linear_w8a8(x: Tensor, weight: Fp8Weight, config: Config) -> Tensor:
    """Return x @ weight.T, `[M, N]` in the dtype of x, with x rounded to FP8 and sums in float32.

    Args:
        x: BF16, FP16 or float32 `[M, K]`, its last stride 1; on the device of the weight.
        weight: of one matrix, in blocks of 128 columns and any rows.
        config: of the form `tile`; its depth is always 128. Splits are lowered to what divides the steps through K.

    Raises:
        UsageError: the weight's blocks are not 128 columns wide.
    """
    if weight.block[1] != BLOCK:
        raise UsageError(
            f"weight_block_size: expected {BLOCK} columns for FP8 activations, found {weight.block[1]}; "
            "keep the activations in BF16"
        )
    count, columns = x.shape
    rows = weight.shape[0]
    codes, scale = quantize_activations(x)
    splits = divisor(triton.cdiv(columns, BLOCK), config.splits)
    out = x.new_empty(count, rows)
    target = out if splits == 1 else x.new_empty(splits, count, rows, dtype=torch.float32)
    launch(
        _linear_w8a8,
        (triton.cdiv(count, config.rows) * triton.cdiv(rows, config.columns), splits),
        codes,
        scale,
        weight.codes,
        weight.scale,
        target,
        count,
        warps=config.warps,
        stages=config.stages,
        N=rows,
        K=columns,
        SCALE_ROWS=weight.block[0],
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        SPLITS=splits,
        GROUP=config.group,
    )
    return out if splits == 1 else add_splits(target, out)


@triton.jit
def _quantize(x_ptr, codes_ptr, scale_ptr, stride, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the codes of COLUMNS columns of a row of x, and a scale for each 128; rows of x are `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride + column, mask=column < K, other=0.0).to(tl.float32)
    blocks = x.reshape(COLUMNS // 128, 128)
    amax = tl.maximum(tl.max(tl.abs(blocks), 1), 1e-10)
    # A maximum passes NaN over; the block it stands in is NaN all the same.
    nan = (blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
    amax = tl.where(tl.max(nan.to(tl.int32), 1) > 0, float("nan"), amax)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    ratio = tl.div_rn(blocks, tl.broadcast_to(scale[:, None], blocks.shape))
    tl.store(codes_ptr + row * K + column, round_to_e4m3(ratio).reshape(COLUMNS), mask=column < K)
    block = tl.program_id(1) * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
    width: tl.constexpr = (K + 127) // 128
    tl.store(scale_ptr + row * width + block, scale, mask=block < width)


@triton.jit(do_not_specialize=["M"])
def _linear_w8a8(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store a tile `[BLOCK_M, BLOCK_N]` of the product, or of one part of its sum.

    x holds e4m3 codes `[M, K]` with scales `[M, ceil(K/128)]`; out is `[M, N]`, or float32 `[SPLITS, M, N]`.
    """
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    split = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 128)
    width: tl.constexpr = (K + 127) // 128
    steps: tl.constexpr = width // SPLITS
    # int64: rows of x and of the weight may hold more than 2^31 codes.
    x_tile = x_ptr + m.to(tl.int64)[:, None] * K + lane[None, :]
    w_tile = codes_ptr + n.to(tl.int64)[None, :] * K + lane[:, None]
    x_scales = x_scale_ptr + m.to(tl.int64) * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        k = (split * steps + step) * 128
        x_ok = (m < M)[:, None]
        w_ok = (n < N)[None, :]
        if K % 128 != 0:
            x_ok = x_ok & (k + lane < K)[None, :]
            w_ok = w_ok & (k + lane < K)[:, None]
        product = _dot_e4m3(tl.load(x_tile + k, mask=x_ok, other=0.0), tl.load(w_tile + k, mask=w_ok, other=0.0))
        x_scale = tl.load(x_scales + k // 128, mask=m < M, other=0.0)
        if SCALE_ROWS % BLOCK_N == 0:  # one block's scale for all columns of the tile
            x_scale *= fp8_scale(scale_ptr, tile_n * BLOCK_N, True, k, K, SCALE_ROWS, 128)
            acc += product * x_scale[:, None]
        else:
            scale = fp8_scale(scale_ptr, n, n < N, k, K, SCALE_ROWS, 128)
            acc += product * x_scale[:, None] * scale[None, :]
    place = (split * M.to(tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(out_ptr + place, round_to(acc, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _dot_e4m3(a, b):
    """Return the float32 product of two tiles of e4m3 codes."""
    if INTERPRETED:
        left = fp8_numbers(a.to(tl.uint8, bitcast=True), tl.float32)
        right = fp8_numbers(b.to(tl.uint8, bitcast=True), tl.float32)
        return tl.dot(left, right, input_precision="ieee")
    # Straight from shared memory to the matrix units: even a bitcast in between would bring both tiles into registers.
    return tl.dot(a, b)
