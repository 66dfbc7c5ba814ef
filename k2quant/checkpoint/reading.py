"""Read pieces of shards into buffers.

Plain reads, not memory maps: a source that is cut short or changed while it is read ends in an error with a name, where
a map would end the process with SIGBUS; and no page of the source counts as memory of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import CheckpointError, ShapeMismatch
from k2quant.ground.units import moment


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

    Raises:
        ShapeMismatch: they contradict each other.
    """
    for stored, weight in ((weight.format, weight) for weight in weights):
        if stored is None:
            continue
        for suffix in stored.constant(weight.shape):
            entry = weight.parts[suffix]
            found = stored.misread(suffix, read_tensor(source, entry), weight.shape)
            if found is not None:
                raise ShapeMismatch(
                    f"the value of {suffix}", tensor=entry.name, file=entry.file, expected=weight.shape, found=found
                )
