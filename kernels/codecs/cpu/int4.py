"""INT4 on the CPU: `seam.Int4Codec` as functions, and rounding to INT4 and back."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import loops, search_loops
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_int4, valid, whole_groups
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, Grid, largest_code
from k2quant.kernels.codecs.scales.recovery import int4_table
from k2quant.kernels.codecs.scales.search import (
    candidate_table,
    check_importance,
    check_mean,
    column_moments,
    column_weights,
    variance,
)
from k2quant.kernels.codecs.values import F32, I32, U16, bf16_to_float

_NO_MEAN = np.empty(0, np.float32)


def decode(packed: I32, scale: F32, group: int, out: U16) -> None:
    """Multiply each group of codes by its scale. See `seam.Int4Codec`."""
    rows, columns = out.shape
    same(packed.shape, (rows, columns // 8))
    same(scale.shape, (rows, columns // group))
    if not (valid(scale) and loops.int4_to_bf16(frozen(packed.view(np.uint8)), frozen(scale), group, out)):
        raise explain.bad_int4(packed, scale, group)


def encode(weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4) -> Figures:
    """Recover or compute each group's scale, then round to INT4. See `seam.Int4Codec`."""
    same_int4(weights.shape, scale, packed)
    largest = np.float32(largest_code(grid, bits, PACKED_BITS))
    job = rule_of(grid, recover=recover and bits == 4), largest, loops.ENCODE
    outcome = loops.bf16_to_int4(frozen(weights), *job, int4_table(), packed.view(np.uint8), scale)
    found = figures(weights.size, outcome)
    if found is None:
        raise explain.bad_group(weights, bits)
    return found


def choose(weights: U16, grid: Grid, scale: U16, *, recover: bool = True, bits: int = 4) -> None:
    """Recover or compute each group's scale. See `seam.Int4Codec`."""
    same_int4(weights.shape, scale)
    largest = np.float32(largest_code(grid, bits, PACKED_BITS))
    job = rule_of(grid, recover=recover and bits == 4), largest, loops.CHOOSE
    untouched = np.empty((len(weights), 0), np.uint8)
    if figures(0, loops.bf16_to_int4(frozen(weights), *job, int4_table(), untouched, scale)) is None:
        raise explain.bad_weight(weights)


def store(weights: U16, scale: U16, grid: Grid, packed: I32, *, bits: int = 4) -> Figures:
    """Round to INT4 at the scales that are given. See `seam.Int4Codec`."""
    same_int4(weights.shape, scale, packed)
    largest = np.float32(largest_code(grid, bits, PACKED_BITS))
    wide = bf16_to_float(scale)
    if (error := explain.bad_divisor(wide)) is not None:
        raise explain.bad_weight(weights) if explain.has_infinity(weights) else error  # as the reference has it
    job = rule_of(grid, recover=False), largest, loops.STORE
    own = np.array(scale)  # writable, as `encode` has it: one signature for both
    found = figures(weights.size, loops.bf16_to_int4(frozen(weights), *job, int4_table(), packed.view(np.uint8), own))
    if found is None:
        raise explain.bad_weight(weights) if explain.has_infinity(weights) else explain.bad_int4(packed, wide, GROUP)
    return found


def search(
    weights: U16,
    importance: F32 | None,
    scale: U16,
    *,
    mean: F32 | None = None,
    bits: int = 4,
    recover: bool = True,
) -> None:
    """Choose the scale of least error for each group. See `seam.Int4Codec`."""
    heavy, shift = column_weights(importance, weights.shape[1]), _NO_MEAN
    if mean is not None:
        heavy, shift = column_moments(importance, mean, weights.shape[1])
    choose(weights, "moonshot", scale, recover=recover, bits=bits)
    largest = np.float32(largest_code("moonshot", bits, PACKED_BITS))
    search_loops.search(
        frozen(weights), frozen(heavy), frozen(shift), candidate_table(bits), _steps(bits), largest, scale
    )


def weighted_error(
    weights: U16, scale: U16, importance: F32 | None, *, mean: F32 | None = None, bits: int = 4
) -> float:
    """Return what rounding at these scales loses, each column weighed. See `seam.Int4Codec`."""
    same_int4(weights.shape, scale)
    largest = np.float32(largest_code("moonshot", bits, PACKED_BITS))
    known = np.ones(weights.shape[1], np.float32) if importance is None else importance
    check_importance(known, weights.shape[1])
    if mean is not None:
        check_mean(mean, importance, weights.shape[1])
    heavy, shift = frozen(variance(known, mean)), frozen(_NO_MEAN if mean is None else mean)
    sums = np.empty(len(weights))
    good = explain.bad_divisor(bf16_to_float(scale)) is None
    if not (good and search_loops.weighted_errors(frozen(weights), heavy, shift, largest, frozen(scale), sums)):
        store(weights, scale, "moonshot", np.empty((len(weights), weights.shape[1] // 8), np.int32), bits=bits)
    return math.fsum(sums)


@lru_cache(maxsize=len(PACKED_BITS))
def _steps(bits: int) -> tuple[F32, F32, F32]:
    """Return what the loops ask of the candidates: their reciprocals, and the candidates times 65536 and 65537."""
    table = bf16_to_float(candidate_table(bits))
    return np.reciprocal(table), table * np.float32(65536), table * np.float32(65537)


def fake_quantize(weights: U16, grid: Grid, out: U16, *, bits: int = 4) -> None:
    """Write what `encode` without recovery and `decode` would give, in one pass; nothing is packed.

    Args:
        weights: BF16 bits `[R, K]`, K a multiple of 32.
        grid: the rounding rule.
        out: BF16 bits `[R, K]`.
        bits: width of the codes, 8, 4, 3 or 2; other than 4 on the moonshot grid alone.

    Raises:
        UsageError: there is no such width on this grid.
        ValueAt: a weight is not finite, or would not be after decoding.
    """
    same(weights.shape, out.shape)
    whole_groups(weights.shape)
    largest = np.float32(largest_code(grid, bits))
    if not loops.fake_quantize_int4(frozen(weights), rule_of(grid, recover=False), largest, out):
        raise explain.bad_group(weights, bits)


def rule_of(grid: Grid, *, recover: bool) -> int:
    """Return the rule as the loops know it."""
    if grid == "compressed-tensors":
        return loops.COMPRESSED_TENSORS
    return loops.RECOVER if recover else loops.PLAIN
