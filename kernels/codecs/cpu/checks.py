"""What every codec on the CPU asks of its arrays before it runs a loop, and makes of what the loop returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.cpu.loops import Outcome
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.values import F32, I32, U8, U16


def same(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a shape that is not the expected one."""
    if found != expected:
        raise ValueError(f"expected shape {expected}, found {found}")


def same_fp8(shape: tuple[int, ...], scale: F32, block: tuple[int, int]) -> None:
    """Refuse a scale that does not have one entry for each block of a matrix."""
    same(scale.shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))


def same_int4(shape: tuple[int, ...], scale: U16, packed: I32 | None = None) -> None:
    """Refuse scales and words that are not those of a matrix in groups of 32."""
    whole_groups(shape)
    if packed is not None:
        same(packed.shape, (shape[0], shape[1] // 8))
    same(scale.shape, (shape[0], shape[1] // GROUP))


def whole_groups(shape: tuple[int, ...]) -> None:
    """Refuse a matrix that groups of 32 columns do not divide."""
    if shape[1] % GROUP:
        raise ValueError(f"expected a multiple of {GROUP} columns, found {shape[1]}")


def same_fp4(shape: tuple[int, ...], scale: U8, block: int, codes: U8 | None = None) -> None:
    """Refuse scales and bytes that are not those of a matrix of FP4 in blocks of so many columns."""
    if shape[1] % block:
        raise ValueError(f"expected a multiple of {block} columns, found {shape[1]}")
    same(scale.shape, (shape[0], shape[1] // block))
    if codes is not None:
        same(codes.shape, (shape[0], shape[1] // 2))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view, so that numba compiles one signature for mapped files and for plain arrays."""
    view = array.view()
    view.flags.writeable = False
    return view


def valid(scale: F32) -> bool:
    """Return whether every scale is finite and has no sign: as bits, the others are larger."""
    return scale.size == 0 or int(scale.view(np.uint32).max()) <= 0x7F7FFFFF


def figures(count: int, outcome: Outcome) -> Figures | None:
    """Return the figures; nothing if the codec met a bad value, or made one: an INT4 value beyond BF16."""
    changed, energy, error, worst = outcome
    return None if changed < 0 or worst == np.inf else Figures(count, changed, energy, error, worst)
