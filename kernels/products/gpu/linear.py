"""x @ weight.T on a GPU, for weights of any packed format, which are unpacked in registers and never written.

Two forms. `_linear` multiplies tiles on the matrix units; `_vector` is for a row or a few of x, where these would be
idle. Both may sum parts of K in different programs, each into its own float32 workspace; `_sum_splits` adds the parts
in a fixed order, so that equal inputs give equal bits.

N and K are compile-time constants (a model has few shapes), M is not: a kernel is compiled once for a shape of weights
and a configuration.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import round_to
from k2quant.kernels.products.gpu.tiles import (
    finished,
    fp4_codes,
    fp4_factor,
    fp8_numbers,
    int4_codes,
    multiply,
    multiply_thin,
)
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config

SUM_BLOCK = 1024
"""Results that a program of `_sum_splits` adds up."""

WGMMA_ROWS = 64
"""Rows of a tile of x from which on a Hopper GPU reads weights from shared memory only."""

PAIRS_OF_A_WARP = 512
"""Codes in two words for each of the 32 threads of a warp."""

WORDS = ("nvfp4", "mxfp4")
"""Formats whose codes are bytes to torch, and words of eight to the kernels."""

THIN_ROWS = 16
"""Rows of a tile from which on x is the left factor of a product, as `multiply_thin` has it."""

THIN_DEPTH = 128
"""Columns that `multiply_thin` needs: an eighth of them is the least that matrix units take, 16."""


def linear(x: Tensor, weight: PackedWeight, config: Config) -> Tensor:
    """Return x @ weight.T, `[M, N]` in the dtype of x, summed in float32 and rounded once.

    Args:
        x: BF16, FP16 or float32 `[M, K]`, its last stride 1; on the device of the weight.
        weight: of one matrix; INT4 in the layout `groups`.
        config: of the form `tile` or `vector`. Its depth is lowered to what divides K, its splits to what divides the
            number of steps through K.
    """
    count, columns = x.shape
    rows = weight.shape[0]
    vector = config.form == "vector"
    kind = constants_of(weight)
    depth = config.depth_for(columns, columns if vector else tile_columns(weight))
    width, warps = fitted(config, depth)
    splits = divisor(columns // depth, config.splits)
    out = x.new_empty(count, rows)
    target = out if splits == 1 else x.new_empty(splits, count, rows, dtype=torch.float32)
    constants: dict[str, Any] = kind | {
        "N": rows,
        "K": columns,
        "BLOCK_N": width,
        "BLOCK_K": depth,
        "SPLITS": splits,
    }
    tiles = triton.cdiv(rows, width)
    # The stride of a single row means nothing, and might have Triton compile the kernel once more.
    arguments = (x, *parts_of(weight), target, count, x.stride(0) if count > 1 else columns)
    options: dict[str, Any] = {"warps": warps, "stages": config.stages}
    if vector:
        constants |= {"LANES": 32 * warps, "STAGES": config.stages}
        launch(_vector, (count, tiles, splits), *arguments, **options, **constants)
    else:
        constants |= {"BLOCK_M": config.rows, "GROUP": config.group, "THIN": thin(weight, x.dtype, config.rows, depth)}
        grid = (triton.cdiv(count, config.rows) * tiles, splits)
        launch(_linear, grid, *arguments, **options, **constants)
    return out if splits == 1 else add_splits(target, out)


def add_splits(parts: Tensor, out: Tensor) -> Tensor:
    """Add float32 `[splits, M, N]` in order into `out` `[M, N]`, rounding once, and return it."""
    splits, count, rows = parts.shape
    grid = (triton.cdiv(count * rows, SUM_BLOCK),)
    launch(_sum_splits, grid, parts, out, count, N=rows, SPLITS=splits, BLOCK=SUM_BLOCK)
    return out


def constants_of(weight: PackedWeight) -> dict[str, Any]:
    """Return the constants by which a kernel reads a weight.

    Raises:
        UsageError: the weight is not in a GPU's layout.
    """
    if weight.layout != weight.gpu_layout:
        raise UsageError(
            f"expected an {weight.format.upper()} weight in the layout {weight.gpu_layout}, found {weight.layout}; "
            "prepare it on the GPU"
        )
    divides = weight.whole is not None and bool(weight.numbers[0])
    return {
        "FORMAT": weight.format,
        "SCALE_ROWS": weight.block[0],
        "SCALE_COLUMNS": weight.block[1],
        "DIVIDES": divides,
    }


def parts_of(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and tensor scales as the kernels read them; where there are none, scales stand in unread."""
    return codes_of(weight), weight.scale, weight.scale if weight.whole is None else weight.whole


