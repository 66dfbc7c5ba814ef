r"""Measure what FP4 costs in accuracy, and whole commands that write it beside those of its peers.

Example:
    PYTHONPATH=benchmarks python -m suites.fp4.run --only proof --workdir bench-run/fp4
    PYTHONPATH=benchmarks python -m suites.fp4.run --only peers --ram-workdir /dev/shm/fp4 \
        --peers-python /envs/peers/bin/python --modelopt-python /envs/modelopt/bin/python

The proof trains nano-K2s where there are none yet, and each of them with INT4 in the forward pass. What the workdir
holds is taken, so a part that was stopped goes on. `--task` measures some of the peers' tasks and leaves the other rows
as they are. The peers need environments of their own: llmcompressor 0.14.0.1 with torch (CPU), and nvidia-modelopt
0.47.0. Exits 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k2quant.model.generation import silence
from suites.calib import samples
from suites.calib.report import BARS, table
from suites.common import machine
from suites.fp4 import pages, proof
from suites.fp4.peers import beside

CODE = ("k2quant", "kernels", "calib", "qat", "benchmarks/suites/fp4")
SAID = {"proof": ("seeds", "threads"), "peers": ("experts", "runs", "threads")}
"""What the command of a page names for each part; the rest says where things lie."""

Results = dict[str, Any]
PARTS: dict[str, tuple[Callable[[argparse.Namespace, Mapping[str, Any]], Results], Callable[[Results], str]]] = {
    "proof": (proof.measure_all, pages.proof),
    "peers": (beside.measure_all, pages.peers),
}
"""Each part: what measures it, given what its results were, and what draws its page."""


def settings() -> argparse.ArgumentParser:
    """Return what the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given again")
    parser.add_argument("--workdir", type=Path, default=Path("bench-run/fp4"), help="where models and arms are kept")
    parser.add_argument("--ram-workdir", type=Path, default=Path("/dev/shm/fp4"), help="a folder on a tmpfs")  # noqa: S108
    parser.add_argument("--results", type=Path, default=machine.ROOT / "benchmarks" / "results", help="where they go")
    parser.add_argument("--slices", type=Path, default=proof.SLICES, help="JSON of published INT4 slices")
    parser.add_argument("--seeds", type=int, default=len(samples.SEEDS), help="nano-K2s of the proof")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each peer; models at a time")
    parser.add_argument("--runs", type=int, default=3, help="of each contestant and task")
    parser.add_argument("--experts", type=int, default=8, help="in the slice that is converted")
    parser.add_argument("--task", choices=list(beside.TASKS), action="append", help="of the peers; may be given again")
    parser.add_argument("--peers-python", help="Python of llm-compressor's environment")
    parser.add_argument("--modelopt-python", help="Python of ModelOpt's environment")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the pages of the results anew")
    return parser


def main() -> None:
    """Measure the parts, and write results and pages."""
    given = settings().parse_args()
    silence()
    missed = False
    for part in given.only or PARTS:
        measure, page = PARTS[part]
        path = given.results / f"fp4-{part}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        if not given.page:
            more = [f"--{key} {getattr(given, key)}" for key in SAID[part]]
            command = f"PYTHONPATH=benchmarks python -m suites.fp4.run --only {part} {' '.join(more)}"
            before = machine.facts(command, *CODE) | measure(given, before)
            path.write_text(json.dumps(before, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(before))
        print(table(BARS, before["bars"]))
        missed = missed or not all(bar["met"] for bar in before["bars"])
    if missed:
        sys.exit(3)


if __name__ == "__main__":
    main()
