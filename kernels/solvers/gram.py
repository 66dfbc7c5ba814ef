"""Products of inputs with themselves, summed: half the work of a whole product, for the sum is symmetric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import Tensor

from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.devices.threads import over_rows

TILE = 256
"""Rows and columns of the sum that one thread takes at a time."""

CORNER = 128
"""A tile on the diagonal is halved down to this; so much of what lies above the diagonal is computed for nothing.

Measured on two threads, blocks of 2,048 tokens, against half the time of one whole product: 1.26x at K = 2048 and 1.23x
at 7168. Tiles of 512 take 1.43x, for ten of them come out uneven, and 1.18x; of 1024 1.29x and 1.16x."""

_Rectangle = tuple[int, int, int, int]


def add_gram(total: Tensor, inputs: Tensor) -> None:
    """Add X^T X to the lower triangle of a sum; above the diagonal it holds anything afterwards.

    Rectangles are cut in the same places for any number of threads, each multiplied by one, so that their number, up to
    `torch.get_num_threads()`, changes no bit.

    Args:
        total: float32 `[K, K]`.
        inputs: float32 `[n, K]`, X.
    """
    tiles = _tiles(len(total))

    def work(first: int, last: int) -> None:
        for tile in tiles[first:last]:
            for top, bottom, left, right in tile:
                total[top:bottom, left:right].addmm_(inputs[:, top:bottom].T, inputs[:, left:right])

    with single_threaded() as threads:
        over_rows(len(tiles), 1, work, threads=threads if total.device.type == "cpu" else 1)


@cache
def _tiles(width: int) -> tuple[tuple[_Rectangle, ...], ...]:
    """Return the tiles of the lower triangle of `[width, width]`, each as rectangles: top, bottom, left, right."""
    found: list[tuple[_Rectangle, ...]] = []
    for top in range(0, width, TILE):
        bottom = min(top + TILE, width)
        found.extend(((top, bottom, left, left + TILE),) for left in range(0, top, TILE))
        found.append(tuple(_corner(top, bottom)))
    return tuple(found)


def _corner(first: int, last: int) -> Iterator[_Rectangle]:
    """Yield rectangles that cover the lower triangle of rows and columns `first` to `last`."""
    if last - first <= CORNER:
        yield first, last, first, last
        return
    middle = (first + last) // 2
    yield middle, last, first, middle
    yield from _corner(first, middle)
    yield from _corner(middle, last)