def tile_columns(weight: PackedWeight) -> int:
    """Return how many columns a tile may span: those of a block where it must lie in one, as of FP8, else all."""
    return weight.block[1] if weight.tile_in_block else weight.shape[-1]


def codes_of(weight: PackedWeight) -> Tensor:
    """Return the codes as the kernels read them: e4m3 as plain bytes, FP4 as words, and all in places of 16 bytes."""
    codes = weight.bits
    codes = codes if codes.is_meta or codes.data_ptr() % 16 == 0 else codes.clone()
    return codes.view(torch.int32) if weight.format in WORDS else codes


def fitted(config: Config, depth: int) -> tuple[int, int]:
    """Return BLOCK_N and the number of warps for a tile of so many columns of the weight.

    A thread must hold two neighbouring words of INT4 codes, for they are unpacked together; so a small tile has fewer
    warps, and the smallest is made wider.
    """
    width = max(config.columns, PAIRS_OF_A_WARP // depth)
    return width, min(config.warps, max(1, width * depth // PAIRS_OF_A_WARP))


def thin(weight: PackedWeight, dtype: torch.dtype, rows: int, depth: int) -> bool:
    """Return whether a tile of so many rows of x and columns of the weight is for `tiles.multiply_thin`."""
    fits = weight.format == "int4" and dtype == torch.bfloat16
    return fits and THIN_ROWS <= rows < WGMMA_ROWS and depth >= THIN_DEPTH


def divisor(steps: int, wanted: int) -> int:
    """Return the largest number of equal parts, at most `wanted`, that the steps can be divided into."""
    return next(parts for parts in range(min(wanted, steps), 0, -1) if steps % parts == 0)


@triton.jit(do_not_specialize=["M"])
def _linear(
    x_ptr,
    codes_ptr,
    scale_ptr,
    whole_ptr,
    out_ptr,
    M,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    THIN: tl.constexpr,
):
    """Store a tile `[BLOCK_M, BLOCK_N]` of x @ weight.T, or of one part of its sum.

    x is `[M, K]` with rows `stride` apart; out `[M, N]` in the dtype of x, or float32 `[SPLITS, M, N]`.
    """
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    split = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps: tl.constexpr = K // BLOCK_K // SPLITS
    # int64: M rows of x may hold more than 2^31 numbers.
    x_rows = x_ptr + m.to(tl.int64) * stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K
        if THIN:
            acc = multiply_thin(acc, x_rows, m < M, codes_ptr, scale_ptr, n, n < N, k, N, BLOCK_K)
        else:
            x = tl.load(x_rows[:, None] + k + tl.arange(0, BLOCK_K)[None, :], mask=(m < M)[:, None], other=0.0)
            acc = multiply(
                acc,
                x,
                codes_ptr,
                scale_ptr,
                n,
                n < N,
                k,
                N,
                K,
                FORMAT,
                SCALE_ROWS,
                SCALE_COLUMNS,
                BLOCK_K,
                SCALE_ROWS % BLOCK_N == 0,
            )
    acc = finished(acc, whole_ptr, FORMAT, DIVIDES)
    place = (split * M.to(tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(out_ptr + place, round_to(acc, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _vector(
    x_ptr,
    codes_ptr,
    scale_ptr,
    whole_ptr,
    out_ptr,
    M,
    stride,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store BLOCK_N results of one row of x, or one part of their sums; arguments as those of `_linear`.

    A lane reads 16 bytes of codes at a time, multiplies them by their columns of x, and only then by their scale: no
    weight is rounded, and lanes meet once, after the last column.
    """
    m = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    steps: tl.constexpr = K // BLOCK_K // SPLITS
    chunk: tl.constexpr = 16 if FORMAT == "fp8" else min(32, BLOCK_K)
    chunks: tl.constexpr = BLOCK_K // chunk
    # The lanes lie along one group's rows in INT4, where neighbouring rows are neighbours in memory, and along one
    # row's columns in the others. What is left of BLOCK_N are repeats: they use the same columns of x.
    high: tl.constexpr = min(BLOCK_N, max(1, LANES // chunks))
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if FORMAT == "int4":
        n = row.reshape(BLOCK_N // high, 1, high)
        part = tl.arange(0, chunks)[None, :, None]
        acc = tl.zeros((BLOCK_N // high, chunks, high), tl.float32)
    else:
        n = row.reshape(BLOCK_N // high, high, 1)
        part = tl.arange(0, chunks)[None, None, :]
        acc = tl.zeros((BLOCK_N // high, high, chunks), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        k = (split * steps + step) * BLOCK_K
        x = tl.load(x_ptr + m * stride + k + tl.arange(0, BLOCK_K)).to(tl.float32)
        if FORMAT == "int4":
            x = x.reshape(1, chunks, 1, chunk)
            codes, scale = _int4_chunks(codes_ptr, scale_ptr, n, k // 32 + part, N)
            acc += tl.sum(codes * x, 3) * scale
        elif FORMAT == "fp8":
            x = x.reshape(1, 1, chunks, chunk)
            codes, scale = _fp8_chunks(codes_ptr, scale_ptr, n, k + part * 16, N, K, SCALE_ROWS, SCALE_COLUMNS)
            acc += tl.sum(codes * x, 3) * scale
        else:
            blocks: tl.constexpr = chunk // SCALE_COLUMNS
            x = x.reshape(1, 1, chunks, blocks, SCALE_COLUMNS)
            codes, scale = _fp4_chunks(codes_ptr, scale_ptr, n, k + part * chunk, N, K, FORMAT, SCALE_COLUMNS, blocks)
            acc += tl.sum(tl.sum(codes * x, 4) * scale, 3)
    total = tl.sum(acc, 1 if FORMAT == "int4" else 2).reshape(BLOCK_N)
    total = finished(total, whole_ptr, FORMAT, DIVIDES)
    tl.store(out_ptr + (split * M.to(tl.int64) + m) * N + row, round_to(total, out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _int4_chunks(codes_ptr, scale_ptr, n, group, N: tl.constexpr):
    """Return float32 codes `[R, G, B, 32]` of groups `[1, G, 1]` of rows `[R, 1, B]`, and their scales `[R, G, B]`."""
    place = group.to(tl.int64) * N + n
    ok = (n < N) & (group >= 0)
    words = tl.load(codes_ptr + place[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :], ok[:, :, :, None], 0)
    scale = tl.load(scale_ptr + place, ok, 0.0).to(tl.float32)
    R: tl.constexpr = words.shape[0]
    G: tl.constexpr = words.shape[1]
    B: tl.constexpr = words.shape[2]
    codes = int4_codes(words.reshape(R * G * B, 4)).reshape(R, G, B, 32)
    return codes.to(tl.float32), scale


@triton.jit
def _fp8_chunks(
    codes_ptr, scale_ptr, n, k, N: tl.constexpr, K: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr
):
    """Return float32 codes `[R, B, C, 16]` from columns `[1, 1, C]` on of rows `[R, B, 1]`, and scales `[R, B, C]`."""
    ok = (n < N) & (k >= 0)
    place = (n.to(tl.int64) * K + k)[:, :, :, None] + tl.arange(0, 16)[None, None, None, :]
    codes = fp8_numbers(tl.load(codes_ptr + place, ok[:, :, :, None], 0), tl.bfloat16)
    block = (n // SCALE_ROWS).to(tl.int64) * tl.cdiv(K, SCALE_COLUMNS) + k // SCALE_COLUMNS
    return codes.to(tl.float32), tl.load(scale_ptr + block, ok, 0.0)


@triton.jit
def _fp4_chunks(
    codes_ptr,
    scale_ptr,
    n,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Return float32 codes `[R, B, C, BLOCKS, SCALE_COLUMNS]` from columns `[1, 1, C]` on of rows `[R, B, 1]`.

    And what multiplies them, `[R, B, C, BLOCKS]`, of NVFP4 without the tensor scale.
    """
    words: tl.constexpr = BLOCKS * SCALE_COLUMNS // 8
    ok = ((n < N) & (k >= 0))[:, :, :, None]
    place = (n.to(tl.int64) * (K // 8) + k // 8)[:, :, :, None] + tl.arange(0, words)[None, None, None, :]
    packed = tl.load(codes_ptr + place, ok, 0)
    block = (n.to(tl.int64) * (K // SCALE_COLUMNS) + k // SCALE_COLUMNS)[:, :, :, None]
    scale = tl.load(scale_ptr + block + tl.arange(0, BLOCKS)[None, None, None, :], ok, 0).to(tl.int32)
    R: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    C: tl.constexpr = packed.shape[2]
    codes = fp4_codes(packed.reshape(R * B * C, words)).to(tl.float32).reshape(R, B, C, BLOCKS, SCALE_COLUMNS)
    return codes, fp4_factor(scale, FORMAT)


@triton.jit(do_not_specialize=["M"])
def _sum_splits(parts_ptr, out_ptr, M, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the float32 parts `[SPLITS, M, N]` in order, and store their sum `[M, N]`, rounded once."""
    count = M.to(tl.int64) * N
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts_ptr + split * count + place, mask=place < count, other=0.0)
    tl.store(out_ptr + place, round_to(total, out_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def swizzled(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return row and column of a tile; GROUP tiles of rows in turn use a tile of columns, while it is in the cache."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % height, tile % width // height
