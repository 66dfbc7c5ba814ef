"""Read the factors of an update, no more of them at a time than a panel needs."""

from __future__ import annotations

import numpy as np

from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.panels import PIECE_BYTES
from k2quant.checkpoint.reading import read_into
from k2quant.formats.dtypes import DTYPES, TensorSpec
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.values import F64, bf16_to_float
from k2quant.merge.targets import LowRank


def right(shard: ShardHeader, change: LowRank, scratch: Scratch) -> F64:
    """Return the factor `[r, K]` that all rows of the weight share."""
    if change.transposed:
        return read(shard, change.pair.b, slice(None), _of_expert(change), scratch).T
    return read(shard, change.pair.a, _ranks(change), slice(None), scratch)


def left(shard: ShardHeader, change: LowRank, start: int, stop: int, scratch: Scratch) -> F64:
    """Return the factor `[R, r]` of rows `start` to `stop` of the weight."""
    rows = slice(change.first_row + start, change.first_row + stop)
    if not change.transposed:
        return read(shard, change.pair.b, rows, _of_expert(change), scratch)
    return read(shard, change.pair.a, _ranks(change), rows, scratch).T


def _ranks(change: LowRank) -> slice:
    """Return the rows of A that belong to a weight."""
    return slice(change.first_rank, change.first_rank + change.rank)


def _of_expert(change: LowRank) -> slice:
    """Return the columns of B that belong to an expert."""
    return slice(change.first_column, None, change.column_step)


def read(shard: ShardHeader, entry: TensorEntry, rows: slice, columns: slice, scratch: Scratch) -> F64:
    """Return some rows and columns of a matrix in float64; whole rows are read, a piece at a time."""
    height, width = entry.shape
    start, stop, _ = rows.indices(height)
    found = np.empty((stop - start, len(range(*columns.indices(width)))))
    row_bytes = width * DTYPES[entry.dtype].nbytes
    step = max(PIECE_BYTES // row_bytes, 1)
    for row in range(start, stop, step):
        count = min(step, stop - row)
        values = scratch.take("factor", TensorSpec(entry.dtype, (count, width)))
        read_into(shard, entry.start + row * row_bytes, values.data.cast("B"))
        piece = values[:, columns]
        found[row - start : row - start + count] = bf16_to_float(piece) if entry.dtype == "BF16" else piece
    return found
