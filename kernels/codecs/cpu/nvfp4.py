"""NVFP4 on the CPU: `seam.Nvfp4Codec` as functions."""

from __future__ import annotations

import math

import numpy as np

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import bf16
from k2quant.kernels.codecs.cpu.checks import same
from k2quant.kernels.codecs.cpu.fp4_rules import encoded, errors, least, numbers, packed, rounded, sums
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK, TensorScale
from k2quant.kernels.codecs.scales.fp4 import nvfp4_candidates
from k2quant.kernels.codecs.values import F32, U8, U16, bf16_to_float, float_to_bf16


def decode(codes: U8, scale: U8, tensor: TensorScale, out: U16) -> None:
    """Multiply each block of codes by its scale in use. See `seam.Nvfp4Codec`."""
    _same(out.shape, scale, codes)
    fp4.check_tensor(tensor)
    values = _products(fp4.nibbles(codes), scale, tensor)
    out[...] = rounded(values)
    if (scale >= fp4.NAN_E4M3).any() or explain.has_infinity(out):
        raise fp4.bad_nvfp4(codes, scale, tensor)


def amax(weights: U16) -> float:
    """Return the largest magnitude. See `seam.Nvfp4Codec`."""
    if explain.has_infinity(weights):
        raise explain.bad_weight(weights)
    largest = (weights & 0x7FFF).max(initial=0)
    return float(bf16_to_float(np.array([largest], np.uint16))[0])


def choose(weights: U16, tensor: TensorScale, scale: U8) -> None:
    """Compute each block's scale. See `seam.Nvfp4Codec`."""
    _same(weights.shape, scale)
    _check(weights, tensor)
    quotient = _quotients(weights, tensor)
    if tensor.divides:
        scale[...] = fp4.float_to_e4m3(quotient)
        scale[scale == 0] = fp4.EMPTY_DIVIDES
    else:
        scale[...] = fp4.float_to_e4m3(np.maximum(quotient, np.float32(fp4.LEAST_E4M3)))
        scale[quotient == 0] = fp4.EMPTY_MULTIPLIES


def store(weights: U16, scale: U8, tensor: TensorScale, codes: U8) -> Figures:
    """Round to codes at the block scales that are given. See `seam.Nvfp4Codec`."""
    _same(weights.shape, scale, codes)
    if explain.has_infinity(weights):
        raise explain.bad_weight(weights)
    if (error := fp4.bad_nvfp4_divisor(scale, tensor)) is not None:
        raise error
    found = _codes(weights, scale, tensor)
    codes[...] = packed(found)
    values = rounded(_products(found, scale, tensor))
    if explain.has_infinity(values):
        raise fp4.bad_block(weights, "an NVFP4")
    return bf16.compare(weights, values)


def encode(weights: U16, tensor: TensorScale, codes: U8, scale: U8) -> Figures:
    """Compute each block's scale, then round to codes. See `seam.Nvfp4Codec`."""
    choose(weights, tensor, scale)
    return store(weights, scale, tensor, codes)


def search(weights: U16, importance: F32 | None, tensor: TensorScale, scale: U8, *, mean: F32 | None = None) -> None:
    """Choose the scale of least error for each block. See `seam.Nvfp4Codec`."""
    choose(weights, tensor, scale)
    near = np.maximum(fp4.float_to_e4m3(_quotients(weights, tensor)), 1)
    trials = nvfp4_candidates(scale, near)
    scale[...] = least(
        weights,
        trials,
        lambda groups, trial: _products(_codes(groups, trial, tensor), trial, tensor),
        (importance, mean),
    )


