"""The machine code of the search for FP4 scales.

A file of its own, for it calls none of `loops`, see there for why. `reference.fp4_search` says the same in plain torch,
and the tests hold the two equal bit for bit.

How the search is built. A block's candidates and some of its columns fill a vector: 8 scales for NVFP4, 4 for MXFP4,
lane = column * candidates + candidate. Nothing is divided and nothing rounded: for each candidate a table has the seven
magnitudes at which the next code begins, and the BF16 values of the codes 1 to 7; what a weight becomes is the value of
the last magnitude that it reaches. That takes place on 32 lanes of 16 bits, then differences on 16 lanes of float32, so
that a block is eight rows of these. Sums in halves are sums of whole rows, until one is left; it is folded.

LLVM finds no such vectors by itself (loops that say the same took three times as long), so they are written in its own
language: in plain operations on vectors, which it turns into instructions of whatever CPU there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.values import F32, U8, U16

Int = Any  # what numba makes of integers is no one Python type
I16 = NDArray[np.int16]

NVFP4_TRIALS, MXFP4_TRIALS = 8, 4
"""Candidates of a block, as many as the tables have."""

LEVELS = 14
"""Rows of a candidate's table: seven magnitudes, seven values."""


class Trials(NamedTuple):
    """Candidates of every block: `tables` fills it."""

    place: U16
    """By a block's amax, as BF16 bits: the row that has its candidates, equal ones where a block is not searched."""
    tables: I16
    """`[rows, 14, candidates]`, see the head of the file."""
    scales: U8
    """The candidates, `[rows, candidates]`; 8 of them in NVFP4, 4 in MXFP4."""


_ROWS = 8  # of a block: 16 lanes of float32 each
_HALF, _WORD, _LONG, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES = {_HALF: 2, _FLOAT: 4}
_INFINITY = 0x7F800000

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
_part = njit(nogil=True, boundscheck=False, error_model="numpy")  # a part of what is cached


# --- one block ------------------------------------------------------------------------------------------------------


def _same(kind: Any, lanes: int, value: Any) -> Any:
    """Return a vector that has one number in all lanes."""
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


