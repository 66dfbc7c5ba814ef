"""Panels: the rows of a weight that one task works on, so that memory does not grow with the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple

from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import StoredWeight
from k2quant.formats.dtypes import TensorSpec, as_array, row_bytes
from k2quant.formats.format import Format, Parts
from k2quant.formats.known import FORMATS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.seam import Codecs

PANEL_WEIGHTS = 2**22
"""Weights of one panel: 4 MB of FP8, which stays in the caches of a core while it is worked on."""

PIECE_BYTES = 2**23
"""Bytes that one task copies, compares or sums."""

ROW_STEP = lcm(*(kind.asked_for().row_step for kind in FORMATS.values()))
"""Panels begin at multiples of this, so that no block of rows that share a scale spans two of them."""


def panel_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and width in which a weight is worked on: a matrix as it is, anything else as one column.

    A matrix without columns has no rows to work on either, however many its header claims.
    """
    return (shape[0], shape[1]) if len(shape) == 2 and shape[1] else (prod(shape), 1)


def panel_rows(shape: tuple[int, ...], together: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first row and one past the last row of each panel of a weight.

    Args:
        shape: of the weight.
        together: rows that no two panels share, beside those that share a scale.
    """
    rows, width = panel_shape(shape)
    least = lcm(ROW_STEP, together)
    step = max(PANEL_WEIGHTS // max(width, 1) // least, 1) * least
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def panel_state(format: Format, shape: tuple[int, ...], start: int, stop: int) -> dict[str, TensorSpec]:
    """Return, by suffix, what rows `start` to `stop` of a weight hold of each tensor that is streamed."""
    specs = {}
    state = format.state(panel_shape(shape))
    for suffix in format.streamed:
        first, last = format.rows(suffix, start, stop)
        specs[suffix] = TensorSpec(state[suffix].dtype, (last - first, *state[suffix].shape[1:]))
    return specs


def panel_offset(format: Format, shape: tuple[int, ...], suffix: str, start: int) -> int:
    """Return the byte of a tensor at which the panel that begins with row `start` begins."""
    spec = format.state(panel_shape(shape))[suffix]
    return format.rows(suffix, start, start)[0] * row_bytes(spec)


def format_of(weight: StoredWeight) -> Format:
    """Return the format of a weight that has one.

    Raises:
        TypeError: it is no weight; such a tensor has no panels.
    """
    if weight.format is None:
        msg = f"{weight.base} is no weight"
        raise TypeError(msg)
    return weight.format


def read_panel(source: Checkpoint, weight: StoredWeight, start: int, stop: int, scratch: Scratch) -> Parts:
    """Read rows `start` to `stop` of a weight.

    Args:
        source: the checkpoint.
        weight: a weight with a format.
        start: first row, a multiple of `ROW_STEP`.
        stop: one past the last row.
        scratch: this thread's buffers; the arrays live there until the next panel is read into them.

    Returns:
        an array for each tensor that is streamed, by suffix.
    """
    stored = format_of(weight)
    parts: Parts = {}
    for suffix, spec in panel_state(stored, weight.shape, start, stop).items():
        entry = weight.parts[suffix]
        parts[suffix] = scratch.take(f"in {suffix}", spec)
        offset = entry.start + panel_offset(stored, weight.shape, suffix, start)
        read_into(source.shards[entry.file], offset, parts[suffix].data.cast("B"))
    return parts


def read_whole(source: Checkpoint, weight: StoredWeight) -> Parts:
    """Read what every panel of a weight has whole: an array for each such tensor, by suffix."""
    import numpy as np

    stored = format_of(weight)
    state = stored.state(weight.shape)
    parts: Parts = {}
    for suffix in (each for each in stored.streamed if each in stored.whole):
        parts[suffix] = as_array(np.empty(state[suffix].nbytes, np.uint8), state[suffix])
        entry = weight.parts[suffix]
        read_into(source.shards[entry.file], entry.start, parts[suffix].reshape(-1).data.cast("B"))
    return parts


class Panel(NamedTuple):
    """Rows of a weight, as they are stored and as what they mean."""

    parts: Parts
    """The arrays, by suffix."""
    values: NDArray[np.uint16]
    """BF16 bits `[R, K]`."""


def read_values(
    source: Checkpoint, weight: StoredWeight, start: int, stop: int, *, codecs: Codecs, scratch: Scratch
) -> Panel:
    """Read rows of a weight and decode them; see `read_panel`.

    Raises:
        CheckpointError: the file cannot be read, or holds values that no weight can hold.
    """
    from k2quant.formats.transcode import to_bf16

    parts = read_panel(source, weight, start, stop, scratch)
    with naming(weight, start):
        return Panel(parts, to_bf16(format_of(weight), parts, codecs=codecs, scratch=scratch))


@contextlib.contextmanager
def naming(weight: StoredWeight, start: int) -> Iterator[None]:
    """Turn a bad value in a panel that begins with row `start` into an error that names tensor, row and column.

    Raises:
        BadValue: there is one.
    """
    from k2quant.formats.transcode import located
    from k2quant.kernels.codecs.values import ValueAt

    try:
        yield
    except ValueAt as error:
        tensors = {suffix: entry.name for suffix, entry in weight.parts.items()}
        raise located(error, format_of(weight), start, tensors, weight.main.file) from error
