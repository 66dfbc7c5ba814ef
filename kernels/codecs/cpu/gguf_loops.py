"""The jitted loops of `gguf`: blocks of GGUF filled from codes of other layouts, or from weights.

All jitted code of this call graph stands here, for numba's cache notices edits in this file alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from k2quant.kernels.codecs.values import F32, U8, U16

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Int = Any  # what numba makes of integers is no one Python type

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_jit
def _spread(word: Int) -> np.uint64:
    """Return eight bytes, each with one of a word's eight nibbles, the lowest first."""
    wide = np.uint64(word)
    wide = np.uint64(wide | np.uint64(wide << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    wide = np.uint64(wide | np.uint64(wide << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    return np.uint64(wide | np.uint64(wide << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)


@_jit
def _woven(low: Int, high: Int) -> np.uint64:
    """Return eight bytes, each with a nibble of one word and above it the nibble of the other one's same place.

    Blocks have their codes so.
    """
    return np.uint64(_spread(low) | np.uint64(_spread(high) << np.uint64(4)))


@_jit
def _half(scale: np.float32) -> Int:
    """Return the FP16 bits of a float32 without a sign; -1 where FP16 does not have it."""
    bits = np.int64(np.float32(scale).view(np.uint32))
    if bits < 113 << 23:  # below 2^-14: multiples of 2^-24
        count = scale * np.float32(2.0**24)
        whole = np.int64(count)
        return whole if np.float32(whole) == count else -1
    return (bits >> 13) - (112 << 10) if bits < 143 << 23 and bits & 0x1FFF == 0 else -1


@_jit
def no_half(scale: F32) -> int:
    """Return the place of the first scale that FP16 does not have, of scales without a sign in a row; -1: none."""
    for place in range(scale.size):
        if _half(scale[place]) < 0:
            return place
    return -1


@_jit
def _weave(words: U32, woven: U64) -> None:
    """Write the codes of a row's blocks, two words each: 32 nibbles of which the second half lies above the first.

    A row at a time, in a loop that does nothing else, so that the compiler does several blocks at once.
    """
    for block in range(len(woven) // 2):
        woven[2 * block] = _woven(words[4 * block], words[4 * block + 2])
        woven[2 * block + 1] = _woven(words[4 * block + 1], words[4 * block + 3])


@_jit
def _put(codes: Int, out: U8, start: Int) -> None:
    """Write a word's eight bytes, the lowest first."""
    for place in range(8):
        out[start + place] = np.uint8((codes >> np.uint64(8 * place)) & np.uint64(0xFF))


@_jit
def _halves(scale: F32, half: I64) -> bool:
    """Write the FP16 bits of a row's scales; return whether FP16 has all of them."""
    least = np.int64(0)
    for place in range(len(scale)):
        half[place] = _half(scale[place])
        least = min(least, half[place])
    return bool(least == 0)


@_jit
def q4_0(words: U32, scale: F32, out: U8) -> bool:
    """Write blocks of 18 bytes: a scale in FP16, then 32 codes; return whether FP16 has all scales."""
    woven, half = np.empty(2 * scale.shape[1], np.uint64), np.empty(scale.shape[1], np.int64)
    for row in range(len(words)):
        if not _halves(scale[row], half):
            return False
        _weave(words[row], woven)
        for block in range(scale.shape[1]):
            out[row, 18 * block] = np.uint8(half[block] & 0xFF)
            out[row, 18 * block + 1] = np.uint8(half[block] >> 8)
            _put(woven[2 * block], out[row], 18 * block + 2)
            _put(woven[2 * block + 1], out[row], 18 * block + 10)
    return True


@_jit
def mxfp4(words: U32, scale: U8, out: U8) -> None:
    """Write blocks of 17 bytes: a scale, then 32 codes."""
    woven = np.empty(2 * scale.shape[1], np.uint64)
    for row in range(len(words)):
        _weave(words[row], woven)
        for block in range(scale.shape[1]):
            out[row, 17 * block] = scale[row, block]
            _put(woven[2 * block], out[row], 17 * block + 1)
            _put(woven[2 * block + 1], out[row], 17 * block + 9)


@_jit
def nvfp4(words: U32, scale: U32, out: U32) -> None:
    """Write blocks of 9 words: four scales, then four times 16 codes."""
    for row in range(len(words)):
        for block in range(scale.shape[1]):
            out[row, 9 * block] = scale[row, block]
            for part in range(4):
                codes = _woven(words[row, 8 * block + 2 * part], words[row, 8 * block + 2 * part + 1])
                out[row, 9 * block + 1 + 2 * part] = np.uint32(codes & np.uint64(0xFFFFFFFF))
                out[row, 9 * block + 2 + 2 * part] = np.uint32(codes >> np.uint64(32))


@_jit
def _widen(bits: Int) -> np.float32:
    """Return the float32 value of BF16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_jit
def _round(value: np.float32) -> np.uint16:
    """Return the BF16 bits of a finite float32, rounded half to even."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_jit
def largest(weights: U16, out: U16) -> None:
    """Write the largest magnitude of each 32 BF16 weights of a row; NaN and infinity are the largest of all."""
    for row in range(len(weights)):
        for block in range(out.shape[1]):
            found = np.uint16(0)
            for lane in range(32):
                found = max(found, np.uint16(weights[row, 32 * block + lane] & np.uint16(0x7FFF)))
            out[row, block] = found


@_jit
def q8_0(weights: U16, step: F32, half: F32, out: U8, after: U16) -> None:
    """Write codes to blocks of 34 bytes, whose scales stand there, and what they decode to.

    `step` is what a block's weights are divided by, and `half` the same as FP16 has it.
    """
    for row in range(len(weights)):
        for block in range(step.shape[1]):
            inverse = np.float32(1) / step[row, block] if step[row, block] > 0 else np.float32(0)
            if inverse > np.float32(3.4028235e38):
                inverse = np.float32(0)  # so small a scale is zero in FP16, whatever the codes are
            for lane in range(32):
                quotient = _widen(weights[row, 32 * block + lane]) * inverse
                whole = np.trunc(quotient)  # C's roundf: away from zero where it is half way
                if abs(quotient - whole) >= np.float32(0.5):
                    whole += np.float32(1) if quotient > 0 else np.float32(-1)
                out[row, 34 * block + 2 + lane] = np.uint8(np.int32(whole) & 255)
                after[row, 32 * block + lane] = _round(np.float32(whole) * half[row, block])
