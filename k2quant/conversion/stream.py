"""The work of a conversion: output shards filled by a pool of threads.

Each task reads a panel of one weight, runs the codec and writes the result to its offset. When a shard's last
task is done, a thread of its own flushes and renames it and notes it in the journal, while the pool goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from k2quant.checkpoint.files.checksum import combine, crc32
from k2quant.checkpoint.panels import (
    PIECE_BYTES,
    format_of,
    naming,
    panel_offset,
    panel_rows,
    panel_shape,
    panel_state,
    read_panel,
)
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.supply.order import Use
from k2quant.checkpoint.writing.target import Room, Writer
from k2quant.conversion.placing import Job, Placed, ShardPlan, target_of
from k2quant.conversion.searching.surveys import Substitute, Surveys, surveyed
from k2quant.formats.dtypes import TensorSpec, row_bytes
from k2quant.formats.format import Format, Parts
from k2quant.ground import pool
from k2quant.ground.units import size

if TYPE_CHECKING:
    from pathlib import Path

    from k2quant.checkpoint.supply.supply import Supply
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes of weights read so far and in all."""

Record = dict[str, Any]
"""What the journal notes of a finished shard."""


class Filled(Protocol):
    """What a stream asks of the place that it fills, see `Target`."""

    @property
    def spot(self) -> Path | Address:
        """Where it is."""

    @property
    def abreast(self) -> int:
        """How many shards are written at a time, at most."""

    @property
    def stage(self) -> Path:
        """A folder of this machine for shards of a source that lie on the disk while they are read."""

    def writer(self, file: str, header: bytes, size: int) -> Writer:
        """Begin a shard."""

    def room(self, shards: Mapping[str, int], more: int) -> Room:
        """Return what a disk must have free for an output, and what it has; asked of what is no folder here."""

    def keep_digest(self, file: str, sha256: str) -> None:
        """Note the digest of a shard that has just been written."""

    def record(self, record: dict[str, Any]) -> None:
        """Note that a shard stands."""


