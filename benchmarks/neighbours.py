r"""Measure what other busy processes on the same cores cost a job, by how OpenMP's threads wait.

Example:
    python benchmarks/neighbours.py demo-run/nano demo-run/nano-int4

It runs the same commands idle and beside busy processes, the three ways of waiting taking turns, and exits 3 where the
results of one command are not the same to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from suites.common import machine
from suites.common.measure import remove, run

WAYS: dict[str, dict[str, str]] = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "k2quant's": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
"""What the user says. libgomp spins 300,000 rounds where nobody says anything; k2quant asks for fewer then."""

JOBS = {
    "blame": "eval blame {base} {candidate} --passes 12 --tokens 2048 --json",
    "nano": "nano {folder}/nano --steps 10 --json",
    "generate": "generate {candidate} --prompt A0478+3= --json",
}
"""A long job of many passes, a training, and one token after the other; starting is a part of each."""

BUSY = "while True: pass"

TIMES = {"seconds", "prompt_seconds", "tokens_per_second", "folder"}
"""What is no result."""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many processes busy while the block runs."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def result(text: str) -> str:
    """Return a digest of what a job found, without its times."""
    found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])  # progress stands around it
    kept = {key: value for key, value in found.items() if key not in TIMES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def measure(given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what each run took."""
    clean = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    os.environ.clear()
    os.environ.update(clean)
    for turn, busy, job in product(range(given.rounds + 1), (0, given.busy), JOBS):
        words = shlex.split(JOBS[job].format(base=given.base, candidate=given.candidate, folder=folder))
        ways = list(WAYS.items())
        for way, said in ways if turn % 2 else reversed(ways):
            log = folder / "log"
            remove(folder / "nano")
            with neighbours(busy):
                cost = run([sys.executable, "-m", "k2quant", *words], log=log, env=said)
            print(f"{job} {busy} busy, {way}: {cost.wall_s:.1f} s", file=sys.stderr, flush=True)
            if turn:  # the first fills caches
                digest = result(log.read_text())
                yield {
                    "job": job,
                    "busy": busy,
                    "way": way,
                    "wall_s": cost.wall_s,
                    "cpu_s": cost.cpu_s,
                    "sha256": digest,
                }


def page(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    runs = results["runs"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    commit = f"{results['commit']}{', changed' if results['dirty'] else ''}"
    lines = [
        f"# Neighbours on {results['cpu']}, {results['cores']} cores",
        "",
        "Written by `benchmarks/neighbours.py`; do not edit. Seconds of a whole command: median (range).",
        "",
        f"{versions}; commit {commit}; load before {results['load']:.1f}; {results['rounds']} runs of each, in turns.",
        "",
        f"Repeat with `{results['command']}`.",
        "",
        "| command | busy processes | " + " | ".join(WAYS) + " |",
        "| --- | --- | " + " | ".join("---" for _ in WAYS) + " |",
    ]
    for job, busy in product(JOBS, (0, results["busy"])):
        cells = []
        for way in WAYS:
            walls = [r["wall_s"] for r in runs if (r["job"], r["busy"], r["way"]) == (job, busy, way)]
            cells.append(f"{statistics.median(walls):.1f} ({min(walls):.1f}-{max(walls):.1f})")
        lines.append(f"| `k2quant {JOBS[job].split(' {')[0]}` | {busy} | " + " | ".join(cells) + " |")
    same = "equal to the last bit in all runs" if results["same"] else "NOT the same"
    return "\n".join([*lines, "", f"Results of each command: {same}.", ""])


def write(file: Path) -> None:
    """Write the page beside a file of results; remarks of a person lie there too, as `<name>-remarks.md`."""
    remarks = file.with_name(f"{file.stem}-remarks.md")
    text = page(json.loads(file.read_text()))
    file.with_suffix(".md").write_text(f"{text}\n{remarks.read_text()}" if remarks.exists() else text)
    print(file.with_suffix(".md").read_text())


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--busy", type=int, default=2, help="processes beside the job")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, after one that is not counted")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/neighbours.json"), help="where results go"
    )
    given = parser.parse_args()
    facts = machine.facts(
        f"python benchmarks/neighbours.py {given.base.name} {given.candidate.name} --busy {given.busy} "
        f"--rounds {given.rounds}",
        "k2quant",
        "kernels",
        "eval",
    ) | {
        "busy": given.busy,
        "rounds": given.rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        facts["runs"] = list(measure(given, Path(folder)))
    facts["same"] = all(len({r["sha256"] for r in facts["runs"] if r["job"] == job}) == 1 for job in JOBS)
    given.json.write_text(json.dumps(facts, indent=1) + "\n")
    write(given.json)
    if not facts["same"]:
        sys.exit(3)


if __name__ == "__main__":
    main()
