"""How the rows of the data go through a layer: attention in pieces of a few rows, experts in waves of many.

What is multiplied together decides the last bits of a product. So pieces, and the segments in which an expert sees its
tokens, are cut in places that depend on the data alone; only how many segments make a wave depends on memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from k2quant.calib.collecting.memory import piece_rows, segment_rows
from k2quant.calib.stats.layout import PARTS, Part

if TYPE_CHECKING:
    from k2quant.calib.inputs import Samples


class Piece(NamedTuple):
    """Some rows of one part."""

    part: Part
    tokens: Tensor
    """int64 `[B, T]`."""
    positions: Tensor
    """int64 `[B, T]`: the texts of a row begin anew, and do not see one another."""
    real: Tensor
    """bool `[B, T]`, False for padding."""

    @property
    def size(self) -> int:
        """Tokens, those of padding too."""
        return self.tokens.numel()


Segment = tuple[Piece, ...]
"""Pieces whose tokens an expert sees at once; of one part."""


def segments(samples: Samples) -> list[Segment]:
    """Cut the parts that are measured into pieces, and group these."""
    return [segment for part in PARTS for segment in _segments(part, getattr(samples, part))]


def _segments(part: Part, rows: object) -> Iterator[Segment]:
    tokens, positions, real = (getattr(rows, name) for name in ("tokens", "positions", "real"))
    count, length = tokens.shape
    large, small = segment_rows(length), piece_rows(length)
    for first in range(0, count, large):
        last = min(first + large, count)
        yield tuple(
            Piece(part, tokens[start:stop], positions[start:stop], real[start:stop])
            for start in range(first, last, small)
            for stop in [min(start + small, last)]
        )


def waves(found: Sequence[Segment], size: int) -> Iterator[tuple[int, Sequence[Segment]]]:
    """Yield waves of `size` segments, each with the number of its first piece."""
    begun = 0
    for start in range(0, len(found), size):
        wave = found[start : start + size]
        yield begun, wave
        begun += sum(map(len, wave))
