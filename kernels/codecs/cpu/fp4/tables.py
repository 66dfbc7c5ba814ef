"""What the loops of FP4 look up: the rules, asked once for all that there is.

There are 256 scales, 8 codes and 32,640 finite magnitudes of weights. A rule that grows with a weight's magnitude is
known by where it makes its steps, which `_least` finds. A tensor of 2048 x 7168 takes 15 ms to convert, so these tables
must take little of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu.fp4.loops import Restating, Tables
from k2quant.kernels.codecs.cpu.fp4.rules import E2M1, nvfp4_quotients, plain_mxfp4, plain_nvfp4, reaches, rounded
from k2quant.kernels.codecs.cpu.fp4.search_loops import MXFP4_TRIALS, Trials
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.scales.fp4 import mxfp4_candidates, nvfp4_candidates
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX
from k2quant.kernels.codecs.values import F32, INFINITY, U8, U16, bf16_to_float, e8m0_to_float

I16 = NDArray[np.int16]
U32 = NDArray[np.uint32]

KEPT = 16
"""Tensor scales whose tables are remembered, 0.4 MB each: a few threads at a tensor each, in panels."""

_ALL = np.arange(256, dtype=np.uint8)
_AMAXES = np.arange(INFINITY, dtype=np.uint16)
_AROUND = np.arange(-3, 5)


@lru_cache(maxsize=KEPT)
def nvfp4_tables(tensor: TensorScale) -> Tables:
    """Return the tables of NVFP4 beside a tensor scale that is not bad."""
    factors = fp4.block_scales(_ALL, tensor)
    asked, _ = _plain_scales(tensor)
    return _tables(asked, factors, levels_of(factors, zeros_keep_signs=False))


@lru_cache(maxsize=KEPT)
def nvfp4_trials(tensor: TensorScale) -> Trials:
    """Return what a search for NVFP4 scales looks up; row 0 is for blocks whose plain scale is no neighbour."""
    asked, near = _plain_scales(tensor)
    rounds = np.arange(fp4.NAN_E4M3, dtype=np.uint8)
    rounds[0] = 1
    scales = rounds.copy()
    scales[0] = tensor.empty
    place = np.where(asked == np.maximum(near, 1), asked, 0).astype(np.uint8)
    tables = nvfp4_tables(tensor)
    return _trials(asked, place, nvfp4_candidates(scales, rounds), fp4.block_scales(_ALL, tensor), tables.levels)


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
    tables = mxfp4_tables()
    return _trials(tables.asked, tables.asked, trials, e8m0_to_float(_ALL), tables.levels)


def levels_of(factors: F32, *, zeros_keep_signs: bool) -> I16:
    """Return the least magnitudes of the codes 1 to 7 at each scale, and of those that keep their sign, `[N, 8]`.

    At scales that nothing can be divided by it returns those at 1.
    """
    scale: F32 = np.where((factors > 0) & np.isfinite(factors), factors, np.float32(1)).astype(np.float32)[:, None]
    found = np.zeros((len(factors), 8), np.int16)

    def quotient(magnitude: U16) -> F32:
        with np.errstate(over="ignore"):
            wide: F32 = bf16_to_float(magnitude) / scale[..., None]
            return wide

    with np.errstate(over="ignore"):
        near: F32 = np.array(fp4.THRESHOLDS, np.float32) * scale
    found[:, :7] = _least(lambda magnitude: reaches(quotient(magnitude).swapaxes(1, 2)).swapaxes(1, 2), near)
    if not zeros_keep_signs:
        found[:, 7:] = _least(lambda magnitude: quotient(magnitude) > 0, scale * np.float32(2.0**-149))
    return found


def _plain_scales(tensor: TensorScale) -> tuple[U8, U8]:
    """Return by each amax, as BF16 bits, the NVFP4 scale that `choose` gives it, and what its quotient rounds to."""
    steps = np.arange(1, fp4.NAN_E4M3, dtype=np.uint8)
    middles = fp4.e4m3_to_float(steps) - (fp4.e4m3_to_float(steps) - fp4.e4m3_to_float(steps - 1)) / np.float32(2)
    with np.errstate(over="ignore"):
        unit = np.float32(fp4.LARGEST_E2M1) * (1 / tensor.number if tensor.divides else tensor.number)
        near = np.concatenate([np.array([2.0**-149], np.float32), middles])[:, None] * unit

    def reached(amax: U16) -> NDArray[np.bool_]:
        quotient = nvfp4_quotients(amax, tensor)
        return np.concatenate([quotient[:1] > 0, fp4.float_to_e4m3(quotient[1:]) >= steps[:, None, None]])

    starts = np.concatenate([np.zeros(1, np.uint16), np.sort(_least(reached, near)[:, 0])])
    lengths = np.append(starts[1:], INFINITY).astype(np.int64) - starts
    asked, rounds = plain_nvfp4(nvfp4_quotients(np.minimum(starts, INFINITY - 1).astype(np.uint16), tensor), tensor)
    return np.repeat(asked, lengths), np.repeat(rounds, lengths)


def _least(holds: Callable[[U16], NDArray[np.bool_]], near: F32) -> U16:
    """Return from which magnitude on, as BF16 bits, something holds that grows with it; infinity if it never does.

    Args:
        holds: of magnitudes `[A, B, C]`; for each of the `[A, B]` it is another question.
        near: about where it begins, float32 `[A, B]`; what is further off is found too, but slowly.
    """
    guess = np.minimum(near.view(np.uint32) >> np.uint32(16), INFINITY).astype(np.int32)
    few = np.clip(guess[..., None] + _AROUND, 0, INFINITY).astype(np.uint16)
    held = holds(few) | (few == INFINITY)
    index = held.argmax(-1, keepdims=True)
    found: U16 = np.take_along_axis(few, index, -1)[..., 0]
    sure = held[..., -1] & ((index[..., 0] > 0) | (found == 0))
    return found if sure.all() else np.where(sure, found, _searched(holds, near.shape))


def _searched(holds: Callable[[U16], NDArray[np.bool_]], shape: tuple[int, ...]) -> U16:
    """Do `_least` by halving."""
    low, high = np.zeros((*shape, 1), np.uint16), np.full((*shape, 1), INFINITY, np.uint16)
    for _ in range(INFINITY.bit_length()):
        middle: U16 = ((low + high) >> 1).astype(np.uint16)
        found = holds(middle) & (low < high)
        high = np.where(found, middle, high)
        low = np.where(found | (low == high), low, middle + 1)
    return low[..., 0]


def _values(factors: F32) -> U16:
    """Return the BF16 values of the codes 0 to 15 at each scale, `[N, 16]`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(np.concatenate([E2M1, -E2M1]) * factors[:, None])


