"""The two INT4 rounding rules, how wide their codes may be, and how many codes of a format share a scale."""

from __future__ import annotations

from typing import Literal

from k2quant.errors import UsageError

Grid = Literal["moonshot", "compressed-tensors"]
"""`moonshot`: scale = amax/7, codes -7..7. `compressed-tensors`: scale = amax/7.5, codes -8..7."""

GROUP = 32
"""Columns that share an INT4 scale in what is written; other groups are only read."""

NVFP4_BLOCK = 16
"""Columns that share an NVFP4 block scale."""

MXFP4_BLOCK = 32
"""Columns that share an MXFP4 scale."""

BLOCK = (128, 128)
"""Rows and columns that share an FP8 scale in every K2 and DeepSeek-V3 release (`weight_block_size`)."""

PACKED_BITS = (4, 3, 2)
"""Widths whose codes fit the nibbles of INT4. Checkpoints have 4; fewer stress calibration and training."""

FAKE_BITS = (8, *PACKED_BITS)
"""Widths that fake quantisation knows: it stores no code."""


def largest_code(grid: Grid, bits: int, known: tuple[int, ...] = FAKE_BITS) -> int:
    """Return L = 2^(bits-1) - 1: a moonshot group has the scale amax/L and codes -L..L.

    Raises:
        UsageError: `bits` is none of the known widths, or other than 4 on another grid than moonshot.
    """
    if bits not in known:
        raise UsageError(f"bits: expected {' or '.join(map(str, known))}, found {bits}")
    if bits != 4 and grid != "moonshot":
        raise UsageError(f"bits: expected 4 for the grid {grid}, found {bits}; only moonshot has other widths")
    return (1 << (bits - 1)) - 1
