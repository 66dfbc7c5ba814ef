"""Panels of quantised weights as float32, for matrix products on a CPU that are too tall to work from packed codes.

A panel is some rows of a weight: small enough to stay in the cache until it is multiplied. Nothing is rounded: a code
times a BF16 scale or a power of two is exact in float32, and an FP8 or NVFP4 code times its float32 scale is what the
format means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from k2quant.kernels.codecs.values import F32, U8, U16

Int = Any  # what numba makes of integers is no one Python type

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_jit
def int4_to_float(packed: U8, scale: U16, out: F32) -> None:
    """Write code * scale of the bytes of words `[R, K/2]` and of BF16 scales `[R, K/32]` to `[R, K]`."""
    for row in range(packed.shape[0]):
        for group in range(scale.shape[1]):
            factor = _float(np.uint32(scale[row, group]) << np.uint32(16))
            pairs, numbers = packed[row, group * 16 : group * 16 + 16], out[row, group * 32 : group * 32 + 32]
            for pair in range(16):
                numbers[2 * pair] = np.float32(np.int32(pairs[pair] & np.uint8(15)) - np.int32(8)) * factor
                numbers[2 * pair + 1] = np.float32(np.int32(pairs[pair] >> np.uint8(4)) - np.int32(8)) * factor


@_jit
def fp8_to_float(codes: U8, scale: F32, block_rows: int, block_columns: int, first: int, out: F32) -> None:
    """Write code * scale of e4m3 codes `[R, K]` to `[R, K]`; `first` is the panel's first row within the blocks."""
    for row in range(codes.shape[0]):
        for block in range(scale.shape[1]):
            factor = scale[(first + row) // block_rows, block]
            start = block * block_columns
            bits, numbers = codes[row, start : start + block_columns], out[row, start : start + block_columns]
            for column in range(bits.size):
                code = np.uint32(bits[column])
                # The same bits under float32's wider exponent mean the number times 2^-120.
                sign = np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24))
                number = np.uint32(np.uint32(code & np.uint32(0x7F)) << np.uint32(20))
                numbers[column] = _float(np.uint32(sign | number)) * np.float32(2.0**120) * factor


@_jit
def fp4_to_float(codes: U8, scale: U8, numbers: F32, scales: F32, out: F32) -> None:
    """Write code * scale of E2M1 codes `[R, K/2]` to `[R, K]`.

    `numbers` `[16]` is what the codes stand for, `scales` `[256]` what they count at each byte of `scale`
    `[R, K/block]`.
    """
    half = codes.shape[1] // scale.shape[1]
    for row in range(codes.shape[0]):
        for block in range(scale.shape[1]):
            factor, start = scales[scale[row, block]], block * half
            pairs, found = codes[row, start : start + half], out[row, 2 * start : 2 * (start + half)]
            for pair in range(half):
                found[2 * pair] = numbers[pairs[pair] & np.uint8(15)] * factor
                found[2 * pair + 1] = numbers[pairs[pair] >> np.uint8(4)] * factor


@_jit
def torch_to_float(codes: U8, scale: U16, out: F32) -> None:
    """Write code * scale of torch's blocks `[B, K, H]` with BF16 scales `[K/32, B, 2, H]` to `[B, K, 2, H]`.

    The byte at (block, column, i) holds row i of the block in its low nibble and row i + H in its high one.
    """
    half = codes.shape[2]
    factors = np.empty((2, half), np.float32)
    for block in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            if column % 32 == 0:
                for part in range(2):
                    for row in range(half):
                        factors[part, row] = _float(np.uint32(scale[column // 32, block, part, row]) << np.uint32(16))
            pairs, low, high = codes[block, column], out[block, column, 0], out[block, column, 1]
            for row in range(half):
                low[row] = np.float32(np.int32(pairs[row] & np.uint8(15)) - np.int32(8)) * factors[0, row]
                high[row] = np.float32(np.int32(pairs[row] >> np.uint8(4)) - np.int32(8)) * factors[1, row]


@_jit
def _float(bits: Int) -> np.float32:
    return np.uint32(bits).view(np.float32)
