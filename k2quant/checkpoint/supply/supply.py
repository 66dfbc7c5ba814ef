"""The bytes of a source that is no local folder, for whoever reads it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.place import Place


class Use(NamedTuple):
    """What an output shard reads of the source."""

    output: str
    """Name of the output shard."""
    ranges: tuple[tuple[str, int, int], ...]
    """Source shard, first byte, one past the last, in the order in which they are read."""


class Supply:
    """Gives bytes of a place's shards, to any thread."""

    def __init__(self, place: Place) -> None:
        """Take the place; nothing is read yet."""
        self.place = place
        self._lock = threading.Lock()
        self._traffic = 0

    @property
    def traffic(self) -> int:
        """Bytes that came over the network."""
        return self._traffic

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a shard's bytes from `start` on.

        Raises:
            CheckpointError: the shard cannot be read, or is not the file any more whose header was read.
        """
        self.place.read_into(file, start, buffer)
        with self._lock:
            self._traffic += len(buffer)

    def begin(self, uses: Sequence[Use], *, stage: Path | None, low_disk: bool, once: bool) -> None:
        """Hear what will be read, before a stream of output shards is written.

        Args:
            uses: what each of the output shards reads, in the order in which they are written.
            stage: folder for whole shards of the source; None: nothing of it may lie on the disk.
            low_disk: whether at most two shards of the source may lie there at a time.
            once: whether each byte is read once, in this order.
        """

    def prove(self, output: str) -> Mapping[str, Any]:  # noqa: ARG002
        """Wait until all that an output shard read is proven, as far as it can be; return what the journal keeps of it.

        Raises:
            CheckpointError: a shard of the source is not what the place says that it is.
        """
        return {}

    def written(self, output: str) -> None:
        """Hear that an output shard stands: what only it needed may go."""

    def finish(self) -> None:
        """Hear that all output shards stand."""

    def close(self) -> None:
        """End what works in the background; harmless twice."""
