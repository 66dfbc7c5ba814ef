r"""Time whole conversions with isal's crc32 against the same conversions with zlib's, in alternating pairs.

Example:
    PYTHONPATH=benchmarks python -m suites.conversion.checksums --workdir bench-run/disk --ram-workdir /dev/shm/bench
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from suites.common import machine, measure

SOURCES = Path(__file__).with_name("sources.py")
EXPERTS = 16
CONVERSIONS = (("fp8", "bf16"), ("fp8", "int4"), ("int4", "bf16"), ("bf16", "fp8"))
SIDES = {
    "isal": "import sys; from k2quant.cli import main; main()",
    "zlib": "import sys; sys.modules['isal'] = None; from k2quant.cli import main; main()",
}
"""Programs that differ in which crc32 `k2quant/checkpoint/files/checksum.py` finds."""

PAGE = """# crc32 of what is written: isal against zlib

Written by `benchmarks/suites/conversion/checksums.py`; do not edit. Repeat with:

    {command}

{date}, commit `{commit}`{dirty}. {cpu}, {cores} cores, {memory:.0f} GiB memory, disk {disk}.
Load before the run {load:.1f}. {versions}.

Every byte that a conversion writes goes through crc32, for the journal and the report. Both sides are fresh processes
of the same checkout; on one of them isal cannot be imported, so that zlib serves. They take turns, {pairs} pairs for
each row after one that is not counted, and the ratio is taken pair by pair. Sources: layer 1 of K2-Instruct with
{experts} routed experts, {sizes}; they are in the page cache. On the disk, a run ends when its
shards are flushed.

Alone, on 16 MiB in memory: isal {isal:.1f} GB/s, zlib {zlib:.1f} GB/s, one thread.

"wall", "processor": the ratio of isal's time to zlib's, the median of the pairs, with their quartiles in brackets.

| where | conversion | zlib, wall | isal, wall | wall | processor |
| --- | --- | --- | --- | --- | --- |
{rows}
{remarks}"""

REMARKS = "<!-- remarks -->"
"""What stands behind it was written by hand and stays."""

RATE = """
import os, time, zlib
from isal import isal_zlib
data = os.urandom(2**24)
for crc32 in (isal_zlib.crc32, zlib.crc32):
    times = []
    for _ in range(40):
        begun = time.perf_counter()
        crc32(data)
        times.append(time.perf_counter() - begun)
    print(len(data) / sorted(times)[len(times) // 2] / 1e9)
"""


def written(folder: Path) -> None:
    """Write the sources, unless they are there."""
    if not folder.exists():
        command = [sys.executable, str(SOURCES), str(folder), str(EXPERTS), str(EXPERTS // 4), "bf16", "fp8", "int4"]
        subprocess.run(command, check=True)


def timed(folder: Path, source: str, target: str, side: str) -> measure.Run:
    """Run one conversion and remove what it wrote."""
    out, log = folder / "out", folder / "log"
    command = [sys.executable, "-P", "-c", SIDES[side], "convert", str(folder / "sources" / source), str(out)]
    run = measure.run([*command, "--to", target], log=log)
    measure.remove(out)
    return run


def row(folder: Path, where: str, source: str, target: str, pairs: int) -> str:
    """Measure one conversion in pairs; which side begins alternates too."""
    measure.warm(folder / "sources" / source)
    found: dict[str, list[measure.Run]] = {side: [] for side in SIDES}
    for pair in range(pairs + 1):
        for side in list(SIDES)[:: 1 if pair % 2 else -1]:
            run = timed(folder, source, target, side)
            if pair:
                found[side].append(run)
    walls = {side: statistics.median(run.wall_s for run in runs) for side, runs in found.items()}
    ratios = [
        ratio([getattr(run, name) for run in found["isal"]], [getattr(run, name) for run in found["zlib"]])
        for name in ("wall_s", "cpu_s")
    ]
    names = f"{source.upper()} -> {target.upper()}"
    text = f"| {where} | {names} | {walls['zlib']:.2f} s | {walls['isal']:.2f} s | {ratios[0]} | {ratios[1]} |"
    print(text, flush=True)
    return text


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return the median of the ratios and their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def sizes(folder: Path) -> str:
    """Say how large the sources are."""
    return ", ".join(
        f"{measure.size(folder / name) / 1e9:.2f} GB as {name.upper()}" for name in ("bf16", "fp8", "int4")
    )


def remarks(page: Path) -> str:
    """Return what somebody wrote below the table."""
    _, mark, text = page.read_text().partition(REMARKS) if page.exists() else ("", "", "")
    return f"\n{REMARKS}{text}" if mark else ""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder on the disk")
    parser.add_argument("--ram-workdir", type=Path, required=True, help="folder in memory")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--page", type=Path, default=machine.ROOT / "benchmarks" / "results" / "checksums.md")
    options = parser.parse_args()
    places = {"tmpfs": options.ram_workdir.resolve(), "disk": options.workdir.resolve()}
    rows, load = [], os.getloadavg()[0]
    rates = subprocess.run([sys.executable, "-c", RATE], check=True, capture_output=True, text=True).stdout.split()
    for where, folder in places.items():
        folder.mkdir(parents=True, exist_ok=True)
        written(folder / "sources")
        rows += [row(folder, where, source, target, options.pairs) for source, target in CONVERSIONS]
    found = machine.versions(sys.executable, ["numpy", "numba", "isal"])
    options.page.write_text(
        PAGE.format(
            command="PYTHONPATH=benchmarks python -m suites.conversion.checksums --workdir bench-run/disk "
            f"--ram-workdir /dev/shm/bench --pairs {options.pairs}",
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            commit=machine.git("rev-parse", "--short", "HEAD"),
            dirty=" with changes" if machine.git("status", "--porcelain", "--", "k2quant", "kernels") else "",
            cpu=machine.processor(),
            cores=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            disk=machine.disk(places["disk"]),
            load=load,
            versions=", ".join(f"{name} {version}" for name, version in found.items()),
            pairs=options.pairs,
            experts=EXPERTS,
            sizes=sizes(places["disk"] / "sources"),
            isal=float(rates[0]),
            zlib=float(rates[1]),
            rows="\n".join(rows),
            remarks=remarks(options.page),
        )
    )


if __name__ == "__main__":
    main()
