"""The place that an output goes to, whatever it is: a folder, or a prefix of an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.writing import destination
from k2quant.checkpoint.writing.target import Room, Target


@contextlib.contextmanager
def locked(
    spot: Path | Address, *, report: str, incomplete: str, restart: bool = False, soft: bool = False, share: str = ""
) -> Iterator[Target]:
    """Hold the lock of a place that a conversion writes to.

    Args:
        spot: the place; a folder is made if need be.
        report: name of the report's file, which marks a finished output as ours.
        incomplete: name of the file that marks an unfinished one.
        restart: whether what an earlier run left may be thrown away, damaged or not.
        soft: whether a file may be the lock where a folder's file system has no others.
        share: where several processes write shares, the name of this one's, such as `2-of-8`. The locks are then taken
            at the first `alone`.

    Raises:
        DestinationInUse: another process holds it.
        DestinationForeign: it holds something that is not ours.
        OutputError: it cannot be locked or written to.
    """
    if isinstance(spot, Address):
        from k2quant.checkpoint.writing import bucket

        with bucket.locked(spot, report=report, incomplete=incomplete, restart=restart, share=share) as target:
            yield target
        return
    with destination.locked(
        spot, report=report, incomplete=incomplete, restart=restart, soft=soft, share=share
    ) as folder:
        yield folder


def target_at(spot: Path | Address, *, report: str, incomplete: str, attempt: str = "") -> Target:
    """Return a place that this process has not locked: to look, or to write shards while another holds it.

    Args:
        spot: the place; a folder is there.
        report: as in `locked`.
        incomplete: the same.
        attempt: as in `Destination`.
    """
    if isinstance(spot, Address):
        from k2quant.checkpoint.writing.bucket import Bucket
        from k2quant.checkpoint.writing.stores import objects_of

        return Bucket(objects_of(spot), report=report, incomplete=incomplete, attempt=attempt)
    return destination.Destination(spot, report=report, incomplete=incomplete, attempt=attempt)


def room_at(spot: Path | Address, shards: Mapping[str, int], more: int) -> Room:
    """Return what a disk of this machine must have free for an output, and what it has; see `Target.room`."""
    if isinstance(spot, Address):
        from k2quant.checkpoint.writing.bucket import room_of

        return room_of(spot, shards)
    return destination.room_of(spot, shards, more)
