"""What is simulated: the whole of Kimi K2-Instruct, FP8 to INT4, on machines, lines and disks of these rates."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from suites.common import machine
from suites.conversion.machines.simulation import Leg, Outcome, Station, Work, bound, simulate
from suites.conversion.projection import BYTES

MACHINES = (1, 4, 16)
CORES = (16, 64)
LINES = (10, 25)
"""Gbit/s, in each direction."""
GOODPUT = 0.949
"""Of a line, what TCP leaves for data: 1,448 of 1,526 bytes of a frame of 1,500 on the wire, with its gaps."""
NVME_READ, NVME_WRITE = 6.5e9, 3.5e9
"""Samsung PM9A3, U.2, 7.68 TB: sequential, by Samsung's own figures of May 2020."""
FILER = 4.8e9
"""Bytes a second of reads and writes together: Amazon FSx for Lustre, PERSISTENT_2, 4.8 TiB at 1,000 MB/s a TiB."""
PAUSE = 1.0
"""Seconds between a machine's shards: an assumption, for flush or completed upload, record and the driver's answer."""
OUT = BYTES["int4"] / BYTES["fp8"]
"""Bytes written for each byte read."""
WAYS = {
    "bucket": "a hub or bucket to a bucket; the store gives each machine its full line; outputs pass its NVMe",
    "shared": "a file system of 4.8 GB/s that all see, for source and output",
    "nvme": "NVMe of the machines: one machine's own; of more, a file system over all of theirs",
}


class Case(NamedTuple):
    """A row and column of the table."""

    way: str
    line: int
    """Gbit/s."""
    cores: int
    machines: int


class Rates(NamedTuple):
    """What was measured: bytes of FP8 a second and core."""

    convert: float
    """Reading, codec, checksums and writing in memory."""
    digest: float
    """SHA-256 of what comes from a hub or bucket."""

    @property
    def remote(self) -> float:
        """Both."""
        return 1 / (1 / self.convert + 1 / self.digest)


def rates(overhead: dict[str, Any], digest: float) -> Rates:
    """Return rates by the results of `overhead`: what each of the pool's two threads did in a second."""
    seconds = median(run["work_s"] for run in overhead["runs"]["pool"])
    return Rates(overhead["bytes"]["read"] / (2 * seconds), digest)


def k2_shards() -> list[float]:
    """Return the bytes of each of K2's 61 shards."""
    sys.path.insert(0, str(machine.ROOT / "examples"))
    k2_layout = importlib.import_module("k2_layout")
    return [
        float(sum(k2_layout.WIDTH[dtype] * prod(shape) for _, dtype, shape in k2_layout.shard(layer)))
        for layer in range(k2_layout.LAYERS)
    ]


def cases() -> Iterator[Case]:
    """Yield all of the table, row by row."""
    for way in WAYS:
        for line in LINES:
            for cores in CORES:
                for machines in MACHINES:
                    yield Case(way, line, cores, machines)


def legs(case: Case, found: Rates) -> list[Leg]:
    """Return the way of a piece."""
    speed = case.line * 1e9 / 8 * GOODPUT
    line_in, line_out = Station("line in", speed), Station("line out", speed)
    disk, filer = Station("NVMe", NVME_READ), Station("file system", FILER)
    cores = Station("cores", found.remote if case.way == "bucket" else found.convert, case.cores)
    writes = OUT * NVME_READ / NVME_WRITE  # in bytes of reading, so that both take their time of one disk
    match case.way:
        case "bucket":
            spool = Leg(disk, shared=False, share=writes + OUT)
            return [Leg(line_in, shared=False), Leg(cores, shared=False), spool, Leg(line_out, shared=False, share=OUT)]
        case "shared":
            return [
                Leg(filer, shared=True),
                Leg(line_in, shared=False),
                Leg(cores, shared=False),
                Leg(line_out, shared=False, share=OUT),
                Leg(filer, shared=True, share=OUT),
            ]
    # Of a file system over M machines, one byte of M lies on the machine that reads it. What a machine sends is what it
    # writes and what others read from it, and as much comes in.
    away = (case.machines - 1) / case.machines
    lines = (
        [Leg(line_in, shared=False, share=away * (1 + OUT)), Leg(line_out, shared=False, share=away * (1 + OUT))]
        if away
        else []
    )
    return [Leg(disk, shared=False), *lines, Leg(cores, shared=False), Leg(disk, shared=False, share=writes)]


def work(case: Case, found: Rates, shards: list[float]) -> Work:
    """Return the work of a case."""
    window = 4 * case.cores
    return Work(shards, legs(case, found), case.machines, abreast=min(8, case.cores), window=window, pause=PAUSE)


def outcome(case: Case, found: Rates, shards: list[float]) -> tuple[Outcome, float]:
    """Return what a case comes to, and the bound that no conversion can be below."""
    task = work(case, found, shards)
    return simulate(task), max(bound(task).values())


def stored(path: Path) -> dict[str, Any]:
    """Return the results of `overhead` or `throttled`."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def through_a_line(throttled: dict[str, Any], found: Rates, rate: float) -> float:
    """Return what the simulation says of two nodes of one core whose source comes over one line, in `throttled`."""
    line, core = Leg(Station("line", rate), shared=True), Leg(Station("cores", found.remote), shared=False)
    return simulate(Work(throttled["shards"], [line, core], 2, abreast=1, piece=14.7e6, window=4)).seconds


def predicted(overhead: dict[str, Any], found: Rates) -> float:
    """Return what the simulation says of the measured cluster: two nodes of one core, the slice in memory."""
    core = Leg(Station("cores", found.convert), shared=False)
    return simulate(Work(overhead["shards"], [core], 2, abreast=1, piece=14.7e6, window=2)).seconds
