"""What the loops of FP4 look up: the rules, asked once for all that there is.

There are 256 scales, 8 codes and 32,640 finite magnitudes of weights. A rule that grows with a weight's magnitude is
known by where it makes its steps, which `_least` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu.fp4.loops import Restating, Tables
from k2quant.kernels.codecs.cpu.fp4.rules import E2M1, plain_mxfp4, plain_nvfp4, reaches, rounded
from k2quant.kernels.codecs.cpu.fp4.search_loops import MXFP4_TRIALS, Trials
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.scales.fp4 import mxfp4_candidates, nvfp4_candidates
from k2quant.kernels.codecs.values import F32, INFINITY, U8, U16, bf16_to_float, e8m0_to_float

I16 = NDArray[np.int16]
U32 = NDArray[np.uint32]

KEPT = 16
"""Tensor scales whose tables are remembered, 0.4 MB each: a few threads at a tensor each, in panels."""

_ALL = np.arange(256, dtype=np.uint8)
_AMAXES = np.arange(INFINITY, dtype=np.uint16)


@lru_cache(maxsize=KEPT)
def nvfp4_tables(tensor: TensorScale) -> Tables:
    """Return the tables of NVFP4 beside a tensor scale that is not bad."""
    factors = fp4.block_scales(_ALL, tensor)
    asked, _ = plain_nvfp4(_AMAXES, tensor)
    return _tables(asked, factors, levels_of(factors, zeros_keep_signs=False))


@lru_cache(maxsize=KEPT)
def nvfp4_trials(tensor: TensorScale) -> Trials:
    """Return what a search for NVFP4 scales looks up; row 0 is for blocks whose plain scale is no neighbour."""
    plain, near = plain_nvfp4(_AMAXES, tensor)
    rounds = np.arange(fp4.NAN_E4M3, dtype=np.uint8)
    rounds[0] = 1
    scales = rounds.copy()
    scales[0] = tensor.empty
    place = np.where(plain == np.maximum(near, 1), plain, 0).astype(np.uint8)
    return _trials(place, nvfp4_candidates(scales, rounds), fp4.block_scales(_ALL, tensor))


@lru_cache(maxsize=1)
def mxfp4_tables() -> Tables:
    """Return the tables of MXFP4."""
    factors = e8m0_to_float(_ALL)
    return _tables(plain_mxfp4(_AMAXES), factors, levels_of(factors, zeros_keep_signs=True))


@lru_cache(maxsize=1)
def mxfp4_trials() -> Trials:
    """Return what a search for MXFP4 scales looks up."""
    trials = mxfp4_candidates(_ALL[: fp4.NAN_E8M0])
    spare = np.repeat(trials[:, :1], MXFP4_TRIALS - trials.shape[1], 1)  # equals its first, so it never wins
    trials = np.concatenate([trials, spare], 1)
    return _trials(plain_mxfp4(_AMAXES), trials, e8m0_to_float(_ALL))


def levels_of(factors: F32, *, zeros_keep_signs: bool) -> I16:
    """Return the least magnitudes of the codes 1 to 7 at each scale, and of those that keep their sign, `[N, 8]`."""
    found = np.zeros((len(factors), 8), np.int16)

    def quotient(magnitude: U16) -> F32:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            wide: F32 = bf16_to_float(magnitude) / factors[:, None]
            return wide

    found[:, :7] = _least(lambda magnitude: reaches(quotient(magnitude)), (len(factors), 7))
    if not zeros_keep_signs:
        found[:, 7:] = _least(lambda magnitude: quotient(magnitude) > 0, (len(factors), 1))
    return found


def _least(holds: Callable[[U16], NDArray[np.bool_]], shape: tuple[int, int]) -> U16:
    """Return from which magnitude on, as BF16 bits, something holds that grows with it; infinity if it never does."""
    low, high = np.zeros(shape, np.uint16), np.full(shape, INFINITY, np.uint16)
    for _ in range(INFINITY.bit_length()):
        middle: U16 = ((low + high) >> 1).astype(np.uint16)
        found = holds(middle) & (low < high)
        high = np.where(found, middle, high)
        low = np.where(found | (low == high), low, middle + 1)
    return low


def _values(factors: F32) -> U16:
    """Return the BF16 values of the codes 0 to 15 at each scale, `[N, 16]`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(np.concatenate([E2M1, -E2M1]) * factors[:, None])


def _tables(asked: U8, factors: F32, levels: I16) -> Tables:
    values = _values(factors).astype(np.uint32)
    values[np.isnan(factors) | np.signbit(factors)] = INFINITY
    pairs: U32 = (values[:, None, :] | values[:, :, None] << 16).astype(np.uint32).reshape(256, 256)
    refused = ~np.isfinite(factors) | (factors <= 0)
    for each in (asked, levels, pairs, refused):
        each.flags.writeable = False
    return Tables(asked, levels, pairs, refused)


def _trials(place: U8, trials: U8, factors: F32) -> Trials:
    levels, values = levels_of(factors, zeros_keep_signs=True), _values(factors)[:, :8]
    levels[values[:, 0] == INFINITY] = 0  # what is no number errs infinitely, zeros included
    values[values[:, 0] == INFINITY] = INFINITY
    rows = np.concatenate([levels[:, :7], values[:, 1:].astype(np.int16)], 1)
    tables = np.ascontiguousarray(rows[trials].transpose(0, 2, 1))
    for each in (place, tables, trials):
        each.flags.writeable = False
    return Trials(place, tables, trials)


@lru_cache(maxsize=KEPT)
def restating(exponent: int) -> Restating:
    """Return the tables of MXFP4 that becomes NVFP4 at a tensor scale that means 2^exponent."""
    power = np.arange(256) - fp4.MXFP4_BIAS - exponent
    stored = np.clip(power, fp4.LEAST_POWER, fp4.MOST_POWER)
    bits = fp4.float_to_e4m3(np.ldexp(np.float32(1), stored).astype(np.float32))
    moved = _moved()
    steps = np.where(power > fp4.MOST_POWER, 255, np.minimum(stored - power, len(moved) - 1)).astype(np.uint8)
    for each in (bits, steps):
        each.flags.writeable = False
    return Restating(bits, steps, moved)


@lru_cache(maxsize=1)
def _moved() -> U8:
    # 6 * 2^-5 is below 1/4 already: further steps change nothing more.
    lowered = E2M1 * np.ldexp(np.float32(1), -np.arange(6))[:, None]
    codes = reaches(lowered[..., None]).sum(2).astype(np.uint8)
    codes = np.concatenate([codes, codes | 8], 1)
    found: U8 = np.ascontiguousarray((codes[:, None, :] | codes[:, :, None] << 4).reshape(len(codes), 256))
    found.flags.writeable = False
    return found
