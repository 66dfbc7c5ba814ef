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
from importlib.metadata import version
from pathlib import Path

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


def main() -> None:
    """Measure, print, and write down."""
    if sys.argv[1] == "--one":
        print(json.dumps(load(Path(sys.argv[2]))))
        return
    home, there = Path(sys.argv[1]), Path(sys.argv[2])
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
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    there.write_text(
        json.dumps({"machine": machine, "versions": versions, "runs": RUNS, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
