"""Block-FP8 codecs on a GPU: one launch each, one read and one write of memory, the bits of `reference`.

Encoding works on whole blocks: a program takes one large block or several small ones. Blocks are numbered row by row,
matrix by matrix; their edges may be ragged, and a matrix of experts is one of a stack.

Nothing here waits for the device. What the seam refuses (see `values`) is reported in a flag, which the caller reads
when it likes; the output is void then.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.codecs.gpu.bf16 import INFINITY, LARGEST_FLOAT, any_of, magnitude_of, round_to_bf16, tally
from k2quant.kernels.codecs.gpu.figures import bits_of, flag_for, sums_for, total
from k2quant.kernels.codecs.gpu.fp8_rules import (
    fp8_code,
    fp8_multiple,
    fp8_power,
    fp8_scale,
    fp8_scales_allowed,
    fp8_value,
)
from k2quant.kernels.codecs.gpu.loads import load_bf16, load_fp8, load_int4
from k2quant.kernels.devices.launch import launch

_ROWS, _UNITS = 8, 16
"""Rows, and units of 32 columns, that a program decodes: 512 columns divide nearly every width of Kimi K2."""

_SIZE = 2048
"""Weights with which a step of encoding deals: 16 a thread."""

_SAMPLE = 256
"""Weights of a step of the search for a scale; an ordinary block is turned away by the first."""


def native(device: torch.device) -> bool:
    """Return whether a device rounds to e4m3 by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


