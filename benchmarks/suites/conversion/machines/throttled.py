r"""Measure two nodes whose source comes over one line of a known rate, to hold the simulation against.

Example:
    PYTHONPATH=benchmarks python -m suites.conversion.machines.throttled --workdir /dev/shm/machines

The source lies on the tests' hub, on the loopback address, whose connections share one line; two nodes of one core read
it by range and write to a folder. Seconds are taken as `overhead` takes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from suites.common import machine
from suites.conversion.machines.overhead import RESULTS, converted, nodes, raised

sys.path.insert(0, str(machine.ROOT / "tests" / "shared"))

from served.hub import hub

EXPERTS, ABREAST = 24, 4
"""Experts of the slice, and of each of its shards: six shards, 1.1 GB."""
RATES = (50e6, 100e6)
"""Bytes a second of the line."""
CODE = ("k2quant", "kernels", "benchmarks/suites/conversion/machines")


def measured(workdir: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of each rate."""
    source = workdir / "throttled" / "fp8"
    if not source.exists():
        script = machine.ROOT / "benchmarks" / "suites" / "conversion" / "sources.py"
        command = [sys.executable, str(script), str(source.parent), str(EXPERTS), str(ABREAST), "fp8"]
        subprocess.run(command, check=True)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found: dict[str, Any] = {"shards": [path.stat().st_size for path in sorted(source.glob("*.safetensors"))]}
    with hub() as server:
        server.repo("slices/k2", source)
        os.environ |= server.environment()
        with nodes(2) as address:
            os.environ["RAY_ADDRESS"] = address
            converted("hf://slices/k2", workdir / "out", "auto", 1)  # which finds the digests of the source, too
            found["runs"] = []
            for rate in RATES:
                server.link.rate = rate
                runs = [converted("hf://slices/k2", workdir / "out", "auto", 1) for _ in range(rounds)]
                found["runs"].append({"rate": rate, "work_s": [run["work_s"] for run in runs], "runs": runs})
                print(rate, [round(run["work_s"], 2) for run in runs], flush=True)
    return found


def main() -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder on a tmpfs with 3 GB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    raised([os.getpid()])
    given.workdir.mkdir(parents=True, exist_ok=True)
    module = "suites.conversion.machines.throttled"
    command = f"PYTHONPATH=benchmarks python -m {module} --workdir {given.workdir} --rounds {given.rounds}"
    found = machine.facts(command, *CODE) | measured(given.workdir, given.rounds)
    (RESULTS / "machines-throttled.json").write_text(json.dumps(found, indent=1) + "\n")
    for run in found["runs"]:
        print(run["rate"], median(run["work_s"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
