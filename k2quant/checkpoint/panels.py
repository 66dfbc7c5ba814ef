"""Panels: the rows of a weight that one task works on, so that memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import Weight
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.layouts import FP8_BLOCK, Format, row_bytes

if TYPE_CHECKING:
    from k2quant.formats.transcode import Parts, Scratch

PANEL_WEIGHTS = 2**22
"""Weights of one panel: 4 MB of FP8, which stays in the caches of a core while it is worked on."""

PIECE_BYTES = 2**23
"""Bytes that one task copies, compares or sums."""

ROW_STEP = FP8_BLOCK[0]
"""Panels begin at multiples of this, so that no FP8 block spans two of them."""


def panel_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and width in which a weight is worked on: a matrix as it is, anything else as one column.

    A matrix without columns has no rows to work on either, however many its header claims.
    """
    return (shape[0], shape[1]) if len(shape) == 2 and shape[1] else (prod(shape), 1)


def panel_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield first row and one past the last row of each panel of a weight."""
    rows, width = panel_shape(shape)
    step = max(PANEL_WEIGHTS // max(width, 1) // ROW_STEP, 1) * ROW_STEP
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def panel_state(layout: Format, shape: tuple[int, ...], start: int, stop: int) -> dict[str, TensorSpec]:
    """Return, by suffix, what rows `start` to `stop` of a weight hold of each tensor but `weight_shape`."""
    specs = {}
    for suffix, spec in layout.state(panel_shape(shape)).items():
        if suffix != "weight_shape":
            first, last = layout.rows(suffix, start, stop)
            specs[suffix] = TensorSpec(spec.dtype, (last - first, *spec.shape[1:]))
    return specs


def panel_offset(layout: Format, shape: tuple[int, ...], suffix: str, start: int) -> int:
    """Return the byte of a tensor at which the panel that begins with row `start` begins."""
    spec = layout.state(panel_shape(shape))[suffix]
    return layout.rows(suffix, start, start)[0] * row_bytes(spec)


def read_panel(source: Checkpoint, weight: Weight, start: int, stop: int, scratch: Scratch, *, key: str) -> Parts:
    """Read rows `start` to `stop` of a weight.

    Args:
        source: the checkpoint.
        weight: a weight with a format.
        start: first row, a multiple of `ROW_STEP`.
        stop: one past the last row.
        scratch: this thread's buffers; the arrays live there until the same key is asked for again.
        key: name of the buffers.

    Returns:
        an array for each tensor but `weight_shape`, by suffix.
    """
    layout = weight.format
    if layout is None:
        msg = f"{weight.base} is no weight"
        raise TypeError(msg)
    parts: Parts = {}
    for suffix, spec in panel_state(layout, weight.shape, start, stop).items():
        entry = weight.parts[suffix]
        parts[suffix] = scratch.take(f"{key} {suffix}", spec)
        offset = entry.start + panel_offset(layout, weight.shape, suffix, start)
        read_into(source.shards[entry.file], offset, parts[suffix].data.cast("B"))
    return parts