# --- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _fp8_to_bf16(
    codes_ptr,
    scale_ptr,
    out_ptr,
    bad_ptr,
    R,
    K,
    ACROSS,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Write a tile of ROWS rows and 32 * UNITS columns; ACROSS tiles lie side by side."""
    pid = tl.program_id(0)
    row = pid // ACROSS * ROWS + tl.arange(0, ROWS)
    unit = pid % ACROSS * UNITS + tl.arange(0, UNITS)
    bits = load_fp8(codes_ptr, scale_ptr, bad_ptr, row, unit, R, K, HEIGHT, WIDTH, CHECK)
    column = (unit * 32)[:, None] + tl.arange(0, 32)[None, :]
    place = row.to(tl.int64)[:, None, None] * K + column[None, :, :]
    tl.store(out_ptr + place, bits, mask=(row < R)[:, None, None] & (column < K)[None, :, :])


def fp8_to_bf16(
    codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128), *, bad: Tensor | None = None
) -> Tensor:
    """Return BF16 `[R, K]`: code * scale, rounded to float32 and then to BF16.

    Args:
        codes: float8_e4m3fn `[R, K]`.
        scale: float32 `[ceil(R/block[0]), ceil(K/block[1])]`.
        block: rows and columns that share a scale; any.
        bad: int32 `[1]`, set to 1 if a scale is negative, NaN or infinite, a code NaN, or a weight exceeds BF16.
    """
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=codes.device)
    across = triton.cdiv(columns, 32 * _UNITS)
    launch(
        _fp8_to_bf16,
        (triton.cdiv(rows, _ROWS) * across,),
        bits_of(codes),
        scale.contiguous(),
        bits_of(out),
        flag_for(bad, codes),
        rows,
        columns,
        across,
        HEIGHT=block[0],
        WIDTH=block[1],
        CHECK=bad is not None,
        ROWS=_ROWS,
        UNITS=_UNITS,
        exact=True,
    )
    return out


# --- encoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _load(source_ptr, source_scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE: tl.constexpr, CHECK: tl.constexpr):
    """Load weights as BF16 bits: of INT4 with this GROUP_SIZE; of BF16 or float32 if it is 0."""
    if GROUP_SIZE > 0:
        bits = load_int4(source_ptr, source_scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE, CHECK)
    else:
        bits = load_bf16(source_ptr + (row * K + column), inside)
    return bits


@triton.jit
def _part(step, first, left, height, width, W: tl.constexpr, SIZE: tl.constexpr):
    """Return rows, columns and mask `[B, SIZE]` of the SIZE weights of each block with which a step deals."""
    weight = step * SIZE + tl.arange(0, SIZE)[None, :]
    i, j = weight // W, weight % W
    return first[:, None] + i, left[:, None] + j, (i < height[:, None]) & (j < width[:, None])


@triton.jit
def _encode_fp8(
    source_ptr,
    source_scale_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    bad_ptr,
    R,
    K,
    blocks,
    DOWN,
    ACROSS,
    GROUP_SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RECOVER: tl.constexpr,
    FAKE: tl.constexpr,
    FIGURES: tl.constexpr,
    NATIVE: tl.constexpr,
    CHECK: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
    SEARCHES: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Encode B blocks of HEIGHT x WIDTH weights; if FAKE, write the decoded weights to `out_ptr`.

    A matrix has DOWN x ACROSS blocks, whose lines are held as W wide. A block is read in STEPS of SIZE weights, once
    for its largest and, from the cache, once more for its codes: kept in registers between, it would leave too few for
    loads in flight. The search for a scale, near amax/448 and at a power of two at once, takes up to SEARCHES steps of
    SAMPLE weights.
    """
    block = tl.program_id(0) * B + tl.arange(0, B)
    top = (block // ACROSS) % DOWN * HEIGHT
    left = block % ACROSS * WIDTH
    # Edges are those of the block's own matrix; rows count through the whole stack.
    height = tl.where(block < blocks, tl.minimum(R - top, HEIGHT), 0)
    width = tl.minimum(K - left, WIDTH)
    first = (block // (DOWN * ACROSS)).to(tl.int64) * R + top

    largest = tl.zeros((B, SIZE), tl.int32)
    for step in tl.range(0, STEPS, loop_unroll_factor=1 if GROUP_SIZE > 0 else 8):
        row, column, inside = _part(step, first, left, height, width, W, SIZE)
        bits = _load(source_ptr, source_scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE, CHECK)
        largest = tl.maximum(largest, magnitude_of(bits))
    amax = tl.max(largest, 1)
    scale = fp8_scale(amax)
    plain = scale
    if tl.max(amax) >= INFINITY:
        tl.store(bad_ptr, 1)

    if RECOVER:
        some = (amax > 0) & (amax < INFINITY)
        low, high = tl.where(some, 0, LARGEST_FLOAT), tl.where(some, LARGEST_FLOAT, 0)
        power, exact = fp8_power(plain), some.to(tl.int32)
        search = 0
        while (search < SEARCHES) & (any_of((low <= high) | (exact > 0)) > 0):
            row, column, inside = _part(search, first, left, height, width, W, SAMPLE)
            sample = _load(source_ptr, source_scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE, False)
            lows, highs = fp8_scales_allowed(sample, fp8_code(sample, plain[:, None], NATIVE))
            low = tl.maximum(low, tl.max(lows, 1))
            high = tl.minimum(high, tl.min(highs, 1))
            exact &= tl.min(fp8_multiple(sample, power[:, None], NATIVE).to(tl.int32), 1)
            search += 1
        nearest = tl.minimum(tl.maximum(plain.to(tl.int32, bitcast=True), low), high).to(tl.float32, bitcast=True)
        scale = tl.where(low <= high, nearest, tl.where(exact > 0, power, plain))
        plain = tl.where((low > high) & (exact > 0), power, plain)

    for step in tl.range(0, STEPS, loop_unroll_factor=2):
        row, column, inside = _part(step, first, left, height, width, W, SIZE)
        bits = _load(source_ptr, source_scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE, False)
        code = fp8_code(bits, plain[:, None], NATIVE)
        after = round_to_bf16(fp8_value(code.to(tl.int32)) * scale[:, None])
        place = row * K + column
        if FAKE:
            # NaN spreads over its block; unlike a flag that nobody reads, it is noticed.
            after = tl.where((amax >= INFINITY)[:, None], 0x7FC0, after).to(tl.int16)
            tl.store(out_ptr + place, after, mask=inside)
        else:
            tl.store(out_ptr + place, code, mask=inside)
        if FIGURES:
            tally(bits, tl.where(inside, after, 0), sums_ptr, tl.program_id(0) * STEPS + step)
    if not FAKE:
        tl.store(scale_ptr + block, scale, mask=block < blocks)


def bf16_to_fp8(
    weights: Tensor,
    block: tuple[int, int] = (128, 128),
    *,
    recover: bool = True,
    figures: bool = False,
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode blocks.

    Args:
        weights: BF16 `[R, K]`, or `[E, R, K]` for experts; or float32, which is rounded to BF16 first.
        block: rows and columns that share a scale; any.
        recover: whether a block whose weights all are code * scale for one scale gets such a scale, see `seam`.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if a weight is not finite.

    Returns:
        float8_e4m3fn codes of the weights' shape, float32 scales `[.., ceil(R/block[0]), ceil(K/block[1])]`, and the
        figures as `figures.figures_of` reads them.
    """
    codes = torch.empty(weights.shape, dtype=torch.float8_e4m3fn, device=weights.device)
    return _encoded(weights, None, codes, block, bad, GROUP_SIZE=0, RECOVER=recover, FAKE=False, FIGURES=figures)


def int4_to_fp8(
    packed: Tensor,
    scale: Tensor,
    group: int = 32,
    block: tuple[int, int] = (128, 128),
    *,
    figures: bool = False,
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give what `int4_to_bf16` and `bf16_to_fp8` give, with nothing written as BF16.

    Args:
        packed: int32 words `[R, K/8]`.
        scale: BF16 or float32 `[R, K/group]`.
        group: columns that share an INT4 scale.
        block: rows and columns that share an FP8 scale; any.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if either of the two would set it.

    Returns:
        As `bf16_to_fp8`.
    """
    shape = (packed.shape[0], packed.shape[1] * 8)
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.device)
    return _encoded(packed, scale, codes, block, bad, GROUP_SIZE=group, RECOVER=True, FAKE=False, FIGURES=figures)


def fake_quantize_fp8(
    weights: Tensor, block: tuple[int, int] = (128, 128), *, recover: bool = False, bad: Tensor | None = None
) -> Tensor:
    """Return BF16 of the weights' shape: the weights as they are after encoding and decoding, in one launch.

    The arguments are those of `bf16_to_fp8`. A block that holds NaN or infinity becomes NaN.
    """
    out = torch.empty(weights.shape, dtype=torch.bfloat16, device=weights.device)
    _encoded(weights, None, out, block, bad, GROUP_SIZE=0, RECOVER=recover, FAKE=True, FIGURES=False)
    return out


def _encoded(
    source: Tensor,
    source_scale: Tensor | None,
    out: Tensor,
    block: tuple[int, int],
    bad: Tensor | None,
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `_encode_fp8` into `out`, codes or decoded weights."""
    *lead, rows, columns = out.shape
    down, across = triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1])
    scale = torch.empty((*lead, down, across), dtype=torch.float32, device=out.device)
    width = _up(min(block[1], columns))
    held = _up(min(block[0], rows)) * width
    together = max(1, _SIZE // held)
    size, sample = min(held, _SIZE), min(held, max(16, _SAMPLE // together))
    programs, steps = triton.cdiv(scale.numel(), together), held // size
    sums = sums_for(programs * steps, out.device, wanted=constants["FIGURES"])
    launch(
        _encode_fp8,
        (programs,),
        bits_of(source),
        bits_of(scale if source_scale is None else source_scale),
        bits_of(out),
        scale,
        sums,
        flag_for(bad, out),
        rows,
        columns,
        scale.numel(),
        down,
        across,
        HEIGHT=block[0],
        WIDTH=block[1],
        NATIVE=native(out.device),
        CHECK=bad is not None,
        B=together,
        W=width,
        STEPS=steps,
        SIZE=size,
        SEARCHES=held // sample,
        SAMPLE=sample,
        exact=True,
        **constants,
    )
    return out, scale, total(sums) if constants["FIGURES"] else None


def _up(size: int) -> int:
    """Return the next power of two; 1 for nothing."""
    return int(triton.next_power_of_2(max(size, 1)))
