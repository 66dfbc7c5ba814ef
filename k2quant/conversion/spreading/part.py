"""The parts of a job array: which output shards each writes, told from the plan alone, so alike on every machine."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from k2quant.conversion.plan import Plan
from k2quant.errors import UsageError

MOST_PARTS = 10_000
"""More parts than any checkpoint has shards."""

_SHAPE = re.compile(r"([0-9]{1,9})/([0-9]{1,9})", re.ASCII)


class Part(NamedTuple):
    """One of several processes that write a plan together."""

    number: int
    """From 1 to `of`."""
    of: int

    def __str__(self) -> str:
        """Return it as people write it, such as `2/8`."""
        return f"{self.number}/{self.of}"

    @property
    def said(self) -> str:
        """As a sentence has it, such as `part 2 of 8`."""
        return f"part {self.number} of {self.of}"

    @property
    def name(self) -> str:
        """As names of files have it, such as `2-of-8`."""
        return f"{self.number}-of-{self.of}"


def part_of(text: object) -> Part:
    """Return the part that `K/N` names, of N parts the K-th, counted from 1.

    Raises:
        UsageError: it names none.
    """
    found = _SHAPE.fullmatch(text) if isinstance(text, str) else None
    part = Part(int(found[1]), int(found[2])) if found else None
    if part is None or not 1 <= part.number <= part.of <= MOST_PARTS:
        raise UsageError(
            f"part is {text!r:.100}; expected K/N, of N parts the K-th, such as '2/8': K from 1 to N, and N at most "
            f"{MOST_PARTS:,}"
        )
    return part


def beside_cluster() -> UsageError:
    """Return the refusal of a part beside a cluster."""
    return UsageError("`part=` beside `cluster=`: by the one you share the work out, by the other Ray does")


def shares(plan: Plan, of: int) -> tuple[tuple[str, ...], ...]:
    """Return the files that each of `of` parts writes, in the plan's order.

    Neighbours stay together, for these hold partners of each other's weights, and experts of one layer.
    """
    files = [shard.file for shard in plan.shards]
    found = divided([shard.bytes_read + shard.size for shard in plan.shards], of)
    return tuple(tuple(files[own.start : own.stop]) for own in found)


def divided(sizes: Sequence[int], of: int) -> tuple[range, ...]:
    """Return the numbers of the things that each of `of` parts does, a run of neighbours each.

    The load of the largest share is the least that such a division can have; the others are then as even as that
    allows. Where there are more parts than things, some have nothing to do.

    Args:
        sizes: how much work each thing is.
        of: how many parts there are.
    """
    most = _smallest_bound(sizes, of)
    found: list[range] = []
    start = 0
    for left in range(of, 0, -1):
        stop = _end(sizes, start, left, most)
        found.append(range(start, stop))
        start = stop
    return tuple(found)


def share(plan: Plan, part: Part) -> tuple[str, ...]:
    """Return the files that one part writes."""
    return shares(plan, part.of)[part.number - 1]


def _end(sizes: Sequence[int], start: int, left: int, most: int) -> int:
    """Return where the share ends that begins at `start`, with `left` parts for it and all that follows."""
    rest, load, stop = sum(sizes[start:]), 0, start
    while stop < len(sizes) and load + sizes[stop] <= most:
        fair = (2 * load + sizes[stop]) * left <= 2 * rest  # most of the next shard lies below the mean of what is left
        if not fair and _runs(sizes[stop:], most) <= left - 1:
            break
        load += sizes[stop]
        stop += 1
    return stop


def _smallest_bound(sizes: Sequence[int], of: int) -> int:
    """Return the least load of the largest share, where shares are runs of neighbours."""
    bounds = range(max(sizes, default=0), sum(sizes) + 1)
    return bounds[bisect_left(bounds, x=True, key=lambda bound: _runs(sizes, bound) <= of)]


def _runs(sizes: Sequence[int], bound: int) -> int:
    """Return how many runs of neighbours are needed where none may be larger than `bound`."""
    runs, room = 0, 0
    for size in sizes:
        if size > room or not runs:
            runs, room = runs + 1, bound
        room -= size
    return runs
