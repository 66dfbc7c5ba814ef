r"""Train nano-K2, round it to the nearest code at several widths, and write what that does to its answers.

Example:
    python benchmarks/nano.py nano-k2

It trains a nano-K2 where there is none yet, which takes three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from k2quant.nano import tasks
from k2quant.nano.rounding import Row, rounding_table
from k2quant.nano.run import run
from suites.common import machine

PAGE = """# nano-K2: what rounding to nearest does to its answers

Written by `benchmarks/nano.py`; do not edit. `{command}`

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}.{training}

{count} held-out items of each of three levels a family, the same for every row. "routed": the routed experts'
projections are rounded; "all": every projection. Groups of 32, the rule of Kimi K2's INT4 releases. Loss: of the tokens
of an answer, in nats, mean over items; "more" is what rounding adds, item by item, with its standard error. Accuracy:
answers wholly right, stop token included, in percent, with Wilson's 95% interval.

{table}

Before rounding, by level:

{levels}
"""

TRAINED = " {parameters:,} parameters, {steps} steps in {seconds} s, seed {seed}."


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["rounded", "bits", "loss", "more", *tasks.FAMILIES, "all"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = [percent(row, family) for family in [*tasks.FAMILIES, None]]
        more = f"{row.gap[0]:+.4f} ± {row.gap[1]:.4f}" if row.which else ""
        lines.append([row.which or "nothing (BF16)", str(row.bits), f"{row.score.loss[0]:.4f}", more, *shares])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(row: Row, family: str | None) -> str:
    """Return an accuracy with its interval."""
    found = row.score.accuracy(family)
    low, high = found.interval
    return f"{100 * found.share:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def levels(row: Row) -> str:
    """Return the accuracies of each family and level as a Markdown table."""
    lines = [["family", "easy", "middle", "hard", "task"], ["---"] * 5]
    for name, family in tasks.FAMILIES.items():
        shares = [f"{100 * row.score.accuracy(name, level).share:.1f}" for level in tasks.LEVELS]
        lines.append([name, *shares, family.what])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(row: Row) -> dict[str, Any]:
    """Return a row for machines."""
    found = {family: row.score.accuracy(family) for family in tasks.FAMILIES}
    return {
        "rounded": row.which or "nothing",
        "bits": row.bits,
        "loss": row.score.loss,
        "more": row.gap,
        "accuracy": {
            name: {"share": it.share, "interval": it.interval, "count": it.count} for name, it in found.items()
        },
    }


def measure(folder: Path, count: int, training: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Return the results for machines, and the page."""
    rows = rounding_table(folder, tasks.exam(count))
    facts: dict[str, Any] = {
        "cpu": machine.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": machine.versions(sys.executable, ["torch", "transformers", "numpy"]),
        "commit": machine.git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(machine.git("status", "--porcelain", "--", "k2quant", "kernels")),
        "command": f"python benchmarks/nano.py {folder.name} --count {count}",
    }
    shown = {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "dirty": ", changed since" if facts["dirty"] else "",
        "training": TRAINED.format(**training) if training else "",
    }
    page = PAGE.format(**facts | shown, count=count, table=table(rows), levels=levels(rows[0]))
    return facts | {"training": training, "rows": [figures(row) for row in rows]}, page


def main() -> None:
    """Train or take a folder, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where a nano-K2 is, or shall be")
    parser.add_argument("--count", type=int, default=400, help="items of each family and level")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/nano.json"), help="where results go")
    given = parser.parse_args()
    training = None
    if not (given.folder / "config.json").exists():
        training = {key: value for key, value in run(given.folder).summary.items() if key != "folder"}
        print(json.dumps(training), flush=True)
    results, page = measure(given.folder, given.count, training)
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    given.json.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
