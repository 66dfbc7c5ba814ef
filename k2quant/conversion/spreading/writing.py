"""Write some shards of a plan in a process that is one of many."""

from __future__ import annotations

from collections.abc import Sequence

from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.remote.address import spot
from k2quant.checkpoint.writing.opening import target_at
from k2quant.conversion.spreading.order import Order, made
from k2quant.conversion.stream import Progress, Record, Stream
from k2quant.errors import UsageError
from k2quant.ground.pool import checked_workers


class Hand:
    """A process that writes shards of an order: it makes the plan once, and writes whatever it is given."""

    def __init__(self, asked: Order, *, workers: int | None = None) -> None:
        """Make the plan.

        Args:
            asked: what is made.
            workers: threads; None takes one for each core that this process may use.

        Raises:
            UsageError: this process is of another release, or there is no such device here.
            CheckpointError: it sees another source than the process that ordered.
        """
        from k2quant.kernels.codecs.choice import codecs

        self._asked, self._threads = asked, checked_workers(workers)
        self.plan, self._rounder = made(asked)
        self._codecs = codecs(asked.device)
        self._begun: set[str] = set()

    def write(self, files: Sequence[str], *, attempt: str, progress: Progress | None = None) -> list[Record]:
        """Write shards, each whole or not there; return what a journal notes of each, in the order of the plan.

        Each is noted at the destination too, beside its journal. Whoever holds the destination's lock completes it.

        Args:
            files: names of output shards.
            attempt: letters that no other process has that may write one of them at the same time.
            progress: called with the bytes read of these shards, and all of theirs.

        Raises:
            UsageError: no such shard is planned.
            CheckpointError: a value of the source that no weight can have, or a source that has changed.
            OutputError: the disk failed, or the destination is not what was ordered any more.
        """
        asked = frozenset(files)
        if strange := asked - {shard.file for shard in self.plan.shards}:
            raise UsageError(f"{min(strange)} is no shard of this plan")
        if self._rounder is not None and asked & self._begun:
            _, self._rounder = made(self._asked)  # which knows what it found of each weight, and does not look again
            self._begun.clear()
        self._begun |= asked
        stream = Stream(
            self.plan,
            target_at(spot(self._asked.destination), report=REPORT, incomplete=INCOMPLETE, attempt=attempt),
            done=set(),
            only=asked,
            codecs=self._codecs,
            sha256=self._asked.sha256,
            progress=progress,
            rounder=self._rounder,
            low_disk=self._asked.low_disk,
        )
        records = stream.run(self._threads)
        return [records[shard.file] for shard in self.plan.shards if shard.file in asked]


def write_shards(
    asked: Order, files: Sequence[str], *, workers: int | None = None, attempt: str, progress: Progress | None = None
) -> list[Record]:
    """Make the plan and write some of its shards; see `Hand`."""
    return Hand(asked, workers=workers).write(files, attempt=attempt, progress=progress)
