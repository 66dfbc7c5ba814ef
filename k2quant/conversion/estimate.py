"""What a conversion will cost, from a few tenths of a second of measuring on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.panels import panel_state
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.remote.address import Address
from k2quant.conversion.placing import Job, ShardPlan
from k2quant.conversion.plan import Plan
from k2quant.conversion.resume import room
from k2quant.conversion.searching.searched import Searched
from k2quant.errors import OutputError
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROBE_ROWS, _PROBE_WIDTH = 512, 2048
_PROBE_BYTES = 2**26
_PROBE_SECONDS = 0.1
_COPY_RATE = 1e9  # bytes a second and core for a copy with its checksum: writing to memory took most of 1.5e9, measured


class Estimate(NamedTuple):
    """The cost of a conversion."""

    bytes_read: int
    bytes_written: int
    peak_memory: int
    """Bytes."""
    disk_needed: int
    """Bytes that must be free on a disk here: less than is written where a run resumes, replaces, or uploads."""
    disk_free: int
    """Bytes free where the destination will lie, or what is uploaded waits."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the output."""
        return self.disk_needed <= self.disk_free


def estimate(
    plan: Plan,
    destination: Path | Address,
    *,
    done: Mapping[str, object],
    workers: int,
    rounder: Searched | None = None,
    bandwidth: float | None = None,
) -> Estimate:
    """Estimate a conversion. Nothing is left behind at the destination.

    Args:
        plan: what will be written.
        destination: where; it need not be there yet.
        done: the shards that stand there already, by file name.
        workers: threads.
        rounder: who searches scales, if anybody does.
        bandwidth: bytes a second at which a source at an address comes; None: as its headers came.

    Raises:
        OutputError: nothing can be written there.
    """
    found = room(plan, destination, done)
    where = found.where
    todo = [shard for shard in plan.shards if shard.file not in done]
    read, written = sum(shard.bytes_read for shard in todo), sum(shard.size for shard in todo)
    try:
        disk = read / (bandwidth or read_rate(plan.source)) + written / _write_rate(where)
    except OSError as error:
        raise OutputError("cannot be written", file=where, found=error.strerror) from error
    return Estimate(
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        peak_memory=plan.peak_memory(workers) + (0 if rounder is None else rounder.memory(workers)),
        disk_needed=max(0, found.needed) if todo else 0,
        disk_free=found.free,
        seconds=max(_compute_seconds(todo, rounder) / workers + _judging_seconds(todo, rounder), disk),
    )


def _compute_seconds(shards: list[ShardPlan], rounder: Searched | None) -> float:
    """Return the seconds that one core needs for the codecs and copies."""
    pairs: dict[tuple[Format, Format], int] = {}
    searched: dict[Format, float] = {}
    copied = 0
    for job in _jobs(shards):
        if job.target is not None and job.weight.format is not None:
            pair = (job.weight.format, job.target)
            pairs[pair] = pairs.get(pair, 0) + prod(job.weight.shape)
            if rounder is not None and rounder.takes(job):
                searched[job.target] = searched.get(job.target, 0) + prod(job.weight.shape) * rounder.effort(job)
        else:
            copied += job.weight.nbytes
    coded = sum(count / codec_rate(*pair) for pair, count in pairs.items())
    known = {} if rounder is None else {"weighted": rounder.weighted, "judged": rounder.judged}
    more = sum(count / search_rate(target, **known) for target, count in searched.items())
    return copied / _COPY_RATE + coded + more


def _judging_seconds(shards: list[ShardPlan], rounder: Searched | None) -> float:
    """Return the seconds that products with Hessians take, on all cores: two ways of rounding, half of each product."""
    if rounder is None or not rounder.by_outputs:
        return 0.0
    import numpy as np

    work = sum(2 * prod(job.weight.shape) * job.weight.shape[-1] for job in _jobs(shards) if rounder.takes(job))
    square = np.ones((_PROBE_ROWS, _PROBE_ROWS))
    return work * seconds_of(lambda: square @ square) / (2 * _PROBE_ROWS**3)


