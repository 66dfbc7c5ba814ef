r"""Prove the gate: how often it passes what it should not, and what the rules of other tools do in the same cells.

Example:
    python benchmarks/gate.py
    python benchmarks/gate.py --only repeats

It trains a nano-K2 where there is none yet, plants damage in it, and lets every copy answer 21,600 held-out items; the
answers are kept beside it. With `--only` one part is measured anew and the rest of the results stays: `items` that are
asked once, `repeats`, or `single`: of repeats what depends on the exact test of single answers. It exits 3 when the
gate misses a bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2quant.nano.run import run
from suites.common import machine
from suites.gate import cells as gate_cells
from suites.gate import population as gate_population
from suites.gate import repeats as gate_repeats
from suites.gate import repeats_report
from suites.gate import report as gate_report


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def cells(answers: dict[str, Any], resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what every cell gave."""
    plants, again = gate_population.pairs(answers)
    plain = [
        *gate_cells.plants_at_one_point([*plants, *again]),
        *gate_cells.boundary(plants),
        *gate_cells.published(),
        *gate_cells.few_flips(),
        *gate_cells.same(again),
        *gate_cells.grid(),
    ]
    for place, cell in enumerate(plain):
        if place % 20 == 0:
            tell(f"cell {place} of {len(plain)}")
        yield gate_cells.measure(cell, resamples, seed)
    tell("planned cells")
    for cell, planned in gate_cells.planned([*plants, *again]):
        yield gate_cells.measure(cell, resamples, seed) | {"planned": planned}


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return all results."""
    begun = time.perf_counter()
    kept = folder.with_name(f"{folder.name}-answers.npz")
    stood = kept.stat().st_mtime_ns if kept.exists() else None
    answers = gate_population.kept_answers(folder, given.count, kept, tell)
    scoring = time.perf_counter() - begun
    facts = machine.facts(
        f"python benchmarks/gate.py --count {given.count} --resamples {given.resamples} --seed {given.seed}",
        "k2quant/nano",
        "kernels",
        *gate_files(),
    ) | {
        "seed": given.seed,
        "resamples": given.resamples,
        "items": len(answers[gate_population.WHOLE]),
        "accuracy": float(answers[gate_population.WHOLE].mean()),
        "scoring": scoring,
        "kept": kept.stat().st_mtime_ns == stood,
    }
    facts["cells"] = list(cells(answers, given.resamples, given.seed))
    facts["edges"] = [gate_cells.edge(n, margin) | {"alpha": gate_cells.ALPHA} for n, margin in gate_cells.EDGES]
    facts["bars"] = list(gate_report.bars(facts))
    return facts | {"seconds": time.perf_counter() - begun}


def measure_repeats(given: argparse.Namespace) -> dict[str, Any]:
    """Return the results of items that are asked several times."""
    begun = time.perf_counter()
    count = given.resamples_of_repeats
    found = machine.facts(
        f"python benchmarks/gate.py --only repeats --resamples-of-repeats {count} --seed {given.seed}",
        "benchmarks/suites/gate",
        *gate_files(),
        *statistics("dirichlet", "repeats", "repeats_planning"),
    ) | {"seed": given.seed, "resamples": count, "cells": []}
    every = list(gate_repeats.cells())
    for place, cell in enumerate(every):
        if place % 20 == 0:
            tell(f"cell of repeats {place} of {len(every)}")
        found["cells"].append(gate_repeats.measure(cell, count, given.seed))
    found["edges"] = list(gate_repeats.edges())
    found["planned"] = list(gate_repeats.planned(10 * count, given.seed))
    found["single"] = list(gate_repeats.single_answers())
    found["bars"] = list(repeats_report.bars(found))
    return found | {"seconds": time.perf_counter() - begun}


def measure_single(found: dict[str, Any]) -> dict[str, Any]:
    """Return the results of repeats with what depends on the exact test of single answers measured anew."""
    begun = time.perf_counter()
    facts = machine.facts("python benchmarks/gate.py --only single", "benchmarks/suites/gate", *gate_files())
    every = list(gate_repeats.cells())
    for place, (cell, kept) in enumerate(zip(every, found["cells"], strict=True)):
        if place % 100 == 0:
            tell(f"cell of repeats {place} of {len(every)}")
        kept["passes"] |= gate_repeats.measure_single(cell, found["resamples"], found["seed"])
    found["single"] = list(gate_repeats.single_answers())
    return found | {"again": facts | {"seconds": time.perf_counter() - begun}}


def gate_files() -> list[str]:
    """Return the files of the repository that the statistics are in."""
    return statistics("binomial", "exact", "paired", "planning", "restricted", "tango")


def statistics(*names: str) -> list[str]:
    """Return modules of the statistics as files of the repository."""
    return [f"eval/statistics/{name}.py" for name in names]


def main() -> None:
    """Train or take a nano-K2, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", type=Path, default=Path("bench-run/nano-k2"), help="where a nano-K2 is, or shall be")
    parser.add_argument("--count", type=int, default=1200, help="items of each family and level")
    parser.add_argument("--resamples", type=int, default=100_000, help="of each cell")
    parser.add_argument("--resamples-of-repeats", type=int, default=2_000, help="of each cell with repeats")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--only", choices=["items", "repeats", "single"], help="measure this anew, keep the rest")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gate.json"), help="where results go")
    given = parser.parse_args()
    if given.only in {None, "items"} and not (given.nano / "config.json").exists():
        tell(json.dumps(run(given.nano).summary))
    results = json.loads(given.json.read_text()) if given.only else {}
    if given.only in {None, "items"}:
        results |= measure(given.nano, given)
    if given.only in {None, "repeats"}:
        results["repeats"] = measure_repeats(given)
    if given.only == "single":
        results["repeats"] = measure_single(results["repeats"])
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    text = gate_report.page(results) + repeats_report.section(results["repeats"])
    given.json.with_suffix(".md").write_text(text)
    print(text)
    if not all(bar["met"] for bar in (*results["bars"], *results["repeats"]["bars"])):
        sys.exit(3)


if __name__ == "__main__":
    main()
