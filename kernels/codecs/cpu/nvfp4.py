"""NVFP4 on the CPU: `seam.Nvfp4Codec` as functions, and rounding to NVFP4 and back."""

from __future__ import annotations

import math

import numpy as np

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import mxfp4
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_fp4
from k2quant.kernels.codecs.cpu.fp4 import loops, search_loops
from k2quant.kernels.codecs.cpu.fp4.columns import search_weights, weighing
from k2quant.kernels.codecs.cpu.fp4.loops import Tables
from k2quant.kernels.codecs.cpu.fp4.tables import nvfp4_tables, nvfp4_trials, restating
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK, TensorScale
from k2quant.kernels.codecs.values import F32, U8, U16, ValueAt, bf16_to_float

_LARGE_E8M0 = 253
"""The least byte of an MXFP4 scale at which a code may exceed BF16: 4 * 2^126."""

_SHIFT = 0  # each half block of the loops has a scale of its own


def decode(codes: U8, scale: U8, tensor: TensorScale, out: U16) -> None:
    """Multiply each block of codes by its scale in use. See `seam.Nvfp4Codec`."""
    same_fp4(out.shape, scale, NVFP4_BLOCK, codes)
    fp4.check_tensor(tensor)
    if not loops.decode(frozen(codes), frozen(scale), nvfp4_tables(tensor), _SHIFT, out):
        raise fp4.bad_nvfp4(codes, scale, tensor)


def amax(weights: U16) -> float:
    """Return the largest magnitude. See `seam.Nvfp4Codec`."""
    largest = loops.largest(frozen(weights))
    if largest >= explain.INFINITY:
        raise explain.bad_weight(weights)
    return float(bf16_to_float(np.array([largest], np.uint16))[0])


def choose(weights: U16, tensor: TensorScale, scale: U8) -> None:
    """Compute each block's scale. See `seam.Nvfp4Codec`."""
    same_fp4(weights.shape, scale, NVFP4_BLOCK)
    untouched = np.empty((len(weights), 0), np.uint8)
    if (
        figures(0, loops.encode(frozen(weights), loops.CHOOSE, _to_divide(weights, tensor), _SHIFT, untouched, scale))
        is None
    ):
        raise explain.bad_weight(weights)


def store(weights: U16, scale: U8, tensor: TensorScale, codes: U8) -> Figures:
    """Round to codes at the block scales that are given. See `seam.Nvfp4Codec`."""
    same_fp4(weights.shape, scale, NVFP4_BLOCK, codes)
    own = np.array(scale)  # writable, as `encode` has it: one signature for both
    outcome = loops.encode(frozen(weights), loops.STORE, _to_divide(weights, tensor), _SHIFT, codes, own)
    found = figures(weights.size, outcome)
    if found is None:
        raise _bad(weights, scale, tensor)
    return found


def encode(weights: U16, tensor: TensorScale, codes: U8, scale: U8) -> Figures:
    """Compute each block's scale, then round to codes. See `seam.Nvfp4Codec`."""
    same_fp4(weights.shape, scale, NVFP4_BLOCK, codes)
    outcome = loops.encode(frozen(weights), loops.ENCODE, _to_divide(weights, tensor), _SHIFT, codes, scale)
    found = figures(weights.size, outcome)
    if found is None:
        raise _at_plain_scales(weights, tensor)
    return found


def search(weights: U16, importance: F32 | None, tensor: TensorScale, scale: U8, *, mean: F32 | None = None) -> None:
    """Choose the scale of least error for each block. See `seam.Nvfp4Codec`."""
    known = search_weights(importance, mean, weights.shape[1], NVFP4_BLOCK)
    same_fp4(weights.shape, scale, NVFP4_BLOCK)
    _to_divide(weights, tensor)
    if not search_loops.search(frozen(weights), *known, nvfp4_trials(tensor), scale):
        raise explain.bad_weight(weights)


def weighted_error(
    weights: U16, scale: U8, tensor: TensorScale, importance: F32 | None, *, mean: F32 | None = None
) -> float:
    """Return what rounding at these scales loses, each column weighed. See `seam.Nvfp4Codec`."""
    same_fp4(weights.shape, scale, NVFP4_BLOCK)
    known, sums = weighing(importance, mean, weights.shape[1]), np.empty(len(weights), np.float64)
    tables = _to_divide(weights, tensor)
    if not loops.weighted_errors(frozen(weights), *known, tables, _SHIFT, frozen(scale), sums):
        raise _bad(weights, scale, tensor)
    return math.fsum(sums)


def restate(codes_in: U8, scale_in: U8, exponent: int, tensor: TensorScale, codes: U8, scale: U8) -> int:
    """Write MXFP4 as NVFP4 at a tensor scale that means 2^exponent. See `seam.Nvfp4Codec`."""
    shape = codes.shape[0], codes.shape[1] * 2
    same_fp4(shape, scale, NVFP4_BLOCK, codes)
    same_fp4(shape, scale_in, MXFP4_BLOCK, codes_in)
    if scale_in.max(initial=0) >= _LARGE_E8M0:
        mxfp4.decode(codes_in, scale_in, np.empty(shape, np.uint16))  # for its checks
    tables = restating(exponent)
    rounded = int(loops.restate(frozen(codes_in), frozen(scale_in), tables, tensor.empty, codes, scale))
    if rounded < 0:
        raise _beyond(codes_in, scale_in, exponent)
    return rounded


def fake_quantize(weights: U16, tensor: TensorScale, out: U16) -> None:
    """Write what `encode` and `decode` would give. Bad weights, and products beyond BF16, are errors as there."""
    same(weights.shape, out.shape)
    scale = np.empty(weights.shape[1] // NVFP4_BLOCK, np.uint8)
    same_fp4((1, weights.shape[1]), scale[None], NVFP4_BLOCK)
    if not loops.fake_quantize(frozen(weights), _to_divide(weights, tensor), _SHIFT, scale, out):
        raise _at_plain_scales(weights, tensor)


def _to_divide(weights: U16, tensor: TensorScale) -> Tables:
    """Return the tables; refuse a tensor scale by which nothing can be divided, after weights that are not finite."""
    if (error := fp4.bad_tensor(tensor, divisor=True)) is not None:
        raise explain.bad_weight(weights) if explain.has_infinity(weights) else error
    return nvfp4_tables(tensor)


def _bad(weights: U16, scale: U8, tensor: TensorScale) -> ValueAt:
    """Find what is bad about weights or scales, else blame the largest weight."""
    if not explain.has_infinity(weights) and (error := fp4.bad_nvfp4_divisor(scale, tensor)) is not None:
        return error
    return fp4.bad_block(weights, "an NVFP4")


def _at_plain_scales(weights: U16, tensor: TensorScale) -> ValueAt:
    """Do `_bad` at the scales of `choose`."""
    scale = np.empty((len(weights), weights.shape[1] // NVFP4_BLOCK), np.uint8)
    choose(weights, tensor, scale)
    return _bad(weights, scale, tensor)


def _beyond(codes_in: U8, scale_in: U8, exponent: int) -> ValueAt:
    used = ((codes_in & 0x77) > 0).reshape(len(codes_in), -1, NVFP4_BLOCK // 2).any(2)
    power = np.repeat(scale_in, 2, 1).astype(np.int32) - fp4.MXFP4_BIAS - exponent
    return fp4.beyond_closed_form(scale_in, used & (power > fp4.MOST_POWER), exponent)
