r"""Write what a conversion of the whole K2 takes on many machines, by the simulation: a table and a picture.

Example:
    PYTHONPATH=benchmarks python -m suites.conversion.machines.report

It takes what `overhead` and `throttled` measured, and measures SHA-256 here. Nothing else is measured.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from suites.common import machine
from suites.conversion.machines import cases
from suites.conversion.machines.cases import CORES, LINES, MACHINES, WAYS, Case, Rates

RESULTS = machine.ROOT / "benchmarks" / "results"
COMMAND = "PYTHONPATH=benchmarks python -m suites.conversion.machines.report"
CODE = ("benchmarks/suites/conversion/machines",)
AGREES = 0.1
"""By how much of what was measured the simulation may be off, for it to be believed."""
COLOURS = {"line in": "tab:blue", "line out": "tab:cyan", "file system": "tab:orange", "NVMe": "tab:green"}
TEXT = """\
On paper: the whole of Kimi K2-Instruct, {read:.0f} GB of FP8 in {shards} shards, to {written:.0f} GB of INT4, by a
simulation of discrete events (`simulation.py`): pieces of 64 MB pass line, cores and disk of their machine and what all
share, each a queue with a rate; shards are given out as the driver of `convert` with `cluster` gives them.

Measured here: a core converts {convert:.2f} GB of FP8 a second (`machines-overhead.json`: reading, codec, checksums and
writing in memory, on a machine that did other work) and digests {digest:.2f} GB/s (SHA-256, for what comes from a hub
or bucket). All else is assumed. Lines carry {goodput:.1%} of their rate each way, what TCP leaves of frames of 1,500
bytes. NVMe reads 6.5 and writes 3.5 GB/s: Samsung's figures for its PM9A3, U.2, of May 2020. The file system that all
see gives 4.8 GB/s to reads and writes together: Amazon's FSx for Lustre, PERSISTENT_2, 4.8 TiB at 1,000 MB/s a TiB. A
second passes between a machine's shards. Encryption of lines, starts and retries are in none of it: the times are what
to hold a run against, and a store that gives a machine less than its line rules in place of it.
"""
READING = """\
- One machine is ruled by its line: {one:.1f} minutes are the whole at 10 Gbit/s. More cores than 16 change nothing.
- From a hub or bucket, machines add up, for each brings a line. Sixteen come to {sixteen:.0%} of sixteen lines: 61
  shards are no multiple of 16, and a shard is the smallest piece of work.
- A file system that all see is full with two lines of 25 Gbit/s: beyond that, machines buy nothing.
- NVMe of one machine needs {nvme:.1f} minutes where the source lies on it already; as a file system over four machines
  it is ruled by the lines between them.
"""
HELD = """\
Held against the run that was measured here, two nodes of one core each and a slice of 3.0 GB in memory: simulated
{predicted:.2f} s, measured {measured:.2f} s, {error:+.1%}. And two such nodes whose source, 1.1 GB on the tests' hub,
comes over one line of a known rate (`throttled.py`, `machines-throttled.json`): {lines}. At most {agrees:.0%} is what a
test allows. Disks are their rates."""


def digest_rate() -> float:
    """Return the bytes that one core digests a second: the best of five, of what other work leaves."""
    data, best = bytes(1 << 26), 0.0
    for _ in range(5):
        begun = time.perf_counter()
        hashlib.sha256(data).digest()
        best = max(best, len(data) / (time.perf_counter() - begun))
    return best


def measured() -> dict[str, Any]:
    """Return all cases."""
    overhead = cases.stored(RESULTS / "machines-overhead.json")
    found, shards = cases.rates(overhead, digest_rate()), cases.k2_shards()
    rows = []
    for case in cases.cases():
        outcome, bound = cases.outcome(case, found, shards)
        facts = {"seconds": outcome.seconds, "bound": bound, "rules": outcome.rules, "busy": outcome.busy}
        rows.append(case._asdict() | facts)
    cluster = median(run["work_s"] for run in overhead["runs"]["cluster"])
    agreement = {"predicted": cases.predicted(overhead, found), "measured": cluster}
    throttled = cases.stored(RESULTS / "machines-throttled.json")
    lines = [
        {
            "rate": run["rate"],
            "predicted": cases.through_a_line(throttled, found, run["rate"]),
            "measured": median(run["work_s"]),
        }
        for run in throttled["runs"]
    ]
    return {
        "rates": found._asdict(),
        "shards": shards,
        "written": sum(shards) * cases.OUT,
        "agreement": agreement,
        "lines": lines,
        "rows": rows,
    }


def row_of(found: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return the results of a case."""
    wanted = case._asdict().items()
    row: dict[str, Any] = next(row for row in found["rows"] if wanted <= row.items())
    return row


