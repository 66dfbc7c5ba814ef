"""Block FP8 on the CPU: `seam.Fp8Codec` as functions."""

from __future__ import annotations

import numpy as np

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import loops
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_fp8, valid
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F32, U8, U16


def decode(codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
    """Multiply each block of codes by its scale. See `seam.Fp8Codec`."""
    same(codes.shape, out.shape)
    same_fp8(codes.shape, scale, block)
    if not (valid(scale) and loops.fp8_to_bf16(frozen(codes), frozen(scale), *block, out)):
        raise explain.bad_fp8(codes, scale, block)


def encode(weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
    """Recover or compute each block's scale, then round to e4m3. See `seam.Fp8Codec`."""
    same(weights.shape, codes.shape)
    same_fp8(codes.shape, scale, block)
    found = figures(weights.size, loops.bf16_to_fp8(frozen(weights), *block, loops.ENCODE, codes, scale))
    if found is None:
        raise explain.bad_weight(weights)
    return found


def choose(weights: U16, block: tuple[int, int], scale: F32) -> None:
    """Recover or compute each block's scale. See `seam.Fp8Codec`."""
    same_fp8(weights.shape, scale, block)
    untouched = np.empty((0, 0), np.uint8)
    if figures(0, loops.bf16_to_fp8(frozen(weights), *block, loops.CHOOSE, untouched, scale)) is None:
        raise explain.bad_weight(weights)


def store(weights: U16, scale: F32, block: tuple[int, int], codes: U8) -> Figures:
    """Round to e4m3 at the scales that are given. See `seam.Fp8Codec`."""
    same(weights.shape, codes.shape)
    same_fp8(codes.shape, scale, block)
    if (error := explain.bad_divisor(scale)) is not None:
        raise explain.bad_weight(weights) if explain.has_infinity(weights) else error  # as the reference has it
    own = np.array(scale)  # writable, as `encode` has it: one signature for both
    found = figures(weights.size, loops.bf16_to_fp8(frozen(weights), *block, loops.STORE, codes, own))
    if found is None:
        raise explain.bad_weight(weights) if explain.has_infinity(weights) else explain.bad_fp8(codes, scale, block)
    return found
