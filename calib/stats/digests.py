"""The bytes that were calibrated, so that scales are never chosen by what another model's inputs were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from k2quant.checkpoint.files import checksum
from k2quant.checkpoint.panels import PIECE_BYTES
from k2quant.checkpoint.reading import read_into
from k2quant.ground import names, pool

if TYPE_CHECKING:
    from k2quant.checkpoint.header import TensorEntry
    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight

Digests = dict[str, dict[str, str]]
"""By base in the language model, then by suffix: the crc32 of the stored bytes, as eight hexadecimal digits."""


def shown(crc: int) -> str:
    """Return a crc32 as digests hold it."""
    return f"{crc:08x}"


def digest_of(checkpoint: Checkpoint, weight: StoredWeight) -> dict[str, str]:
    """Read a weight's bytes, in pieces, and return the crc32 of each of its tensors, by suffix.

    Args:
        checkpoint: that holds it.
        weight: in whatever format, or a tensor that is no weight.

    Raises:
        CheckpointError: a shard cannot be read, or has changed since its header was read.
    """
    return {suffix: shown(_crc(checkpoint, entry)) for suffix, entry in weight.parts.items()}


def base_of(weight: StoredWeight) -> str | None:
    """Return a weight's name in the language model without its suffix; None for what is not of that model."""
    name = names.in_language_model(weight.main.name)
    return None if name is None else names.split(name)[0]


def digests_of(checkpoint: Checkpoint, weights: Iterable[StoredWeight], *, workers: int = 1) -> Digests:
    """Return the digests of some weights; those of the vision tower are left out.

    A base may have several: a router's weight and its bias are two tensors of one.

    Args:
        checkpoint: that holds them.
        weights: in whatever format.
        workers: how many are read at a time.

    Raises:
        CheckpointError: as for `digest_of`.
    """
    found: Digests = {}

    def work(weight: StoredWeight) -> None:
        if (base := base_of(weight)) is not None:
            found.setdefault(base, {}).update(digest_of(checkpoint, weight))

    pool.run(iter(weights), work, workers=workers)
    return found


def _crc(checkpoint: Checkpoint, entry: TensorEntry) -> int:
    buffer = memoryview(bytearray(min(PIECE_BYTES, entry.nbytes)))
    crc = 0
    for start in range(entry.start, entry.stop, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, entry.stop - start)]
        read_into(checkpoint.shards[entry.file], start, piece)
        crc = checksum.crc32(piece, crc)
    return crc