def _jobs(shards: list[ShardPlan]) -> Iterator[Job]:
    return (job for shard in shards for job in shard.jobs)


def search_rate(target: Format, *, weighted: bool = False, judged: bool = False) -> float:
    """Return the weights a second for which one core searches scales and compares them with plain ones.

    Args:
        target: a format that `searches`.
        weighted: whether the search knows what columns count for.
        judged: whether all rows are compared, by what they count for; else that takes too little to be measured.
    """
    import numpy as np

    from k2quant.kernels.codecs.choice import codecs
    from k2quant.kernels.codecs.values import float_to_bf16

    random, cpu = np.random.default_rng(0), codecs("cpu")
    values = float_to_bf16(random.standard_normal((_PROBE_ROWS, _PROBE_WIDTH), np.float32) * np.float32(0.02))
    mean = random.standard_normal(_PROBE_WIDTH, np.float32)
    importance = mean * mean + 1
    if target.surveyed:
        target = target.settled([target.survey(values, cpu)])

    def search() -> None:
        scales = target.search(values, importance, cpu, mean) if weighted else target.search(values, None, cpu)
        if judged:
            for each in (scales, target.choose(values, cpu)):
                target.weighted_error(values, each, importance, cpu, mean)

    return values.size / seconds_of(search)


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes; the first time, which compiles or loads a codec, does not count."""
    work()
    rounds, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < _PROBE_SECONDS or not rounds:
        work()
        rounds += 1
    return seconds / rounds


def codec_rate(source: Format, target: Format) -> float:
    """Return the weights a second that one core converts, on a panel of small random codes; what a survey takes too."""
    import numpy as np

    from k2quant.formats.transcode import Scratch, transcode
    from k2quant.kernels.codecs.choice import codecs

    shape, random, scratch = (_PROBE_ROWS, _PROBE_WIDTH), np.random.default_rng(0), Scratch()
    inputs = panel_state(source, shape, 0, _PROBE_ROWS)
    parts = {suffix: _probe_array(spec, random) for suffix, spec in inputs.items()}
    outputs = {
        suffix: scratch.take(suffix, spec) for suffix, spec in panel_state(target, shape, 0, _PROBE_ROWS).items()
    }
    cpu = codecs("cpu")

    def work() -> None:
        found = target
        if target.surveyed and not source.relabels(target):
            found = target.settled([target.survey_of(source, parts, cpu, scratch)])
        transcode(source, found, parts, outputs, codecs=cpu, scratch=scratch)

    return prod(shape) / seconds_of(work)


def _probe_array(spec: TensorSpec, random: np.random.Generator) -> NDArray[Any]:
    """Return positive normal values of a dtype, or random codes that are no NaN in any format."""
    import numpy as np

    from k2quant.formats.dtypes import as_array

    values = np.abs(random.standard_normal(spec.shape, np.float32))
    match spec.dtype:
        case "U8":  # codes, or exponents near one another
            return random.integers(0x70, 0x7F, spec.shape, np.uint8)
        case "F32":
            return values
        case "F16":
            return values.astype(np.float16)
        case "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
    return as_array(random.integers(0, 0x7F, spec.nbytes, np.uint8), spec)


def read_rate(source: Checkpoint) -> float:
    """Return the bytes a second at which the beginning of a checkpoint can be read; over a network, the headers'."""
    if source.rate is not None:
        return source.rate
    shard = next(iter(source.shards.values()))
    buffer = memoryview(bytearray(min(_PROBE_BYTES, shard.size)))
    begun = time.perf_counter()
    read_into(shard, 0, buffer)
    return len(buffer) / max(time.perf_counter() - begun, 1e-6)


def _write_rate(folder: Path) -> float:
    """Return the bytes a second at which a file can be written and flushed there."""
    size = min(_PROBE_BYTES, shutil.disk_usage(folder).free // 2)
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
        return max(size, 1) / max(time.perf_counter() - begun, 1e-6)
