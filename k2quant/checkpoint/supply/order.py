"""In which order the pieces of a source are fetched, so that they are there in time and its files can be hashed.

A hash takes a file from its beginning to its end. Weights are read in that order too, but not all that belongs to them:
safetensors has wider elements first, so scales lie before all the weights of a shard, or behind them. What comes in the
file's order is hashed as it comes; a piece that is needed too early or too late for that is fetched once more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

PIECE_BYTES = 2**23
"""Bytes that are fetched at once; a multiple of `blocks.BLOCK_BYTES`."""

AHEAD_BYTES = 2**28
"""Bytes of pieces in memory that threads fetch ahead, at most; see `choosing.memory`. A line of 10 Gbit/s over which a
request takes 50 ms has 63 MB under way."""

TINY = 8
"""Bytes of a range, at most, that may be read any number of times: one number for a whole matrix."""

Ranges = Sequence[tuple[str, int, int]]
"""Source shard, first byte, one past the last."""


class Use(NamedTuple):
    """What an output shard reads of the source."""

    output: str
    """Name of the output shard."""
    ranges: tuple[tuple[str, int, int], ...]
    """Source shard, first byte, one past the last, in the order in which they are read."""


class Step(NamedTuple):
    """A piece that is fetched."""

    file: str
    number: int
    """Position of the piece in the file."""
    needed: int
    """Bytes of it that will be read; 0: it is only hashed, or holds but a few numbers."""
    hashed: bool
    """Whether it is its turn in the file's hash."""


def owners(uses: Iterable[Use]) -> dict[str, str]:
    """Return for each source shard the output shard that reads most of it, and so proves it."""
    read: dict[str, dict[str, int]] = {}
    for use in uses:
        for file, start, stop in use.ranges:
            of = read.setdefault(file, {})
            of[use.output] = of.get(use.output, 0) + stop - start
    return {file: max(of, key=lambda output: of[output]) for file, of in read.items()}


def foreign_bytes(uses: Iterable[Use], owned: Mapping[str, str]) -> int:
    """Return the bytes that output shards read of source shards that another one proves."""
    return sum(stop - start for use in uses for file, start, stop in use.ranges if owned[file] != use.output)


def steps(ranges: Ranges, sizes: Mapping[str, int], hashed: Iterable[str]) -> list[Step]:
    """Return the pieces of an output shard's own source shards in the order in which they are fetched.

    Args:
        ranges: what is read, in order; of its own source shards alone.
        sizes: bytes of these.
        hashed: those of them whose digest is known, so that all of each must come.
    """
    needed: dict[tuple[str, int], int] = {}
    for file, start, stop in ranges:
        for number in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
            count = min(stop, (number + 1) * PIECE_BYTES) - max(start, number * PIECE_BYTES)
            key = file, number
            needed[key] = needed.get(key, 0) + (count if stop - start > TINY else 0)
    turns = {file: _in_order([number for name, number in needed if name == file]) for file in hashed}
    found: list[Step] = []
    at = dict.fromkeys(turns, 0)  # the piece whose turn it is
    for (file, number), count in needed.items():
        turn = file in turns and number in turns[file]
        if turn:
            found += _between(file, at[file], number)
            at[file] = number + 1
        if turn or count:
            found.append(Step(file, number, count, turn))
    for file, position in at.items():
        found += _between(file, position, -(-sizes[file] // PIECE_BYTES))
    return found


def _between(file: str, start: int, stop: int) -> list[Step]:
    """Return what nobody reads when it is its turn: it is fetched for the hash alone."""
    return [Step(file, number, 0, hashed=True) for number in range(start, stop)]


def _in_order(numbers: Sequence[int]) -> frozenset[int]:
    """Return the most of some different numbers that stand in ascending order (patience sorting)."""
    ends: list[int] = []  # the smallest number with which an ascending row of each length can end
    before: dict[int, int | None] = {}
    for number in numbers:
        place = bisect_left(ends, number)
        before[number] = ends[place - 1] if place else None
        ends[place : place + 1] = [number]
    row = []
    number_: int | None = ends[-1] if ends else None
    while number_ is not None:
        row.append(number_)
        number_ = before[number_]
    return frozenset(row)
