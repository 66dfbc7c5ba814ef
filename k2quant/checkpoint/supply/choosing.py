"""How a source comes: by range, straight into memory, or as whole shards, by way of the disk."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Literal, NamedTuple

from k2quant.checkpoint.supply.order import AHEAD_BYTES, PIECE_BYTES, Use, foreign_bytes, steps

Way = Literal["ranges", "shards"]

WASTE = 0.25
"""What ranges may fetch twice, of all that is read, before whole shards are better: scales that lie behind their
weights are a ninth of an INT4 checkpoint."""


class Choice(NamedTuple):
    """How a source comes."""

    way: Way
    traffic: int
    """Bytes that will come over the network."""


def way_of(
    todo: Sequence[Use],
    owned: Mapping[str, str],
    sizes: Mapping[str, int],
    sha256: Container[str],
    *,
    once: bool,
) -> Choice:
    """Choose: by range where each byte is read once and few come twice (benchmarks/results/remote-ways.md).

    Args:
        todo: what each output shard reads that is still to be written.
        owned: for each source shard the output shard that proves it.
        sizes: bytes of the source's shards.
        sha256: the shards whose digest is known: these come whole whichever way.
        once: whether each byte is read once.
    """
    shards = sum(sizes[file] for file in {file for use in todo for file, _, _ in use.ranges})
    if not once:
        return Choice("shards", shards)
    ranges = foreign_bytes(todo, owned)
    for use in todo:
        mine = [each for each in use.ranges if owned[each[0]] == use.output]
        hashed = {file for file, _, _ in mine if file in sha256}
        ranges += sum(
            min(PIECE_BYTES, sizes[step.file] - step.number * PIECE_BYTES) for step in steps(mine, sizes, hashed)
        )
    return Choice("ranges", ranges) if ranges <= shards * (1 + WASTE) else Choice("shards", shards)


def memory(workers: int) -> int:
    """Return the bytes of pieces that are in memory at a time, at most.

    A worker may hold three that it could not wait for: weights on both sides of a piece's end, and their scales.
    """
    return AHEAD_BYTES + 3 * workers * PIECE_BYTES