def _tables(asked: U8, factors: F32, levels: I16) -> Tables:
    values = _values(factors).astype(np.uint32)
    values[np.isnan(factors) | np.signbit(factors)] = INFINITY
    pairs: U32 = (values[:, None, :] | values[:, :, None] << np.uint32(16)).reshape(256, 256)
    refused = ~np.isfinite(factors) | (factors <= 0)
    for each in (asked, levels, pairs, refused):
        each.flags.writeable = False
    return Tables(asked, levels, pairs, refused)


def _trials(plain: U8, place: U8, trials: U8, factors: F32, levels: I16) -> Trials:
    rows = np.concatenate([levels[:, :7], _values(factors)[:, 1:8].astype(np.int16)], 1)
    rows[np.isinf(factors)] = np.repeat(np.array([0, INFINITY], np.int16), 7)  # a zero is no number there, either
    tables = rows[trials].transpose(0, 2, 1)
    # Blocks that are not searched get rows of their own, of their plain scale alone.
    kept = np.repeat(np.arange(len(trials), dtype=np.uint8)[:, None], trials.shape[1], 1)
    searched = (_AMAXES >= LEAST_AMAX) & (_AMAXES < LARGE_AMAX)
    found = Trials(
        np.where(searched, place, plain.astype(np.uint16) + np.uint16(len(trials))).astype(np.uint16),
        np.ascontiguousarray(np.concatenate([tables, np.zeros_like(tables)])),
        np.concatenate([trials, kept]),
    )
    for each in found:
        each.flags.writeable = False
    return found


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