class _Code:
    """The errors of one block's candidates, written where a numba builder stands."""

    def __init__(self, builder: Any, candidates: int) -> None:
        self.builder = builder
        self.candidates = candidates
        self.block = _ROWS * 16 // candidates

    def load(self, kind: Any, lanes: int, address: Any, first: int = 0) -> Any:
        """Return a vector of what lies at an address, from item `first` on."""
        place = self.builder.add(address, _LONG(first * _BYTES[kind]))
        pointer = self.builder.inttoptr(place, ir.VectorType(kind, lanes).as_pointer())
        return self.builder.load(pointer, align=_BYTES[kind])

    def columns(self, kind: Any, address: Any) -> list[Any]:
        """Return one number of each column of a block, 16 to a vector."""
        return [self.load(kind, 16, address, first) for first in range(0, self.block, 16)]

    def shuffle(self, vector: Any, lanes: list[int]) -> Any:
        """Return a vector of chosen lanes."""
        chosen = ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes)
        return self.builder.shuffle_vector(vector, vector, chosen)

    def spread(self, columns: list[Any], row: int, lanes: int = 16) -> Any:
        """Return row `row` of a block, of so many lanes: each of its columns at all candidates."""
        first = row * lanes // self.candidates
        chosen = [first % 16 + lane // self.candidates for lane in range(lanes)]
        return self.shuffle(columns[first // 16], chosen)

    def widened(self, halves: Any) -> Any:
        """Return the bits of float32 that 16 BF16 numbers are."""
        words = self.builder.zext(halves, ir.VectorType(_WORD, 16))
        return self.builder.shl(words, _same(_WORD, 16, 16))

    def floats(self, words: Any) -> Any:
        """Return 16 words as float32."""
        return self.builder.bitcast(words, ir.VectorType(_FLOAT, 16))

    def stored(self, weights: list[Any], table: Any) -> list[Any]:
        """Return what a block's magnitudes become: float32, a row for each 16 lanes."""
        levels = []
        for level in range(LEVELS):
            found = self.load(_HALF, self.candidates, table, level * self.candidates)
            levels.append(self.shuffle(found, [lane % self.candidates for lane in range(32)]))
        rows = []
        for both in range(_ROWS // 2):
            magnitude, found = self.spread(weights, both, 32), _same(_HALF, 32, 0)
            for start, value in zip(levels[: LEVELS // 2], levels[LEVELS // 2 :], strict=True):
                found = self.builder.select(self.builder.icmp_signed(">=", magnitude, start), value, found)
            halves = (self.shuffle(found, list(range(first, first + 16))) for first in (0, 16))
            rows += [self.floats(self.widened(half)) for half in halves]
        return rows

    def differences(self, weights: list[Any], table: Any, unit: Any) -> list[Any]:
        """Return (|w| - |w'|) * unit, a row for each 16 lanes."""
        one = self.builder.insert_element(_same(_FLOAT, 16, 0.0), unit, _WORD(0))
        units = self.shuffle(one, [0] * 16)
        wide = [self.floats(self.widened(each)) for each in weights]
        found = []
        for row, value in enumerate(self.stored(weights, table)):
            found.append(self.builder.fmul(self.builder.fsub(self.spread(wide, row), value), units))
        return found

    def weighed(self, rows: list[Any], factors: list[Any]) -> Any:
        """Return the sum over a block's columns of rows times factors, one for each candidate, added in halves."""
        rows = [self.builder.fmul(each, self.spread(factors, row)) for row, each in enumerate(rows)]
        while len(rows) > 1:
            middle = len(rows) // 2
            rows = [self.builder.fadd(rows[i], rows[i + middle]) for i in range(middle)]
        total, lanes = rows[0], 16
        while lanes > self.candidates:
            lanes //= 2
            low, high = (self.shuffle(total, list(range(first, first + lanes))) for first in (0, lanes))
            total = self.builder.fadd(low, high)
        return total

    def first_least(self, errors: Any) -> Any:
        """Return the index of the least error, the first among equals; NaN counts as infinity."""
        lanes = self.candidates
        words = self.builder.bitcast(errors, ir.VectorType(_WORD, lanes))  # no error has a sign: bits are in order
        infinity = _same(_WORD, lanes, _INFINITY)
        words = self.builder.select(self.builder.icmp_unsigned("<", words, infinity), words, infinity)
        longs = self.builder.zext(words, ir.VectorType(_LONG, lanes))
        keys = self.builder.shl(longs, _same(_LONG, lanes, 8))
        keys = self.builder.or_(keys, ir.Constant(ir.VectorType(_LONG, lanes), list(range(lanes))))
        while lanes > 1:
            lanes //= 2
            low, high = (self.shuffle(keys, list(range(first, first + lanes))) for first in (0, lanes))
            keys = self.builder.select(self.builder.icmp_unsigned("<", low, high), low, high)
        return self.builder.and_(self.builder.extract_element(keys, _WORD(0)), _LONG(0xFF))

    def best(self, weights: Any, table: Any, heavy: Any, mean: Any, unit: Any) -> Any:
        """Return the index of the candidate that errs least; without means where `mean` is None."""
        halves = self.columns(_HALF, weights)
        magnitudes = [self.builder.and_(each, _same(_HALF, 16, 0x7FFF)) for each in halves]
        rows = self.differences(magnitudes, table, unit)
        squares = [self.builder.fmul(each, each) for each in rows]
        errors = self.weighed(squares, self.columns(_FLOAT, heavy))
        if mean is not None:
            signs = [self.builder.and_(self.widened(each), _same(_WORD, 16, 0x80000000)) for each in halves]
            words = [self.builder.bitcast(each, ir.VectorType(_WORD, 16)) for each in self.columns(_FLOAT, mean)]
            signed = [self.builder.xor(each, sign) for each, sign in zip(words, signs, strict=True)]
            shift = self.weighed(rows, [self.floats(each) for each in signed])
            errors = self.builder.fadd(errors, self.builder.fmul(shift, shift))
        return self.first_least(errors)


def _best(candidates: int, *, shifts: bool) -> Any:
    """Return a function for jitted code that tells which candidate errs least on a block.

    It takes the addresses of the block's weights, of its candidates' table, of what its columns weigh and of their
    means, which it reads if `shifts`; and the power of two that its differences are multiplied with.
    """

    @intrinsic
    def found(
        _typing: Any, _weights: Any, _table: Any, _heavy: Any, _mean: Any, _unit: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def build(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            weights, table, heavy, mean, unit = values
            return _Code(builder, candidates).best(weights, table, heavy, mean if shifts else None, unit)

        return types.int64(types.int64, types.int64, types.int64, types.int64, types.float32), build

    return found


# --- panels ---------------------------------------------------------------------------------------------------------


@_jit
def _largest(weights: U16) -> np.uint16:
    """Return the largest magnitude among BF16 bits."""
    largest = np.uint16(0)
    for i in range(weights.size):
        magnitude = np.uint16(weights[i] & np.uint16(0x7FFF))
        largest = max(largest, magnitude)
    return largest


@_jit
def _largest_of_blocks(weights: U16, amax: U16, blocks: int) -> None:
    """Write the largest magnitude of each block of a row; as many more follow as halves of 16 columns are more."""
    for half in range(amax.size):  # LLVM wants to know of how many columns
        amax[half] = _largest(weights[half * 16 : half * 16 + 16])
    if blocks < amax.size:
        for each in range(blocks):
            amax[each] = max(amax[2 * each], amax[2 * each + 1])


def _row(candidates: int, *, shifts: bool) -> Any:
    """Return a jitted function that searches the blocks of a row, each on its own: one loop for each kind of search.

    One loop for all of them took a sixth longer: what a search keeps in registers from block to block did not fit.
    """
    best, size = _best(candidates, shifts=shifts), LEVELS * candidates * 2

    @_part
    def row(here: Int, heavy: Int, mean: Int, tables: Int, units: F32, rows: U16, chosen: U8) -> None:
        for block in range(chosen.size):
            first = np.int64(block * (_ROWS * 16 // candidates))
            table = tables + np.int64(rows[block]) * size
            chosen[block] = best(here + first * 2, table, heavy + first * 4, mean + first * 4, units[block])

    return row


_nvfp4, _nvfp4_shifted = _row(NVFP4_TRIALS, shifts=False), _row(NVFP4_TRIALS, shifts=True)
_mxfp4, _mxfp4_shifted = _row(MXFP4_TRIALS, shifts=False), _row(MXFP4_TRIALS, shifts=True)


@_jit
def search(weights: U16, heavy: F32, mean: F32, trials: Trials, scale: U8) -> bool:
    """Write the scale of least error for each block; return whether all weights are finite.

    Args:
        weights: BF16 bits.
        heavy: what each column weighs.
        mean: of each column; of length 0 where none is known.
        trials: their candidates.
        scale: written.
    """
    columns, blocks, candidates = weights.shape[1], scale.shape[1], trials.scales.shape[1]
    amax, units = np.empty(columns // 16, np.uint16), np.empty(blocks, np.float32)
    rows, chosen = np.empty(blocks, np.uint16), np.empty(blocks, np.uint8)
    first, tables = np.int64(weights.ctypes.data), np.int64(trials.tables.ctypes.data)
    weigh, means = np.int64(heavy.ctypes.data), np.int64(mean.ctypes.data)
    for row in range(scale.shape[0]):
        _largest_of_blocks(weights[row], amax, blocks)
        if _largest(amax) >= explain.INFINITY:
            return False
        for each in range(blocks):
            rows[each] = trials.place[amax[each]]
            units[each] = np.uint32((254 - (np.int64(amax[each]) >> 7)) << 23).view(np.float32)
        here = first + row * columns * 2
        if candidates == NVFP4_TRIALS:
            if len(mean):
                _nvfp4_shifted(here, weigh, means, tables, units, rows, chosen)
            else:
                _nvfp4(here, weigh, means, tables, units, rows, chosen)
        elif len(mean):
            _mxfp4_shifted(here, weigh, means, tables, units, rows, chosen)
        else:
            _mxfp4(here, weigh, means, tables, units, rows, chosen)
        for each in range(blocks):
            scale[row, each] = trials.scales[rows[each], chosen[each]]
    return True
