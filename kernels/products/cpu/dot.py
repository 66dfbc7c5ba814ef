"""x @ W.T on a CPU that multiplies BF16 itself, straight from the checkpoint's bytes.

Weights stay as they lie on disk: nothing is repacked, and they may be views of mapped files. A weight becomes BF16 on
its way to the multiplier, and never goes back to memory.

`dot_loops` says how; here stand the arguments and their checks.

**The result of a row does not depend on its neighbours.** Every number of `out` is made by the same additions in the
same order, whatever the other rows of x, the number of rows, and the range of rows of W: batches, ranges and threads
give the same bits. The sums flush subnormal float32 to zero, as this instruction always does; so it does with
subnormal BF16 in x. NaN and infinity in x come through, in their own row of `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.values import F32, I32, U8, U16
from k2quant.kernels.products.cpu.dot_loops import (
    BLOCK,
    FEW,
    GROUP,
    ROWS,
    STRIP,
    fp4_entry,
    fp4_rows,
    fp8_entry,
    fp8_rows,
    int4_entry,
    int4_rows,
    supported,
    task_parameters,
)

__all__ = [
    "Task",
    "Work",
    "fp8_dot",
    "fp8_task",
    "fp8_work",
    "int4_dot",
    "int4_task",
    "int4_work",
    "mxfp4_dot",
    "mxfp4_task",
    "mxfp4_work",
    "nvfp4_dot",
    "nvfp4_task",
    "nvfp4_work",
    "rows_together",
    "supported",
]

Work = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Task:
    """Work that any number of threads may do together: each calls the function at `entry` with the parameters once."""

    entry: int
    """Address of a C function that takes the address of the parameters."""
    parameters: NDArray[np.int64]
    arrays: tuple[NDArray[Any], ...]
    """What the parameters point to, kept alive."""


def int4_dot(x: U16, packed: I32, scale: U16, out: U16, first: int, last: int) -> None:
    """Write x @ W.T for rows `first` to `last` of an INT4 W to the same columns of `out`, rounded once, half to even.

    Args:
        x: BF16 bits `[M, K]`; K is a multiple of 32.
        packed: words `[N, K/8]`, the lowest column in the lowest nibble, nibble = code + 8.
        scale: BF16 bits `[N, K/32]`.
        out: BF16 bits `[M, N]`.
        first: first row of W. Ranges of multiples of `rows_together(M)` rows waste nothing.
        last: row of W to stop before.
    """
    _within(packed.shape[0], first, last)
    int4_work(x, packed, scale, out)(first, last)


def int4_work(x: U16, packed: I32, scale: U16, out: U16) -> Work:
    """Return `int4_dot` for given arrays, to be called with ranges of rows, which are not checked.

    What the ranges have in common is done once, so a range holds Python's lock for hardly longer than it takes to call
    it. That lets threads start together: a row of x times a weight of 2048 x 7168 takes 0.27 instead of 0.32 ms.
    """
    (rows, columns), height = x.shape, packed.shape[0]
    if columns % GROUP:
        raise ValueError(f"expected a multiple of {GROUP} columns, found {columns}")
    _same(packed.shape, (height, columns // 8))
    _same(scale.shape, (height, columns // GROUP))
    _same(out.shape, (rows, height))
    return partial(int4_rows, _frozen(x), _frozen(packed.view(np.uint8)), _frozen(scale.view(np.uint8)), out)


def fp8_dot(
    x: U16, codes: U8, scale: F32, block_rows: int, block_columns: int, out: U16, first: int, last: int
) -> None:
    """Write x @ W.T for rows `first` to `last` of an FP8 W to the same columns of `out`, rounded once, half to even.

    Args:
        x: BF16 bits `[M, K]`, any K.
        codes: e4m3fn codes `[N, K]`, none of them NaN.
        scale: float32 `[ceil(N/block_rows), ceil(K/block_columns)]`.
        block_rows: rows of W that share a scale.
        block_columns: columns that share a scale; a multiple of 32.
        out: BF16 bits `[M, N]`.
        first: first row of W. Ranges of multiples of `rows_together(M)` rows waste nothing.
        last: row of W to stop before.
    """
    _within(codes.shape[0], first, last)
    fp8_work(x, codes, scale, block_rows, block_columns, out)(first, last)


def fp8_work(x: U16, codes: U8, scale: F32, block_rows: int, block_columns: int, out: U16) -> Work:
    """Return `fp8_dot` for given arrays, to be called with ranges of rows, which are not checked; see `int4_work`."""
    (rows, columns), height = x.shape, codes.shape[0]
    if block_columns % GROUP:
        raise ValueError(f"expected blocks of a multiple of {GROUP} columns, found {block_columns}")
    _same(codes.shape, (height, columns))
    _same(scale.shape, (-(-height // block_rows), -(-columns // block_columns)))
    _same(out.shape, (rows, height))
    return partial(fp8_rows, _frozen(x), _frozen(codes), _frozen(scale), block_rows, block_columns, out)


def nvfp4_dot(x: U16, codes: U8, scale: U8, least: F32, out: U16, first: int, last: int) -> None:
    """Write x @ W.T for rows `first` to `last` of an NVFP4 W to the same columns of `out`, rounded once, half to even.

    Args:
        x: BF16 bits `[M, K]`; K is a multiple of 32.
        codes: E2M1 `[N, K/2]`, the even column in the low nibble.
        scale: e4m3fn bits `[N, K/16]`, none of them negative or NaN.
        least: float32 `[16]`: what a code counts at the scales 0 to 15, from `fp4.block_scales`.
        out: BF16 bits `[M, N]`.
        first: first row of W. Ranges of multiples of `rows_together(M)` rows waste nothing.
        last: row of W to stop before.
    """
    _within(codes.shape[0], first, last)
    nvfp4_work(x, codes, scale, least, out)(first, last)


def nvfp4_work(x: U16, codes: U8, scale: U8, least: F32, out: U16) -> Work:
    """Return `nvfp4_dot` for given arrays, to be called with ranges of rows, which are not checked; see `int4_work`."""
    _same(least.shape, (16,))
    return _fp4_work(x, codes, scale, least, out, BLOCK)


def mxfp4_dot(x: U16, codes: U8, scale: U8, out: U16, first: int, last: int) -> None:
    """Write x @ W.T for rows `first` to `last` of an MXFP4 W to the same columns of `out`, rounded once, half to even.

    Args:
        x: BF16 bits `[M, K]`; K is a multiple of 32.
        codes: E2M1 `[N, K/2]`, the even column in the low nibble.
        scale: `[N, K/32]`: b stands for 2^(b - 127); none is 255.
        out: BF16 bits `[M, N]`.
        first: first row of W. Ranges of multiples of `rows_together(M)` rows waste nothing.
        last: row of W to stop before.
    """
    _within(codes.shape[0], first, last)
    mxfp4_work(x, codes, scale, out)(first, last)


def mxfp4_work(x: U16, codes: U8, scale: U8, out: U16) -> Work:
    """Return `mxfp4_dot` for given arrays, to be called with ranges of rows, which are not checked; see `int4_work`."""
    return _fp4_work(x, codes, scale, _NONE, out, GROUP)


def _fp4_work(x: U16, codes: U8, scale: U8, least: F32, out: U16, block: int) -> Work:
    (rows, columns), height = x.shape, codes.shape[0]
    if columns % GROUP:
        raise ValueError(f"expected a multiple of {GROUP} columns, found {columns}")
    _same(codes.shape, (height, columns // 2))
    _same(scale.shape, (height, columns // block))
    _same(out.shape, (rows, height))
    return partial(fp4_rows, _frozen(x), _frozen(codes), _frozen(scale), _frozen(least), out)


_NONE = np.empty(0, np.float32)


def int4_task(x: U16, packed: I32, scale: U16, out: U16) -> Task:
    """Return `int4_dot` of all rows, unchecked, as a task for threads that never ask for Python's lock."""
    (rows, columns), height = x.shape, packed.shape[0]
    addresses = [array.ctypes.data for array in (x, packed, scale, out)]
    return Task(
        int4_entry().address, task_parameters([rows, columns, height, *addresses, 0, 0]), (x, packed, scale, out)
    )