def minutes(row: dict[str, Any]) -> str:
    """Return a cell of the table."""
    return f"{row['seconds'] / 60:.1f} min ({row['rules']} {row['busy'][row['rules']]:.0%})"


def held(run: dict[str, Any]) -> str:
    """Say what was simulated and measured of a line."""
    said, seen = run["predicted"], run["measured"]
    return f"at {run['rate'] / 1e6:.0f} MB/s simulated {said:.1f} s, measured {seen:.1f} s, {said / seen - 1:+.1%}"


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    rates = Rates(**found["rates"])
    text = TEXT.format(
        read=sum(found["shards"]) / 1e9,
        written=found["written"] / 1e9,
        shards=len(found["shards"]),
        convert=rates.convert / 1e9,
        digest=rates.digest / 1e9,
        goodput=cases.GOODPUT,
    )
    head = ["source and output", "line", "cores each", *(f"{count} machine{'s'[: count > 1]}" for count in MACHINES)]
    table = [head, ["---"] * len(head)]
    for way in WAYS:
        for line in LINES:
            for cores in CORES:
                cells = [minutes(row_of(found, Case(way, line, cores, count))) for count in MACHINES]
                table.append([way, f"{line} Gbit/s", str(cores), *cells])
    agreement = found["agreement"]
    error = agreement["predicted"] / agreement["measured"] - 1
    one, sixteen = (row_of(found, Case("bucket", 10, 16, count)) for count in (1, 16))
    nvme, share = row_of(found, Case("nvme", 10, 16, 1)), sixteen["bound"] / sixteen["seconds"]
    return "\n".join(
        [
            "# The whole of K2 on many machines",
            "",
            "Written by `benchmarks/suites/conversion/machines/report.py`; do not edit.",
            "",
            f"{found['cpu']}, {found['cores']} cores; commit {found['commit']}. `{found['command']}`",
            "",
            text,
            "![Minutes by machines](machines.svg)",
            "",
            *(f"- {way}: {said}." for way, said in WAYS.items()),
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            "In brackets what rules: what was busy for most of the time, and for how much of it.",
            "",
            READING.format(one=one["seconds"] / 60, nvme=nvme["seconds"] / 60, sixteen=share),
            HELD.format(**agreement, error=error, agrees=AGREES, lines="; ".join(map(held, found["lines"]))),
            "",
        ]
    )


def draw(found: dict[str, Any], file: Path) -> None:
    """Plot minutes over machines, a panel for each way; a point's colour is what rules."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Text stays text, and names stay the same from run to run: the file is small and its changes can be read.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "k2quant", "font.size": 8})
    figure, panels = plt.subplots(1, len(WAYS), figsize=(10, 3.4), sharey=True)
    for axes, way in zip(panels, WAYS, strict=True):
        for line in LINES:
            rows = [row_of(found, Case(way, line, max(CORES), count)) for count in MACHINES]
            times = [row["seconds"] / 60 for row in rows]
            style = "-" if line == max(LINES) else "--"
            axes.plot(MACHINES, times, style, color="grey", lw=1, label=f"{line} Gbit/s")
            for count, time_, row in zip(MACHINES, times, rows, strict=True):
                axes.plot(count, time_, "o", ms=5, color=COLOURS.get(row["rules"], "tab:red"))
        axes.set(xscale="log", yscale="log", xlabel="machines", title=f"{way}, {max(CORES)} cores each")
        axes.set_xticks(MACHINES, [str(count) for count in MACHINES])
        axes.set_yticks([0.5, 1, 2, 5, 10, 15], ["0.5", "1", "2", "5", "10", "15"])
        axes.minorticks_off()
        axes.grid(visible=True, lw=0.3)
        axes.legend(fontsize=6)
    panels[0].set_ylabel("minutes, FP8 to INT4")
    rules = sorted({row["rules"] for row in found["rows"]})
    for name in rules:
        panels[-1].plot([], [], "o", color=COLOURS.get(name, "tab:red"), label=f"{name} rules")
    panels[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Simulate, and write results, page and picture."""
    found = machine.facts(COMMAND, *CODE) | measured()
    (RESULTS / "machines.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "machines.md").write_text(page(found))
    draw(found, RESULTS / "machines.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
