r"""Prove GPTQ on nano-K2, hold it against its peers, and take the solver's rates.

Example:
    PYTHONPATH=benchmarks python -m suites.solving.run --only proof
    PYTHONPATH=benchmarks python -m suites.solving.run --only peers --peers-python /envs/peers/bin/python

It trains five nano-K2s where there are none yet. What the workdir holds is taken, that of `suites.calib.run` too, so a
part that was stopped goes on. The peers need an environment of their own: torch 2.13.0 (CPU), llmcompressor 0.14.0.1
and auto-round 0.15.1. Exits 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from k2quant.calib.solving.settings import Settings
from k2quant.model.generation import silence
from suites.calib import proof as first_half
from suites.calib import samples
from suites.calib.report import BARS, table
from suites.common import machine
from suites.solving import proof, rates, report, summing
from suites.solving.peers import beside

CODE = ("k2quant", "kernels", "calib", "eval", "benchmarks/suites/calib", "benchmarks/suites/solving")
HIDDEN = ("workdir", "results", "peers_python", "only", "page")
"""What the command of a page leaves out: it says where things lie."""


def prove(given: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the proof."""
    arms = proof.measure(given.workdir, samples.SEEDS[: given.seeds], samples.DRAWS[: given.draws], given.threads)
    defaults = Settings().as_json()
    defaults.pop("bits")
    return {
        "seeds": given.seeds,
        "draws": given.draws,
        "documents": samples.DOCUMENTS,
        "length": first_half.LENGTH,
        "tested": len(samples.exam()),
        "exam": 18 * proof.QAT_EXAM,
        "tolerance": summing.TOLERANCE,
        "settings": defaults,
        "digests": [arm["digests"]["train"] for arm in arms],
        **summing.summary(arms, samples.WIDTHS),
    }


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the peers."""
    seeds = samples.SEEDS[: given.seeds]
    rows = beside.measured(given.workdir, given.peers_python, seeds, given.threads)
    wanted = ["torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round"]
    versions = machine.versions(given.peers_python, wanted) if given.peers_python else {}
    levels = list(beside.levels(rows))
    return {
        "seeds": given.seeds,
        "documents": samples.DOCUMENTS,
        "tested": len(samples.exam()),
        "threads": given.threads,
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()) or "none at hand",
        "levels": levels,
        "lost": beside.losses(levels),
        "bars": [],
    }


PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "proof": (prove, report.proof),
    "peers": (compare, report.peers),
    "rates": (rates.measure, rates.page),
}
"""Each part: what measures it, and what draws its page."""


def settings() -> argparse.ArgumentParser:
    """Return what the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given again")
    parser.add_argument("--workdir", type=Path, default=Path("bench-run/calib"), help="where models and arms are kept")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "benchmarks" / "results", help="where they go")
    parser.add_argument("--seeds", type=int, default=len(samples.SEEDS), help="models, at least 2")
    parser.add_argument("--draws", type=int, default=len(samples.DRAWS), help="of documents, for each model")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of each peer; models that the proof has at a time"
    )
    parser.add_argument("--peers-python", help="Python of the peers' environment")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the pages of the results anew")
    return parser


def main() -> None:
    """Measure the parts, and write results and pages."""
    given = settings().parse_args()
    silence()
    torch.set_num_threads(1)  # the proof's bits do not depend on --threads
    missed = False
    for part in given.only or PARTS:
        measure, page = PARTS[part]
        path = given.results / f"solving-{part}.json"
        if not given.page:
            more = [f"--{key} {value}" for key, value in vars(given).items() if key not in HIDDEN]
            command = f"PYTHONPATH=benchmarks python -m suites.solving.run --only {part} {' '.join(more)}"
            results = machine.facts(command, *CODE) | measure(given)
            path.write_text(json.dumps(results, indent=1) + "\n")
        results = json.loads(path.read_text())
        path.with_suffix(".md").write_text(page(results))
        print(table(BARS, results["bars"]))
        missed = missed or not all(bar["met"] for bar in results["bars"])
    if missed:
        sys.exit(3)


if __name__ == "__main__":
    main()
