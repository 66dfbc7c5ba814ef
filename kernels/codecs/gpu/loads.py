"""How the GPU codecs read weights: whatever the format, a tile becomes BF16 bits, int16, zeros where it is masked."""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.codecs.gpu.bf16 import INFINITY, any_of, bad_scale, large_scale, magnitude_of, round_to_bf16, widen
from k2quant.kernels.codecs.gpu.fp8_rules import fp8_value
from k2quant.kernels.codecs.gpu.int4_rules import int4_product


@triton.jit
def load_bf16(pointer, inside):
    """Load BF16 bits, or float32 numbers, which are rounded to BF16."""
    if pointer.dtype.element_ty == tl.float32:
        bits = round_to_bf16(tl.load(pointer, mask=inside, other=0.0))
    else:
        bits = tl.load(pointer, mask=inside, other=0)
    return bits


@triton.jit
def load_fp8(
    codes_ptr, scale_ptr, bad_ptr, row, unit, R, K, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """Load weights `[ROWS, UNITS, 32]` of block FP8, code * scale rounded to float32 and then to BF16.

    Args:
        codes_ptr: uint8 `[R, K]`.
        scale_ptr: float32 `[ceil(R/HEIGHT), ceil(K/WIDTH)]`.
        bad_ptr: int32, set to 1 if a scale is bad, a code NaN or a product beyond BF16.
        row: `[ROWS]`.
        unit: `[UNITS]`, each 32 columns.
        R: rows of the matrix.
        K: columns of the matrix.
        HEIGHT: rows of a block.
        WIDTH: columns of a block.
        CHECK: whether to look for what is bad.
    """
    column = (unit * 32)[:, None] + tl.arange(0, 32)[None, :]
    inside = (row < R)[:, None, None] & (column < K)[None, :, :]
    place = row.to(tl.int64)[:, None, None] * K + column[None, :, :]
    code = tl.load(codes_ptr + place, mask=inside, other=0).to(tl.int32)
    first = (row // HEIGHT).to(tl.int64) * tl.cdiv(K, WIDTH)
    if WIDTH % 32 == 0:  # a unit has one scale
        block = first[:, None] + (unit * 32 // WIDTH)[None, :]
        scale = tl.load(scale_ptr + block, mask=(row < R)[:, None] & (unit * 32 < K)[None, :], other=0.0)[:, :, None]
    else:
        scale = tl.load(scale_ptr + first[:, None, None] + (column // WIDTH)[None, :, :], mask=inside, other=0.0)
    bits = round_to_bf16(fp8_value(code) * scale)
    if CHECK:
        nan = tl.max(code & 0x7F) == 0x7F
        if nan | (any_of(large_scale(scale)) > 0):
            if nan | (any_of(bad_scale(scale)) > 0) | (tl.max(magnitude_of(bits)) >= INFINITY):
                tl.store(bad_ptr, 1)
    return bits


@triton.jit
def load_int4(packed_ptr, scale_ptr, bad_ptr, row, column, inside, K, GROUP_SIZE: tl.constexpr, CHECK: tl.constexpr):
    """Load weights of INT4, code * scale rounded to BF16; `row`, `column` and `inside` broadcast to the result's shape.

    Args:
        packed_ptr: int32 `[R, K/8]`; eight lanes read one word, which costs the cache little and no memory.
        scale_ptr: float32, or BF16 bits, `[R, K/GROUP_SIZE]`.
        bad_ptr: int32, set to 1 if a scale is bad or a product beyond BF16.
        row: row numbers, int64.
        column: column numbers.
        inside: where to load.
        K: columns of the matrix.
        GROUP_SIZE: columns that share a scale.
        CHECK: whether to look for what is bad.
    """
    words = tl.load(packed_ptr + row * (K // 8) + column // 8, mask=inside, other=0)
    scale = tl.load(scale_ptr + row * (K // GROUP_SIZE) + column // GROUP_SIZE, mask=inside, other=0)
    if scale_ptr.dtype.element_ty == tl.int16:
        scale = widen(scale)
    bits = int4_product((words >> (column % 8 * 4)) & 15, scale)
    bits = tl.where(inside, bits, 0)
    if CHECK:
        if any_of(large_scale(scale)) > 0:
            if (any_of(bad_scale(scale)) > 0) | (tl.max(magnitude_of(bits)) >= INFINITY):
                tl.store(bad_ptr, 1)
    return bits
