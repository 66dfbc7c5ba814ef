"""MXFP4 on the CPU: `seam.Mxfp4Codec` as functions."""

from __future__ import annotations

import math

import numpy as np

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import bf16
from k2quant.kernels.codecs.cpu.checks import same
from k2quant.kernels.codecs.cpu.fp4_rules import encoded, errors, least, numbers, packed, rounded, sums
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK
from k2quant.kernels.codecs.scales.fp4 import mxfp4_candidates
from k2quant.kernels.codecs.values import F32, U8, U16, bf16_to_float, e8m0_to_float


def decode(codes: U8, scale: U8, out: U16) -> None:
    """Multiply each block of codes by its power of two. See `seam.Mxfp4Codec`."""
    _same(out.shape, scale, codes)
    out[...] = rounded(_products(fp4.nibbles(codes), scale))
    if (scale == fp4.NAN_E8M0).any() or explain.has_infinity(out):
        raise fp4.bad_mxfp4(codes, scale)


def choose(weights: U16, scale: U8) -> None:
    """Compute each block's scale. See `seam.Mxfp4Codec`."""
    _same(weights.shape, scale)
    if explain.has_infinity(weights):
        raise explain.bad_weight(weights)
    amax = (weights & 0x7FFF).reshape(len(weights), -1, MXFP4_BLOCK).max(2).astype(np.int32)
    scale[...] = np.maximum(((amax + 0x20) >> 7) - 2, 0)


def store(weights: U16, scale: U8, codes: U8) -> Figures:
    """Round to codes at the scales that are given. See `seam.Mxfp4Codec`."""
    _same(weights.shape, scale, codes)
    if explain.has_infinity(weights):
        raise explain.bad_weight(weights)
    if (scale == fp4.NAN_E8M0).any():
        raise fp4.bad_mxfp4(np.zeros_like(codes), scale)
    found = _codes(weights, scale)
    codes[...] = packed(found)
    values = rounded(_products(found, scale))
    if explain.has_infinity(values):
        raise fp4.bad_block(weights, "an MXFP4")
    return bf16.compare(weights, values)


def encode(weights: U16, codes: U8, scale: U8) -> Figures:
    """Compute each block's scale, then round to codes. See `seam.Mxfp4Codec`."""
    choose(weights, scale)
    return store(weights, scale, codes)


def search(weights: U16, importance: F32 | None, scale: U8, *, mean: F32 | None = None) -> None:
    """Choose the scale of least error for each block. See `seam.Mxfp4Codec`."""
    choose(weights, scale)
    trials = mxfp4_candidates(scale)
    scale[...] = least(
        weights, trials, lambda groups, trial: _products(_codes(groups, trial), trial), (importance, mean)
    )


def weighted_error(weights: U16, scale: U8, importance: F32 | None, *, mean: F32 | None = None) -> float:
    """Return what rounding at these scales loses, each column weighed. See `seam.Mxfp4Codec`."""
    known = errors(importance, mean, weights.shape[1])
    store(weights, scale, np.empty((len(weights), weights.shape[1] // 2), np.uint8))
    values = rounded(_products(_codes(weights, scale), scale))
    return math.fsum(sums(weights, values, *known, MXFP4_BLOCK))


def exponents(codes: U8, scale: U8) -> tuple[int, int] | None:
    """Return the least and the largest exponent in use. See `seam.Mxfp4Codec`."""
    _same((codes.shape[0], codes.shape[1] * 2), scale, codes)
    used = ((codes & 0x77) > 0).reshape(*scale.shape, MXFP4_BLOCK // 2).any(2)
    if (used & (scale == fp4.NAN_E8M0)).any():
        raise fp4.bad_mxfp4(codes, scale)
    if not used.any():
        return None
    found = scale[used].astype(np.int32) - fp4.MXFP4_BIAS
    return int(found.min()), int(found.max())


def fake_quantize(weights: U16, out: U16) -> None:
    """Write what `encode` and `decode` would give. Bad weights, and products beyond BF16, are errors as there."""
    codes = np.empty((len(weights), weights.shape[1] // 2), np.uint8)
    scale = np.empty((len(weights), weights.shape[1] // MXFP4_BLOCK), np.uint8)
    encode(weights, codes, scale)
    decode(codes, scale, out)


def _codes(weights: U16, scale: U8) -> U8:
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        wide: F32 = np.repeat(e8m0_to_float(scale), MXFP4_BLOCK, 1)
        quotient: F32 = np.divide(bf16_to_float(weights), wide)
    return encoded(quotient, weights > 0x7FFF)


def _products(codes: U8, scale: U8) -> F32:
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers(codes) * np.repeat(e8m0_to_float(scale), MXFP4_BLOCK, 1)


def _same(shape: tuple[int, ...], scale: U8, codes: U8 | None = None) -> None:
    if shape[1] % MXFP4_BLOCK:
        raise ValueError(f"expected a multiple of {MXFP4_BLOCK} columns, found {shape[1]}")
    same(scale.shape, (shape[0], shape[1] // MXFP4_BLOCK))
    if codes is not None:
        same(codes.shape, (shape[0], shape[1] // 2))
