"""Measure what an export saves mlx-lm: time and memory to load native INT4 and its export, from cold and from cache.

Usage, in an environment with mlx[cpu] and mlx-lm, as `make mlx-oracles` makes one:
    python benchmarks/suites/exports/mlx_loading.py FOLDER RESULT.json

FOLDER is what `mlx_slice.py` left. Each load is a process of its own, native and export in turn, five times; the
kernel is asked to forget the files before a cold one (posix_fadvise). Memory is the largest resident set.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RUNS = 5


def forget(folder: Path) -> None:
    """Have the kernel drop what it keeps of a folder's files."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def load(folder: Path) -> dict[str, float]:
    """Load a model in this process."""
    from mlx_lm.utils import load_model

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begun = time.perf_counter()
    load_model(folder)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak, "before_bytes": before}


def measured(folder: Path, *, cold: bool) -> dict[str, float]:
    """Load a model in a process of its own."""
    if cold:
        forget(folder)
    done = subprocess.run([sys.executable, __file__, "--one", folder], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(home: Path) -> list[dict[str, Any]]:
    """Measure everything, from cold first."""
    rows = []
    for cold in (True, False):
        runs: dict[str, list[dict[str, float]]] = {"native": [], "export": []}
        for _ in range(RUNS):
            for name, found in runs.items():
                found.append(measured(home / name, cold=cold))
        for name, found in runs.items():
            seconds, peaks = ([each[key] for each in found] for key in ("seconds", "peak_bytes"))
            nbytes = sum(path.stat().st_size for path in (home / name).glob("*.safetensors"))
            row = {"checkpoint": name, "cold": cold, "bytes": nbytes, "seconds": statistics.median(seconds)}
            rows.append(row | {"least": min(seconds), "most": max(seconds), "peak_bytes": statistics.median(peaks)})
            print(rows[-1])
    return rows


def page(found: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    versions = ", ".join(f"{name} {each}" for name, each in found["versions"].items())
    machine = f"{found['cpu']}, {found['cores']} cores, load {found['load']:.1f} at the start; {versions}; commit "
    how = "A slice of K2-Thinking in real widths, as `mlx_slice.py` writes it; each load in a process of its own, "
    lines = [
        "# mlx-lm: loading native INT4, and an export",
        "",
        "Written by `benchmarks/suites/exports/mlx_loading.py`; do not edit.",
        "",
        f"{machine}{found['commit']}. `{found['command']}`",
        "",
        f"{how}{found['runs']}",
        "runs, median with least and most. Memory is the largest resident set, the interpreter's own included.",
        "",
        "| checkpoint | files | from | seconds | memory |",
        "| --- | ---: | --- | ---: | ---: |",
        *map(_line, found["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    place = "the disk" if row["cold"] else "the cache"
    seconds = f"{row['seconds']:.1f} ({row['least']:.1f} to {row['most']:.1f})"
    size, peak = row["bytes"] / 1e9, row["peak_bytes"] / 1e9
    return f"| {row['checkpoint']} | {size:.2f} GB | {place} | {seconds} | {peak:.2f} GB |"


def main() -> None:
    """Measure, print, and write down, as JSON and as a page beside it."""
    if sys.argv[1] == "--one":
        print(json.dumps(load(Path(sys.argv[2]))))
        return
    home, there = Path(sys.argv[1]), Path(sys.argv[2])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S607
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    found: dict[str, Any] = {
        "cpu": " ".join(cpu.partition(":")[2].split()[:2]),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in ("mlx", "mlx-lm")},
        "commit": commit.stdout.strip(),
        "command": f"build/mlx/bin/python benchmarks/suites/exports/mlx_loading.py FOLDER {there.name}",
        "runs": RUNS,
    }
    found["rows"] = rows_of(home)
    there.write_text(json.dumps(found, indent=1) + "\n")
    there.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