def fp8_task(x: U16, codes: U8, scale: F32, block_rows: int, block_columns: int, out: U16) -> Task:
    """Return `fp8_dot` of all rows, unchecked, as such a task."""
    (rows, columns), height = x.shape, codes.shape[0]
    addresses = [array.ctypes.data for array in (x, codes, scale, out)]
    parameters = task_parameters([rows, columns, height, *addresses, block_rows, block_columns])
    return Task(fp8_entry().address, parameters, (x, codes, scale, out))


def nvfp4_task(x: U16, codes: U8, scale: U8, least: F32, out: U16) -> Task:
    """Return `nvfp4_dot` of all rows, unchecked, as such a task."""
    return _fp4_task(x, codes, scale, least, out, BLOCK)


def mxfp4_task(x: U16, codes: U8, scale: U8, out: U16) -> Task:
    """Return `mxfp4_dot` of all rows, unchecked, as such a task."""
    return _fp4_task(x, codes, scale, _NONE, out, GROUP)


def _fp4_task(x: U16, codes: U8, scale: U8, least: F32, out: U16, block: int) -> Task:
    (rows, columns), height = x.shape, codes.shape[0]
    arrays = x, codes, scale, out, least
    parameters = task_parameters([rows, columns, height, *(array.ctypes.data for array in arrays), block])
    return Task(fp4_entry().address, parameters, arrays)


def rows_together(rows: int) -> int:
    """Return how many rows of W are worked on together for so many rows of x."""
    return STRIP if rows <= FEW else ROWS


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view, so that numba compiles one signature for mapped files and for plain arrays."""
    view = array.view()
    view.flags.writeable = False
    return view


def _same(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"expected shape {expected}, found {found}")


def _within(height: int, first: int, last: int) -> None:
    if not 0 <= first <= last <= height:
        raise ValueError(f"expected rows within 0 to {height}, found {first} to {last}")
