r"""Prove calibration on nano-K2, hold it against its peers, and take its rates.

Example:
    PYTHONPATH=benchmarks python -m suites.calib.run --only proof
    PYTHONPATH=benchmarks python -m suites.calib.run --peers-python /envs/peers/bin/python --ggml libggml-base.so

It trains five nano-K2s where there are none yet. What the workdir holds is taken, so a part that was stopped goes on.
The peers need an environment of their own: torch 2.13.0 (CPU) and llmcompressor 0.14.0.1; llama.cpp is its `ggml-base`,
built as a shared library. Exits 3 when a bar is missed.
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

from k2quant.model.generation import silence
from suites.calib import proof, rates, report, samples, summing
from suites.calib.peers import beside
from suites.common import machine

CODE = ("k2quant", "kernels", "calib", "eval", "benchmarks/suites/calib")


def prove(given: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the proof."""
    arms = proof.measure(given.workdir, samples.SEEDS[: given.seeds])
    widths = samples.WIDTHS
    found = list(summing.shares(arms, widths))
    return {
        "seeds": given.seeds,
        "draws": len(samples.DRAWS),
        "documents": samples.DOCUMENTS,
        "length": proof.LENGTH,
        "tested": len(samples.exam()),
        "fingerprints": [arm["fingerprint"] for arm in arms],
        "shares": found,
        "bars": summing.bars(found),
        "kinds": list(summing.kinds(arms, widths)),
        "levels": list(summing.levels(arms, widths)),
        "differences": list(summing.differences(arms, widths)),
        "judgement": list(summing.judgement(arms, widths)),
        "fidelity": list(summing.fidelity(arms)),
    }


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the peers."""
    homes = beside.Homes(python=given.peers_python, ggml=given.ggml)
    found = beside.measure(given.workdir, homes, samples.SEEDS[: given.seeds])
    wanted = ["torch", "llmcompressor", "compressed-tensors", "numpy"]
    versions = machine.versions(given.peers_python, wanted) if given.peers_python else {}
    named = [f"{name} {version}" for name, version in versions.items()]
    return {
        "seeds": given.seeds,
        "contestants": found["contestants"],
        "errors": report.peer_errors(found["rows"], found["contestants"]),
        "rates": found["rates"],
        "rounds": beside.ROUNDS,
        "peers": ", ".join([*named, *([given.ggml_version] if given.ggml else [])]) or "none at hand",
        "bars": [],
    }


PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "proof": (prove, report.proof),
    "peers": (compare, report.peers),
    "rates": (rates.measure, report.rates),
}
"""Each part: what measures it, and what draws its page."""


def settings() -> argparse.ArgumentParser:
    """Return what the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given again")
    parser.add_argument("--workdir", type=Path, default=Path("bench-run/calib"), help="where models and arms are kept")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "benchmarks" / "results", help="where they go")
    parser.add_argument("--seeds", type=int, default=len(samples.SEEDS), help="models, at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, for what is not timed")
    parser.add_argument("--peers-python", help="Python of the peers' environment")
    parser.add_argument("--ggml", help="path of libggml-base, which the peers' process loads")
    parser.add_argument("--ggml-version", default="ggml", help="what the page calls it")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the pages of the results anew")
    return parser


def main() -> None:
    """Measure the parts, and write results and pages."""
    given = settings().parse_args()
    silence()
    torch.set_num_threads(given.threads)
    missed = False
    for part in given.only or PARTS:
        measure, page = PARTS[part]
        path = given.results / f"calib-{part}.json"
        if not given.page:
            hidden = ("workdir", "results", "peers_python", "ggml", "ggml_version", "only", "page", "threads")
            more = [f"--{key} {value}" for key, value in vars(given).items() if key not in hidden]
            command = f"PYTHONPATH=benchmarks python -m suites.calib.run --only {part} {' '.join(more)}"
            results = machine.facts(command, *CODE) | measure(given)
            path.write_text(json.dumps(results, indent=1) + "\n")
        results = json.loads(path.read_text())
        path.with_suffix(".md").write_text(page(results))
        print(report.table(report.BARS, results["bars"]))
        missed = missed or not all(bar["met"] for bar in results["bars"])
    if missed:
        sys.exit(3)


if __name__ == "__main__":
    main()
