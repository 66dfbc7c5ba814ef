"""How long the whole Kimi K2-Instruct would take: on paper, from measured rates."""

from __future__ import annotations

from typing import Any, NamedTuple

from suites.common.measure import median
from suites.conversion.bars import PEERS, codec_rate, work

WEIGHTS = 1_026_470_731_056
BYTES = {"fp8": 1029.2e9, "bf16": 2052.9e9, "int4": 594.2e9}
"""Of the whole checkpoint; BF16 is two bytes for each weight."""
CORES = (2, 16, 64)


class Disk(NamedTuple):
    """A disk's rates, in GB/s."""

    name: str
    read: float
    write: float


def disks(results: dict[str, Any], assumed: list[float]) -> list[Disk]:
    """Return the assumed disks, and the one that was measured."""
    found = [Disk(f"{rate:g} GB/s", rate, rate) for rate in assumed]
    if rows := results.get("cat"):
        write = median([row["output_bytes"] / seconds for row in rows for seconds in row["write_s"]])
        found.append(Disk("this disk", results["cold_read_gbps"], write / 1e9))
    return found


def project(results: dict[str, Any], assumed: list[float]) -> list[dict[str, Any]]:
    """Return a row for each task, number of cores and disk.

    The codec's share grows with the cores in proportion; reads and writes share the disk; both go on at once, so the
    slower one sets the time.
    """
    rows = []
    for task in PEERS:
        rate = codec_rate(results, task)
        if rate is None:
            continue
        rate_per_core = rate / results["codecs"]["setup"]["threads"]
        source, target = task.split("-")
        for disk in disks(results, assumed):
            files = (BYTES[source] / disk.read + BYTES[target] / disk.write) / 1e9
            for cores in CORES:
                codec = WEIGHTS / (rate_per_core * 1e9 * cores)
                row = {"task": task, "disk": disk.name, "cores": cores, "codec_s": codec, "disk_s": files}
                rows.append(row | {"total_s": max(codec, files), "limit": "codec" if codec > files else "disk"})
    return rows


def scaled(results: dict[str, Any]) -> dict[str, float]:
    """Return seconds for the whole model at the rate at which this machine converted the slice, files and all."""
    return {row["task"]: median(work(row)) * WEIGHTS / row["weights"] for row in results.get("cat", [])}