def weighted_error(
    weights: U16, scale: U8, tensor: TensorScale, importance: F32 | None, *, mean: F32 | None = None
) -> float:
    """Return what rounding at these scales loses, each column weighed. See `seam.Nvfp4Codec`."""
    known = errors(importance, mean, weights.shape[1])
    store(weights, scale, tensor, np.empty((len(weights), weights.shape[1] // 2), np.uint8))
    values = rounded(_products(_codes(weights, scale, tensor), scale, tensor))
    return math.fsum(sums(weights, values, *known, NVFP4_BLOCK))


def restate(codes_in: U8, scale_in: U8, exponent: int, tensor: TensorScale, codes: U8, scale: U8) -> int:
    """Write MXFP4 as NVFP4 at a tensor scale that means 2^exponent. See `seam.Nvfp4Codec`."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    same(codes_in.shape, codes.shape)
    same(scale_in.shape, (rows, columns // MXFP4_BLOCK))
    _same((rows, columns), scale, codes)
    given = fp4.nibbles(codes_in)
    with np.errstate(over="ignore", invalid="ignore"):
        values = numbers(given) * np.repeat(explain.e8m0_to_float(scale_in), MXFP4_BLOCK, 1)
    if (scale_in == fp4.NAN_E8M0).any() or explain.has_infinity(rounded(values)):
        raise fp4.bad_mxfp4(codes_in, scale_in)
    power = np.repeat(scale_in, 2, 1).astype(np.int32) - fp4.MXFP4_BIAS - exponent
    used = ((given & 7) > 0).reshape(*scale.shape, NVFP4_BLOCK).any(2)
    if (beyond := used & (power > fp4.MOST_POWER)).any():
        raise fp4.beyond_closed_form(scale_in, beyond, exponent)
    stored = np.maximum(power, fp4.LEAST_POWER)
    shift = np.ldexp(np.float32(1), np.where(used, power - stored, 0)).astype(np.float32)
    codes[...] = packed(encoded(numbers(given) * np.repeat(shift, NVFP4_BLOCK, 1), given > 7))
    bits = fp4.float_to_e4m3(np.ldexp(np.float32(1), np.where(used, stored, 0)).astype(np.float32))
    scale[...] = np.where(used, bits, tensor.empty)
    return int((used & (power < stored)).sum())


def fake_quantize(weights: U16, tensor: TensorScale, out: U16) -> None:
    """Write what `encode` and `decode` would give. Bad weights, and products beyond BF16, are errors as there."""
    codes = np.empty((len(weights), weights.shape[1] // 2), np.uint8)
    scale = np.empty((len(weights), weights.shape[1] // NVFP4_BLOCK), np.uint8)
    encode(weights, tensor, codes, scale)
    decode(codes, scale, tensor, out)


def _check(weights: U16, tensor: TensorScale) -> None:
    if explain.has_infinity(weights):
        raise explain.bad_weight(weights)
    fp4.check_tensor(tensor, divisor=True)


def _quotients(weights: U16, tensor: TensorScale) -> F32:
    """Return what the block scales are before they are rounded."""
    blocks = (weights & 0x7FFF).reshape(len(weights), -1, NVFP4_BLOCK)
    largest = bf16_to_float(blocks.max(2))
    with np.errstate(over="ignore"):
        if tensor.divides:
            return tensor.number * bf16_to_float(float_to_bf16(largest / np.float32(6)))
        return largest / (np.float32(6) * tensor.number)


def _codes(weights: U16, scale: U8, tensor: TensorScale) -> U8:
    factor = np.repeat(fp4.block_scales(scale, tensor), NVFP4_BLOCK, 1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        quotient = bf16_to_float(weights) / factor
    return encoded(quotient, quotient < 0)


def _products(codes: U8, scale: U8, tensor: TensorScale) -> F32:
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers(codes) * np.repeat(fp4.block_scales(scale, tensor), NVFP4_BLOCK, 1)


def _same(shape: tuple[int, ...], scale: U8, codes: U8 | None = None) -> None:
    if shape[1] % NVFP4_BLOCK:
        raise ValueError(f"expected a multiple of {NVFP4_BLOCK} columns, found {shape[1]}")
    same(scale.shape, (shape[0], shape[1] // NVFP4_BLOCK))
    if codes is not None:
        same(codes.shape, (shape[0], shape[1] // 2))
