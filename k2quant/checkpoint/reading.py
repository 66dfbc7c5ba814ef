"""Read pieces of shards into buffers.

Plain reads, not memory maps: a source that is cut short or changed while it is read ends in an error with a name, where
a map would end the process with SIGBUS; and no page of the source counts as memory of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import CheckpointError, ShapeMismatch
from k2quant.ground import pool
from k2quant.ground.units import moment

_ABREAST = 32  # requests for constants at a time: each is over in a moment, and most of that is waiting
_NEAR = 2**16  # bytes from the first of some constants to the last that comes with it

_Constant = tuple[TensorEntry, StoredWeight, str]
"""A tensor that is not streamed, the weight that it is a part of, and its suffix."""


def read_into(shard: ShardHeader, start: int, buffer: memoryview) -> None:
    """Fill a buffer with a shard's bytes from `start` on.

    Raises:
        CheckpointError: the shard cannot be read, or is not the file any more whose header was read.
    """
    if shard.supply is not None:
        shard.supply.read_into(shard.path.name, start, buffer)
        return
    try:
        descriptor = open_regular(shard.path)
        try:
            _check_unchanged(shard, os.fstat(descriptor))
            while buffer:
                count = os.preadv(descriptor, [buffer], start)
                if count == 0:
                    raise CheckpointError(
                        "ends too early", file=shard.path, remedy="was it cut short while it was read?"
                    )
                buffer, start = buffer[count:], start + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError("cannot be read", file=shard.path, found=error.strerror or str(error)) from error


def _check_unchanged(shard: ShardHeader, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise CheckpointError(
            "changed while it was read",
            file=shard.path,
            expected=f"{shard.size:,} bytes",
            found=f"{status.st_size:,} bytes, changed at {moment(status.st_mtime)}",
        )


def read_tensor(source: Checkpoint, entry: TensorEntry) -> bytes:
    """Return a whole tensor's bytes. For small ones."""
    buffer = bytearray(entry.nbytes)
    read_into(source.shards[entry.file], entry.start, memoryview(buffer))
    return bytes(buffer)


def check_constants(source: Checkpoint, weights: Iterable[StoredWeight]) -> None:
    """Compare what tensors that are not streamed say, such as `weight_shape`, with the weights that they belong to.

    An INT4 K2 has 69,120 of them, megabytes apart. From a source that is no local folder they come many at a time, and
    nothing else with them.

    Raises:
        ShapeMismatch: they contradict each other.
    """
    found = [
        (weight.parts[suffix], weight, suffix)
        for weight in weights
        if weight.format is not None
        for suffix in weight.format.constant(weight.shape)
    ]

    def check(near: list[_Constant]) -> None:
        first, last = near[0][0], near[-1][0]
        shard, data = source.shards[first.file], memoryview(bytearray(last.start + last.nbytes - first.start))
        if shard.supply is None:
            read_into(shard, first.start, data)
        else:
            shard.supply.read_just(shard.path.name, first.start, data)
        for entry, weight, suffix in near:
            start = entry.start - first.start
            _check_constant(weight, suffix, entry, bytes(data[start : start + entry.nbytes]))

    found.sort(key=lambda each: (each[0].file, each[0].start))
    pool.run(_neighbours(found), check, workers=1 if source.supply is None else _ABREAST)


def _neighbours(constants: Iterable[_Constant]) -> Iterator[list[_Constant]]:
    """Yield those together that lie side by side."""
    near: list[_Constant] = []
    for each in constants:
        if near and (each[0].file != near[0][0].file or each[0].start - near[0][0].start > _NEAR):
            yield near
            near = []
        near.append(each)
    if near:
        yield near


def _check_constant(weight: StoredWeight, suffix: str, entry: TensorEntry, content: bytes) -> None:
    found = None if weight.format is None else weight.format.misread(suffix, content, weight.shape)
    if found is not None:
        raise ShapeMismatch(
            f"the value of {suffix}", tensor=entry.name, file=entry.file, expected=weight.shape, found=found
        )
