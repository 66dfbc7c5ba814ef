r"""Prove QAT on nano-K2: against its control, against torchao, through the gate, and what a step costs.

Example:
    python benchmarks/qat.py

It trains five nano-K2s where there are none yet, then every arm of every seed, in two processes with a thread each;
what is there already is taken. torchao takes part if it is installed. Exits 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.nano.benchmark import write_tasks
from k2quant.nano.run import run
from suites.common import machine
from suites.qat import arms as qat_arms
from suites.qat import gates as qat_gates
from suites.qat import report as qat_report
from suites.qat import summaries as qat_statistics

HERE = Path(__file__).resolve().parent
MEMORY_ROUNDS = 5
"""Processes of each kind whose memory is measured."""
ALLOCATORS = {"usual": {}, "returned": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
"""glibc keeps freed blocks in pieces by default, how many is chance; with a threshold it gives each back at once."""


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def worker(name: str, *arguments: object, **settings: str) -> str:
    """Run a module of `suites.qat` with one thread, and settings of its environment, and return what it prints."""
    command = [sys.executable, "-P", "-m", f"suites.qat.{name}", *map(str, arguments)]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | settings
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def bases(workdir: Path, seeds: Sequence[int]) -> None:
    """Train what is not there yet."""
    for seed in seeds:
        if not (workdir / f"base-{seed}" / "config.json").exists():
            tell(f"nano-K2 of seed {seed}")
            run(workdir / f"base-{seed}", seed=seed)
    write_tasks(workdir / "tasks")


def arms(workdir: Path, seeds: Sequence[int], at_once: int) -> qat_statistics.Results:
    """Train and score every arm that has no result yet; return all."""
    wanted = [(seed, kind, bits) for seed in seeds for kind, widths in qat_arms.WIDTHS.items() for bits in widths]

    def one(arm: tuple[int, str, int]) -> None:
        seed, kind, bits = arm
        if not (workdir / "results" / f"{seed}-{kind}-{bits}.json").exists():
            worker("worker", workdir, seed, kind, bits)
            tell(f"seed {seed}, {kind}, INT{bits}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, wanted))
    found = qat_statistics.read(workdir / "results")
    return {arm: found[arm] for arm in wanted}


def peers(workdir: Path, seeds: Sequence[int], at_once: int) -> dict[str, Any]:
    """Train and score k2quant and torchao on linears; nothing where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return {"version": None, "results": []}
    wanted = [(seed, tool, qat_arms.PEER_BITS) for seed in seeds for tool in ("k2quant", "torchao")]

    def one(arm: tuple[int, str, int]) -> dict[str, Any]:
        path = workdir / "peers" / f"{arm[0]}-{arm[1]}-{arm[2]}.json"
        if not path.exists():
            worker("peer_worker", workdir, *arm)
            tell(f"side by side: seed {arm[0]}, {arm[1]}, INT{arm[2]}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(one, wanted))
    return {"version": metadata.version("torchao"), "results": results, "experts": routed(workdir / "base-0")}


def routed(model: Path) -> float:
    """Return the share of a model's weights that lies in routed experts."""
    checkpoint = open_checkpoint(model)
    sizes = {entry.name: math.prod(entry.shape) for entry in checkpoint.tensors.values()}
    return sum(size for name, size in sizes.items() if ".mlp.experts." in name) / sum(sizes.values())


def cost(workdir: Path, *, torchao: bool) -> dict[str, Any]:
    """Measure what a step costs, with nothing beside it."""
    found: dict[str, Any] = {}
    for experts in ("fused", "separate"):
        tell(f"cost, {experts} experts")
        seconds = json.loads(worker("cost", workdir, experts, *(["times"] if not torchao else ["times", "torchao"])))
        found[experts] = {"seconds": seconds, "memory": memory(workdir, experts, list(seconds))}
    return found


def memory(workdir: Path, experts: str, tools: Sequence[str]) -> dict[str, dict[str, list[dict[str, int]]]]:
    """Return what processes of each tool held, in turns, by tool and by how the C library handles freed blocks."""
    found: dict[str, dict[str, list[dict[str, int]]]] = {tool: {kind: [] for kind in ALLOCATORS} for tool in tools}
    for _ in range(MEMORY_ROUNDS):
        for kind, settings in ALLOCATORS.items():
            for tool in tools:
                held = json.loads(worker("cost", workdir, experts, "memory", tool, **settings))
                found[tool][kind].append(held)
    return found


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("bench-run/qat"), help="where models and arms are kept")
    parser.add_argument("--at-once", type=int, default=2, help="arms that train at a time, a thread each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/qat.json"), help="where results go")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page of the results anew")
    given = parser.parse_args()
    if given.page:
        write(given.json)
        return
    workdir, seeds = given.workdir, qat_arms.SEEDS
    bases(workdir, seeds)
    results = arms(workdir, seeds, given.at_once)
    side = peers(workdir, qat_arms.PEER_SEEDS, given.at_once)
    facts: dict[str, Any] = {
        "command": "python benchmarks/qat.py",
        "machine": {
            "cpu": machine.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "versions": ", ".join(
                f"{name} {version}"
                for name, version in machine.versions(sys.executable, ["torch", "transformers", "numpy"]).items()
            ),
            "commit": machine.git("rev-parse", "--short", "HEAD") or "none",
            "dirty": " with changes" if machine.git("status", "--porcelain", "--", "qat", "kernels", "k2quant") else "",
        },
        "seeds": len(seeds),
        "steps": qat_arms.STEPS,
        "batch": qat_arms.ROWS,
        "warmup": qat_arms.WARMUP,
        "rates": qat_arms.RATES,
        "gates": qat_gates.measure(workdir, tell),
        "peers": side,
        "cost": cost(workdir, torchao=bool(side["results"])),
    }
    facts = {"arms": [slim(one) for one in results.values()], **qat_statistics.summary(results), **facts}
    facts["peers"] = {**side, "results": [slim(one) for one in side["results"]]}
    facts["bars"] = list(qat_report.bars(facts))
    given.json.write_text(json.dumps(facts, indent=1) + "\n")
    write(given.json)


def write(path: Path) -> None:
    """Write the page of what a JSON file holds, and say whether every bar is met."""
    facts = json.loads(path.read_text())
    text = qat_report.page(facts)
    path.with_suffix(".md").write_text(text)
    print(text)
    if not all(bar["met"] for bar in facts["bars"]):
        sys.exit(3)


def slim(one: dict[str, Any]) -> dict[str, Any]:
    """Return a result with the mean of its losses in their place."""
    if "losses" in one:
        loss, error = qat_statistics.mean(one["losses"])
        seconds = one.get("seconds")
        short = {"seconds_per_step": sum(seconds) / len(seconds)} if isinstance(seconds, list) else {}
        return (
            {key: value for key, value in one.items() if key not in {"losses", "seconds"}}
            | short
            | {
                "loss": loss,
                "standard_error": error,
            }
        )
    return {key: slim(value) if isinstance(value, dict) else value for key, value in one.items()}


if __name__ == "__main__":
    main()
