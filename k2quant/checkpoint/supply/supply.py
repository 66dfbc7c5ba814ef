"""The bytes of a source that is no local folder, for whoever reads it.

Alone, a supply reads by range. While a conversion runs it knows what will be read, and has it there in time: by range,
straight into memory, where each byte is read once; as whole shards on the disk, where some are read again.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.supply.ahead import Ahead
from k2quant.checkpoint.supply.blocks import BLOCK_BYTES, Blocks
from k2quant.checkpoint.supply.choosing import Way, way_of
from k2quant.checkpoint.supply.order import PIECE_BYTES, Ranges, Use, owners, steps
from k2quant.checkpoint.supply.proofs import claims
from k2quant.checkpoint.supply.stage import MOST_LOW, Stage, needs

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.place import Place

_CACHED = 64
"""Blocks of small reads that are kept, 16 MB: constants and scales of one layer lie side by side."""


class Supply:
    """Gives bytes of a place's shards, to any thread."""

    def __init__(self, place: Place) -> None:
        """Take the place; nothing is read yet."""
        self.place = place
        self.way: Way | None = None
        """How the source comes, once a run has begun that knows what it will read."""
        self._sizes = {name: file.size for name, file in place.files.items()}
        self._sha256 = {name: file.sha256 for name, file in place.files.items() if file.sha256 is not None}
        self._blocks = Blocks(self._sizes, place.address.child)
        self._lock = threading.Lock()
        self._traffic = 0
        self._cached: dict[tuple[str, int], bytearray] = {}
        self._ahead: Ahead | None = None
        self._stage: Stage | None = None
        self._uses: dict[str, Use] = {}
        self._owned: dict[str, str] = {}
        self._others: dict[str, list[tuple[int, int]]] = {}
        """By source shard, what output shards read of it that do not prove it: first byte, one past the last."""
        self._proven: set[str] = set()

    @property
    def traffic(self) -> int:
        """Bytes that came over the network."""
        return self._traffic

    def expect(self, file: str, head: bytes) -> None:
        """Hear what a shard began with, its length and its header, when that was read."""
        self._blocks.expect(file, head)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a shard's bytes from `start` on.

        Raises:
            CheckpointError: the shard cannot be read, or is not the file any more whose header was read.
        """
        if self._stage is not None and self._stage.give(file, start, buffer):
            return
        ahead = None if self._is_others(file, start) else self._ahead
        while buffer:
            count = len(buffer) if ahead is None else min(len(buffer), PIECE_BYTES - start % PIECE_BYTES)
            if ahead is None or not ahead.give(file, start, buffer[:count]):
                self._read_alone(file, start, buffer[:count])
            buffer, start = buffer[count:], start + count

    def read_just(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a shard's bytes from `start` on, without what lies beside them, whoever else reads.

        Raises:
            CheckpointError: the shard cannot be read, or is not the file any more whose header was read.
        """
        self.place.read_into(file, start, buffer)
        self._add(len(buffer))

    def begin(
        self,
        uses: Sequence[Use],
        *,
        todo: Collection[str],
        records: Iterable[Mapping[str, Any]],
        stage: Path,
        low_disk: bool,
        once: bool,
        abreast: int,
        missing: Mapping[str, int],
    ) -> int:
        """Hear what will be read, before a stream of output shards is written; threads start to fetch.

        Args:
            uses: what every output shard of the plan reads, in the order in which they are written.
            todo: those of them that will be written.
            records: what the journal says of those that stand.
            stage: folder for whole shards of the source, where these are needed.
            low_disk: whether at most two of them may lie there at a time.
            once: whether each byte is read once, in this order.
            abreast: how many output shards may be written at a time.
            missing: bytes that each output shard which is still to be written takes on the disk of `stage`.

        Returns:
            how many output shards are to be written at a time.

        Raises:
            CheckpointError: the source gave other bytes to those that stand.
            UsageError: an output shard needs more shards of the source at once than `low_disk` allows.
        """
        self._others = {}
        self._uses = {use.output: use for use in uses}
        self._owned = owners(uses)
        for file, number, crc in claims(records):
            if file in self._sizes:
                self._blocks.claim(file, number, crc)
        written = [use for use in uses if use.output in todo]
        choice = way_of(written, self._owned, self._sizes, self._sha256, once=once)
        self.way = choice.way
        if choice.way == "shards":
            most = MOST_LOW if low_disk else None
            proves = {(file, output) for file, output in self._owned.items() if file in self._sha256}
            fetched = needs(written, self._sizes, most, proves)
            self._stage = Stage(self.place, stage, most=most, whole=self._note_whole, add=self._add)
            self._stage.begin(fetched, missing)
            return 1
        for use in written:
            for file, start, stop in self._foreign(use):
                insort(self._others.setdefault(file, []), (start, stop))
        self._ahead = Ahead(self._fetch, self._sizes, self._sha256, self.place.address.child)
        self._ahead.begin(((use.output, self._steps(use)) for use in written), abreast)
        return abreast

    def open(self, output: str) -> None:
        """Hear that an output shard is begun."""
        for each in (self._ahead, self._stage):
            if each is not None:
                each.open(output)

    def prove(self, output: str) -> dict[str, Any]:
        """Wait until every source shard that is read whole for an output shard is proven, where its digest is known.

        Called when all of the output shard was read, and before it gets its name.

        Returns:
            what the journal keeps of it.

        Raises:
            CheckpointError: a shard of the source is not what its place says that it is.
        """
        for each in (self._ahead, self._stage):
            if each is not None:
                each.prove(output)
        mine = [file for file, owner in self._owned.items() if owner == output and file in self._sha256]
        if self._ahead is not None:
            self._proven.update(mine)
        read = [each for each in self._foreign(self._uses[output]) if each[0] in self._sha256.keys() - self._proven]
        others = [each for use in self._uses.values() if use.output != output for each in use.ranges]
        proven = [each for each in others if each[0] in mine and each[0] in self._proven]
        found = {"read": self._crcs(read), "proven": self._crcs(proven)}
        return {"fetched": found} if any(found.values()) else {}

    def written(self, output: str) -> None:
        """Hear that an output shard stands: what only it needed may go."""
        if self._stage is not None:
            self._stage.written(output)

    def fail(self, error: BaseException) -> None:
        """Hear that an output shard cannot be finished: whoever waits for room that it will not make is told."""
        if self._stage is not None:
            self._stage.fail(error)

    def finish(self) -> None:
        """Hear that all output shards stand."""
        self.close()
        if self._stage is not None:
            self._stage.clear()
        self._ahead = self._stage = None

    def close(self) -> None:
        """End what works in the background; harmless twice."""
        for each in (self._ahead, self._stage):
            if each is not None:
                each.close()

    def facts(self, shards: Collection[str], *, here: bool) -> dict[str, Any]:
        """Return what a report says of how the source came; way and traffic where it came to this process.

        Args:
            shards: those of the source that came.
            here: whether there are others, which the hub's cache had.
        """
        address = self.place.address
        said = "compared, but for what the hub's cache had" if here else "compared"
        return {
            "address": str(address),
            **({} if address.revision is None else {"commit": address.revision}),
            **({} if self.way is None else {"traffic": self._traffic, "way": self.way}),
            "sha256": said if self._sha256.keys() >= set(shards) else "not known to the place",
        }

    def _is_others(self, file: str, start: int) -> bool:
        """Tell whether a range is of those that come alone: the pieces in memory are counted for others."""
        spans = self._others.get(file, [])
        place = bisect_right(spans, (start, self._sizes[file])) - 1
        return place >= 0 and start < spans[place][1]

    def _foreign(self, use: Use) -> Ranges:
        """Return what an output shard reads of source shards that another one proves."""
        return [each for each in use.ranges if self._owned[each[0]] != use.output]

    def _steps(self, use: Use) -> Iterable[Any]:
        mine = [each for each in use.ranges if self._owned[each[0]] == use.output]
        return steps(mine, self._sizes, {file for file, _, _ in mine if file in self._sha256})

    def _crcs(self, ranges: Ranges) -> dict[str, list[list[int]]]:
        found: dict[str, dict[int, int]] = {}
        for file, start, stop in ranges:
            found.setdefault(file, {}).update((number, crc) for number, crc in self._blocks.of(file, start, stop))
        return {file: [list(each) for each in sorted(of.items())] for file, of in sorted(found.items())}

    def _read_alone(self, file: str, start: int, buffer: memoryview) -> None:
        """Read a range that nobody fetched ahead; small ones by whole blocks, of which some are kept."""
        if self.way is None and len(buffer) > BLOCK_BYTES:
            self.read_just(file, start, buffer)
            return
        first, last = self._blocks.span(file, start, start + len(buffer))
        found = self._cached.get((file, first))
        if found is None or last - first > BLOCK_BYTES:
            found = bytearray(last - first)
            self._fetch(file, first, memoryview(found))
            if last - first <= BLOCK_BYTES:
                self._keep(file, first, found)
        buffer[:] = memoryview(found)[start - first : start - first + len(buffer)]

    def _keep(self, file: str, start: int, data: bytearray) -> None:
        with self._lock:
            while len(self._cached) >= _CACHED:
                del self._cached[next(iter(self._cached))]
            self._cached[file, start] = data

    def _fetch(self, file: str, start: int, buffer: memoryview) -> None:
        """Get whole blocks over the network and note what came."""
        self.place.read_into(file, start, buffer)
        self._add(len(buffer))
        self._blocks.note(file, start, buffer)

    def _add(self, count: int) -> None:
        with self._lock:
            self._traffic += count

    def _note_whole(self, file: str, path: Path) -> None:
        """Compare a whole shard, whose sha256 was right where it is known, with what came of it before."""
        self._blocks.note_file(file, path)
        if file in self._sha256:
            self._proven.add(file)
