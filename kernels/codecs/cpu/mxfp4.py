"""MXFP4 on the CPU: `seam.Mxfp4Codec` as functions, and rounding to MXFP4 and back."""

from __future__ import annotations

import math

import numpy as np

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_fp4
from k2quant.kernels.codecs.cpu.fp4 import loops, search_loops
from k2quant.kernels.codecs.cpu.fp4.columns import search_weights, weighing
from k2quant.kernels.codecs.cpu.fp4.tables import mxfp4_tables, mxfp4_trials
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK
from k2quant.kernels.codecs.values import F32, U8, U16, ValueAt

_SHIFT = 1  # two half blocks of the loops share a scale


def decode(codes: U8, scale: U8, out: U16) -> None:
    """Multiply each block of codes by its power of two. See `seam.Mxfp4Codec`."""
    same_fp4(out.shape, scale, MXFP4_BLOCK, codes)
    if not loops.decode(frozen(codes), frozen(scale), mxfp4_tables(), _SHIFT, out):
        raise fp4.bad_mxfp4(codes, scale)


def choose(weights: U16, scale: U8) -> None:
    """Compute each block's scale. See `seam.Mxfp4Codec`."""
    same_fp4(weights.shape, scale, MXFP4_BLOCK)
    untouched = np.empty((len(weights), 0), np.uint8)
    if figures(0, loops.encode(frozen(weights), loops.CHOOSE, mxfp4_tables(), _SHIFT, untouched, scale)) is None:
        raise explain.bad_weight(weights)


def store(weights: U16, scale: U8, codes: U8) -> Figures:
    """Round to codes at the scales that are given. See `seam.Mxfp4Codec`."""
    same_fp4(weights.shape, scale, MXFP4_BLOCK, codes)
    own = np.array(scale)  # writable, as `encode` has it: one signature for both
    outcome = loops.encode(frozen(weights), loops.STORE, mxfp4_tables(), _SHIFT, codes, own)
    found = figures(weights.size, outcome)
    if found is None:
        raise _bad(weights, scale)
    return found


def encode(weights: U16, codes: U8, scale: U8) -> Figures:
    """Compute each block's scale, then round to codes. See `seam.Mxfp4Codec`."""
    same_fp4(weights.shape, scale, MXFP4_BLOCK, codes)
    outcome = loops.encode(frozen(weights), loops.ENCODE, mxfp4_tables(), _SHIFT, codes, scale)
    found = figures(weights.size, outcome)
    if found is None:
        raise fp4.bad_block(weights, "an MXFP4")
    return found


def search(weights: U16, importance: F32 | None, scale: U8, *, mean: F32 | None = None) -> None:
    """Choose the scale of least error for each block. See `seam.Mxfp4Codec`."""
    known = search_weights(importance, mean, weights.shape[1], MXFP4_BLOCK)
    same_fp4(weights.shape, scale, MXFP4_BLOCK)
    if not search_loops.search(frozen(weights), *known, mxfp4_trials(), scale):
        raise explain.bad_weight(weights)


def weighted_error(weights: U16, scale: U8, importance: F32 | None, *, mean: F32 | None = None) -> float:
    """Return what rounding at these scales loses, each column weighed. See `seam.Mxfp4Codec`."""
    same_fp4(weights.shape, scale, MXFP4_BLOCK)
    known, sums = weighing(importance, mean, weights.shape[1]), np.empty(len(weights), np.float64)
    tables = mxfp4_tables()
    if not loops.weighted_errors(frozen(weights), *known, tables, _SHIFT, frozen(scale), sums):
        raise _bad(weights, scale)
    return math.fsum(sums)


def exponents(codes: U8, scale: U8) -> tuple[int, int] | None:
    """Return the least and the largest exponent in use. See `seam.Mxfp4Codec`."""
    same_fp4((codes.shape[0], codes.shape[1] * 2), scale, MXFP4_BLOCK, codes)
    low, high = loops.exponents(frozen(codes), frozen(scale))
    if high == fp4.NAN_E8M0:
        raise fp4.bad_mxfp4(codes, scale)
    return (low - fp4.MXFP4_BIAS, high - fp4.MXFP4_BIAS) if high >= 0 else None


def fake_quantize(weights: U16, out: U16) -> None:
    """Write what `encode` and `decode` would give. Bad weights, and products beyond BF16, are errors as there."""
    same(weights.shape, out.shape)
    scale = np.empty(weights.shape[1] // MXFP4_BLOCK, np.uint8)
    same_fp4((1, weights.shape[1]), scale[None], MXFP4_BLOCK)
    if not loops.fake_quantize(frozen(weights), mxfp4_tables(), _SHIFT, scale, out):
        raise fp4.bad_block(weights, "an MXFP4")


def _bad(weights: U16, scale: U8) -> ValueAt:
    """Find what is bad about weights or scales, else blame the largest weight."""
    if not explain.has_infinity(weights) and (scale == fp4.NAN_E8M0).any():
        return fp4.bad_mxfp4(np.zeros((len(weights), weights.shape[1] // 2), np.uint8), scale)
    return fp4.bad_block(weights, "an MXFP4")