class Rounder(Protocol):
    """Who rounds the source's own values better than their format's own rule does.

    `begin`, `batches` and `summary` are called by whoever runs the stream, all else from several threads at once. What
    it says depends on a weight alone, or on what `batches` has done.
    """

    def begin(self, abreast: int) -> None:
        """Hear before all else from how many shards weights come in turn."""

    def batches(self, shards: Sequence[ShardPlan]) -> Iterable[Sequence[ShardPlan]]:
        """Yield the shards that are to be written, in whatever order, some at a time: each when all is known for it.

        When the next ones are asked for, those before them stand on the disk and in the journal.
        """

    def takes(self, job: Job) -> bool:
        """Tell whether it rounds a weight."""

    def panel(self, job: Job, start: int, parts: Parts, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        """Fill a panel's arrays in the format of the job with what the source's mean; return what that did.

        Args:
            job: one that it `takes`; its format is settled.
            start: first row of the panel.
            parts: arrays of the source's format, by suffix.
            outputs: arrays of the job's, likewise.
            codecs: who does the arithmetic.
            scratch: this thread's buffers.

        Raises:
            ValueAt: a value that cannot be carried.
        """

    def again(self, job: Job, read: Mapping[str, str]) -> bool:
        """Tell, when all of a weight was read, whether its panels are asked for once more, and come out otherwise.

        Args:
            job: any, taken or not.
            read: crc32 of each tensor of the source as it was read, in hexadecimal, by suffix.

        Raises:
            CheckpointError: the weight is not the one that this is for.
        """

    def facts(self, job: Job) -> Mapping[str, Any]:
        """Return what a record says of a weight that it took."""

    def summary(self) -> Mapping[str, Any]:
        """Return what the report says beside that, once all shards stand; no key of it is one of the report's own."""


_SHARDS_IN_FLUSH = 2  # finished shards that may wait for the disk before the pool waits for them


class _Log:
    """What the tasks of one job have found, by the position of their piece."""

    def __init__(self, pending: int) -> None:
        self.pending = pending
        """Tasks that are not done yet."""
        self.figures: dict[int, Figures] = {}
        self.checksums: dict[str, dict[int, tuple[int, int]]] = {}
        self.read: dict[str, dict[int, tuple[int, int]]] = {}
        """Of the source's tensors, where somebody wants to know."""

    def add(self, position: int, checksums: dict[str, tuple[int, int]], figures: Figures | None = None) -> None:
        if figures is not None:
            self.figures[position] = figures
        _note(self.checksums, position, checksums)

    def add_read(self, position: int, checksums: dict[str, tuple[int, int]]) -> None:
        _note(self.read, position, checksums)

    def record(self, job: Job, *, substituted: bool, more: Mapping[str, Any]) -> Record:
        """Return what the report says of this job; `substituted`: its values were not the source's."""
        source = job.weight.format
        record: Record = {
            "from": source.name if source else None,
            "to": job.target.name if job.target else None,
            "shape": list(job.weight.shape),
            "crc32": {suffix: whole(self.checksums.get(suffix, {})) for suffix in job.outputs},
        }
        if substituted:
            record["substituted"] = True
        if self.figures:
            first, *rest = (figures for _, figures in sorted(self.figures.items()))
            record["figures"] = asdict(sum(rest, start=first))
        return {**record, **more}


def _note(into: dict[str, dict[int, tuple[int, int]]], position: int, checksums: Mapping[str, tuple[int, int]]) -> None:
    for suffix, checksum in checksums.items():
        into.setdefault(suffix, {})[position] = checksum


def whole(pieces: Mapping[int, tuple[int, int]]) -> str:
    """Return the crc32 of pieces by their position, in hexadecimal."""
    return f"{combine(crc for _, crc in sorted(pieces.items())):08x}"


@dataclass(slots=True)
class _Shard:
    """An output shard in the making."""

    plan: ShardPlan
    writer: Writer
    logs: list[_Log]
    pending: int = 0
    """Tasks that are not done yet."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Task(NamedTuple):
    shard: _Shard
    job: int
    suffix: str | None
    """The tensor whose bytes `start` to `stop` are copied; None to convert the weight's rows `start` to `stop`."""
    start: int
    stop: int


def _is_substituted(job: Job, substitute: Substitute | None) -> bool:
    return substitute is not None and substitute.replaces(job.weight)


def _tasks_of(shard: _Shard, substitute: Substitute | None) -> list[_Task]:
    tasks = []
    for number, job in enumerate(shard.plan.jobs):
        if job.target is not None or _is_substituted(job, substitute):
            together = 1 if job.target is None else job.target.row_step
            tasks += [_Task(shard, number, None, *span) for span in panel_rows(job.weight.shape, together)]
            continue
        for suffix, entry in job.weight.parts.items():
            size = entry.nbytes
            tasks += [
                _Task(shard, number, suffix, start, min(start + PIECE_BYTES, size))
                for start in range(0, size, PIECE_BYTES)
            ]
    return tasks


def checksums_of(stored: Format, parts: Parts, start: int) -> dict[str, tuple[int, int]]:
    """Return crc32 and length of a panel's arrays as they were read; of what every panel has whole, with the first."""
    return {
        suffix: (crc32(array.data.cast("B")), array.nbytes)
        for suffix, array in parts.items()
        if not (start and suffix in stored.whole)
    }


class Stream:
    """One pass over the shards of a plan that are not finished yet."""

    def __init__(
        self,
        plan: Placed,
        folder: Filled,
        *,
        done: set[str],
        only: Collection[str] | None = None,
        codecs: Codecs,
        sha256: bool,
        progress: Progress | None,
        substitute: Substitute | None = None,
        rounder: Rounder | None = None,
        low_disk: bool = False,
        records: Iterable[Record] = (),
    ) -> None:
        """Prepare a pass.

        Args:
            plan: what to write.
            folder: where to write it.
            done: file names of the shards that are finished already.
            only: file names of the shards that are this process's; None: all. Its progress is that of these alone.
            codecs: who does the arithmetic.
            sha256: whether to note a digest of each file.
            progress: called as the work goes on.
            substitute: whose values take the place of the source's, if any.
            rounder: who rounds better than the formats' own rules, if anybody.
            low_disk: whether at most two shards of a source that is no local folder may lie on the disk at a time.
            records: what the journal says of finished shards, where it says what was fetched for them.
        """
        self._supply, self._low_disk, self._done = plan.source.supply, low_disk, records
        self._plan, self._folder, self._sha256, self._progress = plan, folder, sha256, progress
        self._codecs, self._substitute, self._rounder = codecs, substitute, rounder
        self._surveys = Surveys(plan, codecs, substitute, lambda: self._scratch)
        own = [shard for shard in plan.shards if only is None or shard.file in only]
        self._todo = [shard for shard in own if shard.file not in done]
        self._total = sum(shard.bytes_read for shard in own)
        self._read = self._total - sum(shard.bytes_read for shard in self._todo)
        self._lock = threading.Lock()
        self._local = threading.local()
        self._records: dict[str, Record] = {}
        self._open: set[Writer] = set()
        self._ended = threading.Event()
        self._disk = ThreadPoolExecutor(
            1, thread_name_prefix="k2quant-disk", initializer=pool.stop_by, initargs=(self._ended,)
        )
        self._flushes: deque[Future[None]] = deque()

    def run(self, workers: int) -> dict[str, Record]:
        """Write the shards; return their records by file name."""
        abreast = min(workers, self._folder.abreast)
        try:
            if self._supply is not None:
                abreast = self._fetch(self._supply, abreast)
            if self._rounder is not None:
                self._rounder.begin(abreast)
            for shards in (self._todo,) if self._rounder is None else self._rounder.batches(self._todo):
                pool.run(self._tasks(shards, abreast), self._work, workers=workers, tick=self._tick, stop=self._end)
                self._wait_for_disk(backlog=0)
                self._tick()
            if self._supply is not None:
                self._supply.finish()
        finally:
            self._end()
            self._disk.shutdown(cancel_futures=True)
            for writer in self._open:
                writer.close()
        return self._records

    def _end(self) -> None:
        """End what works in the background, and what anybody waits for; harmless twice."""
        self._ended.set()
        if self._supply is not None:
            self._supply.close()

    def _fetch(self, supply: Supply, abreast: int) -> int:
        """Have bytes of a source that is no local folder come ahead; return how many shards to write at a time."""
        elsewhere = {name for name, header in self._plan.source.shards.items() if header.supply is not None}
        plain = self._substitute is None and self._rounder is None and not any(surveyed(self._plan))
        return supply.begin(
            [
                Use(shard.file, tuple(each for each in shard.ranges() if each[0] in elsewhere))
                for shard in self._plan.shards
            ],
            todo={shard.file for shard in self._todo},
            records=self._done,
            stage=self._folder.stage,
            low_disk=self._low_disk,
            once=plain,
            abreast=abreast,
            missing=self._missing(),
        )

    def _missing(self) -> dict[str, int]:
        """Return what the output takes on the disk here: its shards by name; or at all times those that wait to go."""
        sizes = {shard.file: shard.size for shard in self._todo}
        folder: Any = self._folder  # exports fill files here, and have no spot
        at_an_address = isinstance(getattr(folder, "spot", None), Address)
        return {"uploads": folder.room(sizes, 0).needed} if at_an_address else sizes

    def _tick(self) -> None:
        if self._progress:
            self._progress(self._read, self._total)

    def _wait_for_disk(self, *, backlog: int) -> None:
        """Wait until at most `backlog` flushes are open; their errors surface here."""
        while len(self._flushes) > backlog:
            self._flushes.popleft().result()

    def _tasks(self, shards: Iterable[ShardPlan], abreast: int) -> Iterator[_Task]:
        """Yield the tasks of `abreast` shards in turn, and of the next shard when one is through."""
        todo = iter(shards)
        streams = deque(self._begin(plan) for plan in islice(todo, abreast))
        while streams:
            stream = streams.popleft()
            task = next(stream, None)
            if task is not None:
                streams.append(stream)
                yield task
            elif (plan := next(todo, None)) is not None:
                streams.append(self._begin(plan))

    def _begin(self, plan: ShardPlan) -> Iterator[_Task]:
        """Open a shard and return its tasks."""
        self._wait_for_disk(backlog=_SHARDS_IN_FLUSH)
        if self._supply is not None:
            self._supply.open(plan.file)
        writer = self._folder.writer(plan.file, plan.header, plan.size)
        self._open.add(writer)
        shard = _Shard(plan, writer, [])
        tasks = _tasks_of(shard, self._substitute)
        counts = Counter(task.job for task in tasks)
        shard.logs += [_Log(counts[number]) for number in range(len(plan.jobs))]
        shard.pending = len(tasks)
        if not tasks:
            self._flushes.append(self._disk.submit(self._finish, shard))
        return iter(tasks)

    def _work(self, task: _Task) -> None:
        if task.suffix is not None:
            read = self._copy(task, task.suffix)
        elif self._substitute is not None and self._substitute.replaces(task.shard.plan.jobs[task.job].weight):
            read = self._replace(task, self._substitute)
        else:
            read = self._convert(task)
        if self._rounder is not None:
            self._settle(task, self._rounder)
        with self._lock:
            self._read += read
            task.shard.pending -= 1
            done = task.shard.pending == 0
        if done:
            self._flushes.append(self._disk.submit(self._finish, task.shard))

    def _settle(self, task: _Task, rounder: Rounder) -> None:
        """Once all of a weight was read, hear whether it is the right one, and write it anew where that is asked."""
        job, log = task.shard.plan.jobs[task.job], task.shard.logs[task.job]
        with task.shard.lock:
            log.pending -= 1
            if log.pending:
                return
        read = log.read if job.target is not None else log.checksums
        if rounder.again(job, {suffix: whole(pieces) for suffix, pieces in read.items()}):
            for start, stop in panel_rows(job.weight.shape):
                self._convert(task._replace(start=start, stop=stop))

    @property
    def _scratch(self) -> Scratch:
        from k2quant.formats.transcode import Scratch

        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch

    def _copy(self, task: _Task, suffix: str) -> int:
        """Copy a piece of a tensor; return the bytes read."""
        job = task.shard.plan.jobs[task.job]
        entry = job.weight.parts[suffix]
        data = self._scratch.take("copy", TensorSpec("U8", (task.stop - task.start,))).data
        read_into(self._plan.source.shards[entry.file], entry.start + task.start, data)
        checksum = self._write(task.shard, job.outputs[suffix].start + task.start, data)
        with task.shard.lock:
            task.shard.logs[task.job].add(task.start, {suffix: checksum})
        return len(data)

    def _convert(self, task: _Task) -> int:
        """Convert a panel of a weight; return the bytes read."""
        from k2quant.formats.transcode import transcode

        job = self._surveys.settled(task.shard.plan.jobs[task.job])
        weight, source, target, scratch = job.weight, format_of(job.weight), target_of(job), self._scratch
        parts = read_panel(self._plan.source, weight, task.start, task.stop, scratch)
        state = panel_state(target, weight.shape, task.start, task.stop)
        outputs = {suffix: scratch.take(f"out {suffix}", spec) for suffix, spec in state.items()}
        figures: Figures | None
        with naming(weight, task.start):
            if self._rounder is not None and self._rounder.takes(job):
                figures = self._rounder.panel(job, task.start, parts, outputs, self._codecs, scratch)
            else:
                figures = transcode(source, target, parts, outputs, codecs=self._codecs, scratch=scratch)
        checksums = self._write_panel(task, target, outputs)
        read = {} if self._rounder is None else checksums_of(source, parts, task.start)
        with task.shard.lock:
            task.shard.logs[task.job].add(task.start, checksums, figures)
            task.shard.logs[task.job].add_read(task.start, read)
        return sum(array.nbytes for array in parts.values())

    def _replace(self, task: _Task, substitute: Substitute) -> int:
        """Write a panel of values that are not the source's; return the bytes of the source that it stands for."""
        job = self._surveys.settled(task.shard.plan.jobs[task.job])
        outputs, figures = substitute.panel(job, task.start, task.stop)
        checksums = self._write_panel(task, job.written, outputs)
        with task.shard.lock:
            task.shard.logs[task.job].add(task.start, checksums, figures)
        rows, _ = panel_shape(job.weight.shape)
        return job.weight.nbytes * (task.stop - task.start) // max(rows, 1)

    def _write_panel(self, task: _Task, written: Format | None, outputs: Parts) -> dict[str, tuple[int, int]]:
        """Write rows of a weight in a format, and with the first of them what is not streamed."""
        job = task.shard.plan.jobs[task.job]
        checksums = {}
        for suffix, array in outputs.items():
            if written is not None and suffix in written.whole and task.start:
                continue
            if written is not None:
                offset = panel_offset(written, job.weight.shape, suffix, task.start)
            else:  # no weight: a column
                offset = task.start * row_bytes(TensorSpec(job.outputs[suffix].dtype, (1,)))
            data = array.data.cast("B")
            checksums[suffix] = self._write(task.shard, job.outputs[suffix].start + offset, data)
        if task.start == 0 and written is not None:
            for suffix, content in written.constant(job.weight.shape).items():
                checksums[suffix] = self._write(task.shard, job.outputs[suffix].start, memoryview(content))
        return checksums

    def _write(self, shard: _Shard, offset: int, data: memoryview) -> tuple[int, int]:
        """Write bytes; return their crc32 and their length."""
        if shard.writer.write(offset, data):
            self._flushes.append(self._disk.submit(shard.writer.flush))
        return crc32(data), len(data)

    def _more(self, job: Job) -> Mapping[str, Any]:
        return self._rounder.facts(job) if self._rounder is not None and self._rounder.takes(job) else {}

    def _finish(self, shard: _Shard) -> None:
        """Give a finished shard its name and note it in the journal. Runs in the disk's thread."""
        try:
            self._name(shard)
        except BaseException as error:
            if self._supply is not None:
                self._supply.fail(error)  # the pool may wait for room that only this shard would have made
            raise

    def _name(self, shard: _Shard) -> None:
        record: Record = {
            "shard": shard.plan.file,
            "size": shard.plan.size,
            "tensors": {
                job.output_main.name: log.record(
                    job, substituted=_is_substituted(job, self._substitute), more=self._more(job)
                )
                for job, log in zip(shard.plan.jobs, shard.logs, strict=True)
            },
        }
        if self._supply is not None:
            record |= self._supply.prove(shard.plan.file)
        if self._sha256:
            record["sha256"] = shard.writer.sha256()
        shard.writer.finish()
        if self._sha256:
            self._folder.keep_digest(shard.plan.file, record["sha256"])
        self._folder.record(record)
        if self._supply is not None:
            self._supply.written(shard.plan.file)
        _log.info("%s: %s, on the disk", shard.plan.file, size(shard.plan.size))
        with self._lock:
            self._open.discard(shard.writer)
            self._records[shard.plan.file] = record
