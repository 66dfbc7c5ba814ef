"""What k2quant is held to, and what a measured result says about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from suites.common.measure import median

PEERS = {"fp8-int4": 20.0, "bf16-int4": 20.0, "bf16-fp8": 12.0, "fp8-bf16": 5.0, "int4-bf16": 5.0}
"""Times faster than the peer, as whole commands on a RAM disk. On a disk its speed rules, and no bar is set."""
CAT = 1.5
"""Times the seconds of `cat` and a plain write of the same bytes."""
MEMORY = 2**30
"""Bytes at the peak, whatever the size of a shard."""
HELP_S = 0.3
CODECS = {"fp8-int4": 1.0, "bf16-int4": 1.0, "fp8-bf16": 2.0, "int4-bf16": 2.0, "bf16-fp8": 1.0}
"""10^9 weights a second, two threads, in memory."""


class Verdict(NamedTuple):
    """One bar and what was measured."""

    what: str
    bar: str
    measured: str
    met: bool


def arrow(task: str) -> str:
    """Write a task as readers know it: `fp8-int4` is FP8 -> INT4."""
    source, target = task.upper().split("-")
    return f"{source} -> {target}"


def walls(runs: list[dict[str, Any]]) -> list[float]:
    """Return the wall times of some runs."""
    return [run["wall_s"] for run in runs]


def work(row: dict[str, Any]) -> list[float]:
    """Return the wall times of k2quant's runs, each less the import that was timed beside it."""
    pairs = zip(walls(row["k2quant_runs"]), walls(row["k2quant_imports"]), strict=True)
    return [whole - load for whole, load in pairs]


def speedup(row: dict[str, Any]) -> float:
    """Return how many times faster k2quant is than the peer, as whole commands, start and imports included."""
    return median(walls(row["peer_runs"])) / median(walls(row["k2quant_runs"]))


def cat_ratio(row: dict[str, Any]) -> float:
    """Return k2quant's time over that of reading and writing the same bytes."""
    return median(work(row)) / (median(row["cat_s"]) + median(row["write_s"]))


def codec_rate(results: dict[str, Any], task: str) -> float | None:
    """Return a codec's rate in memory, 10^9 weights a second, or nothing if it was not measured."""
    rates = results.get("codecs", {}).get("rates_1e9_weights_per_s", {})
    found = rates.get(task.replace("-", " -> "))
    return float(found["median"]) if found else None


def verdicts(results: dict[str, Any]) -> Iterator[Verdict]:
    """Yield every bar that was measured, met or missed."""
    for row in (row for row in results.get("peers", []) if row["medium"] == "tmpfs"):
        what, bar = f"{arrow(row['task'])} against {row['peer']}, {row['medium']}", PEERS[row["task"]]
        times = speedup(row)
        yield Verdict(what, f"{bar:.0f}x faster", f"{times:.1f}x", times >= bar)
    for row in results.get("cat", []):
        ratio = cat_ratio(row)
        yield Verdict(f"{arrow(row['task'])} against cat and write", f"within {CAT}x", f"{ratio:.2f}x", ratio <= CAT)
    for row in results.get("memory", []):
        what = f"{arrow(row['task'])}, {row['shards']} x {row['shard_bytes'] / 1e9:.1f} GB"
        for kind, key in (("own memory", "peak_private"), ("resident, mapped files too", "peak_rss")):
            peak = row["run"][key]
            yield Verdict(f"{what}: {kind}", "< 1 GiB", f"{peak / 2**20:.0f} MiB", peak < MEMORY)
    if "help" in results:
        seconds = median(walls(results["help"]))
        yield Verdict("`k2quant --help`", f"< {HELP_S} s", f"{seconds:.2f} s", seconds < HELP_S)
    for task, bar in CODECS.items():
        rate = codec_rate(results, task)
        if rate is not None:
            yield Verdict(f"{arrow(task)} codec, in memory", f"{bar:.1f} G weights/s", f"{rate:.2f}", rate >= bar)
