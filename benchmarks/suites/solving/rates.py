"""How fast the solver is, on matrices of K2's size, beside llm-compressor's: same matrices, scales and Hessians.

Each environment is a process of its own; contestants take turns. Both round with scales amax/7 that are given, groups
of 32, columns by falling diagonal, damping 0.1; llm-compressor's codes may be -8 too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2quant.kernels.codecs.reference import plain_int4_scale
from suites.calib.report import BARS, Show, facts, table
from suites.calib.samples import tell
from suites.common import machine

WORKER = Path(__file__).parent / "peers" / "solver.py"
GATE_UP = "gate and up"
DOWN = "down"
SHAPES = {GATE_UP: ((2048, 7168), 2), DOWN: ((7168, 2048), 1)}
"""The matrices that share an input: the shape of each, and how many they are."""
TOKENS = {7168: 14336, 2048: 8192}
"""Of which a Hessian is formed, by its width."""
PEER = "llm-compressor"
OURS = "k2quant"
BOUND = "torch"
EXPERTS = 8
ROUNDS = 5
"""Of everything, in turns, after one that warms up."""
SPEED_BAR = 3.0
ERROR_BAR = 1.01
CORES_BAR = 0.85
HESSIAN_BAR = 1.3

PAGE = """# GPTQ of matrices of K2's size: k2quant's solver beside llm-compressor's

Written by `benchmarks/suites/solving/run.py`; do not edit.

{facts} {peers}

Matrices are random, weights of 0.02; inputs are correlated, of unlike size, with a few columns far above the others.
All get the same BF16 weights, the same scales amax/7 in groups of 32, the same Hessians of {tokens} tokens and
damping 0.1, and take columns by falling diagonal. gate and up of an expert share their Hessian: k2quant factorises it
once, llm-compressor's `quantize_weight` is called for each. Scales are found before and are in no time. {threads}
threads; contestants take turns in processes of their own; median of {rounds} rounds, least and most in brackets. Own
memory is what a job took beyond what lay there before it, weights and Hessian: the peer works in its Hessians.

## Bars

{bars}

## One expert's matrices

{solves}

## A chunk of experts

{experts} experts, one thread each: {chunk:.1f} s, {expert:.2f} s an expert, {busy:.0%} of {threads} cores.

## Hessians

The bound is half the time of one whole product X^T X of torch's, for the sum is symmetric. k2quant and llm-compressor
take BF16 inputs in batches of 2,048 tokens.

{hessians}
"""


def inputs(width: int, tokens: int) -> Tensor:
    """Return BF16 `[tokens, width]`: low-rank parts, columns of unlike size, every 128th eight times as large."""
    generator = torch.Generator().manual_seed(width)
    made = torch.randn(tokens, width, generator=generator)
    made += torch.randn(tokens, 64, generator=generator) @ torch.randn(64, width, generator=generator) / 4
    sizes = (torch.randn(width, generator=generator) / 2).exp()
    sizes[::128] *= 8
    return (made * sizes).to(torch.bfloat16)


def prepare(workdir: Path, shapes: Mapping[str, tuple[tuple[int, int], int]], tokens: Mapping[int, int]) -> None:
    """Write what the contestants get, where it is not there yet."""
    for name, ((rows, width), count) in shapes.items():
        if (path := workdir / f"{name}.pt").exists():
            continue
        generator = torch.Generator().manual_seed(rows)
        weights = [(torch.randn(rows, width, generator=generator) * 0.02).to(torch.bfloat16) for _ in range(count)]
        seen = inputs(width, tokens[width])
        hessian = seen.float().T @ seen.float() / len(seen)
        scales = [plain_int4_scale(each, "moonshot") for each in weights]
        torch.save({"inputs": seen}, workdir / f"{name}-inputs.pt")
        torch.save({"weights": weights, "scales": scales, "hessian": (hessian + hessian.T) / 2}, path)
    parts = [str(workdir / f"{name}.pt") for name in shapes]
    torch.save({"parts": parts, "experts": EXPERTS}, workdir / "chunk.pt")


class Worker:
    """A process that contestants of one environment share."""

    def __init__(self, python: str) -> None:
        """Start it.

        Args:
            python: of the environment.
        """
        here = os.environ | {"PYTHONPATH": ":".join(sys.path) if python == sys.executable else ""}
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=here
        )

    def run(self, who: str, what: str, given: Path, threads: int, outputs: Path | None = None) -> dict[str, float]:
        """Have a contestant do a job; return its seconds, those of all cores, and its own memory."""
        job = {"who": who, "what": what, "threads": threads, "inputs": str(given), "outputs": str(outputs or "")}
        asked, answered = self._process.stdin, self._process.stdout
        if asked is None or answered is None:
            raise SystemExit("a contestant's process has no pipes")
        asked.write(json.dumps(job) + "\n")
        asked.flush()
        if not (line := answered.readline()):
            raise SystemExit(f"{who} ended without an answer to {what} of {given.name}")
        found: dict[str, float] = json.loads(line)
        return found

    def end(self) -> None:
        """Have it end."""
        self._process.communicate()


def errors(given: Path, outputs: Path) -> list[float]:
    """Return tr((W - Q) H (W - Q)^T) of each matrix."""
    known, found = torch.load(given, weights_only=True), torch.load(outputs, weights_only=True)
    made = []
    for weights, values in zip(known["weights"], found, strict=True):
        difference = weights.float() - values.float()
        made.append(float(((difference @ known["hessian"]) * difference).sum(dtype=torch.float64)))
    return made


def turns(
    workers: Mapping[str, Worker], what: str, given: Path, *, threads: int, rounds: int, keep: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield what each contestant takes for a job, and the error of what it made where that is kept."""
    found: dict[str, list[dict[str, float]]] = {who: [] for who in workers}
    for turn in range(rounds + 1):
        for who, worker in workers.items():
            tell(f"rates: {what} of {given.stem}, {who}, round {turn}")
            outputs = given.with_name(f"{given.stem}-{who}.out") if keep and not turn else None
            found[who].append(worker.run(who, what, given, threads, outputs))
    for who, runs in found.items():
        seconds = [each["seconds"] for each in runs[1:]]
        error = sum(errors(given, given.with_name(f"{given.stem}-{who}.out"))) if keep else None
        yield {
            "who": who,
            "of": given.stem.removesuffix("-inputs"),
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "cores": statistics.median(each["cores"] for each in runs[1:]),
            "own": max(each["own"] for each in runs),
            "error": error,
        }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return all rates, and whether they meet their bars.

    Args:
        given: `workdir`, where inputs are kept; `peers_python`, of an environment with llm-compressor, or None;
            `threads`.
    """
    workdir: Path = given.workdir / "solver-rates"
    workdir.mkdir(parents=True, exist_ok=True)
    return compare(workdir, given.peers_python, given.threads)


def compare(
    workdir: Path,
    peers_python: str | None,
    threads: int,
    *,
    shapes: Mapping[str, tuple[tuple[int, int], int]] = SHAPES,
    tokens: Mapping[int, int] = TOKENS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Do what `measure` does, on matrices of any size."""
    prepare(workdir, shapes, tokens)
    workers = {OURS: Worker(sys.executable)} | ({PEER: Worker(peers_python)} if peers_python else {})
    try:
        found = _found(workdir, workers, threads, list(shapes), rounds)
    finally:
        for worker in workers.values():
            worker.end()
    wanted = ["torch", "llmcompressor", "compressed-tensors"]
    named = machine.versions(peers_python, wanted) if peers_python else {}
    found |= {"threads": threads, "rounds": rounds, "tokens": {str(key): value for key, value in tokens.items()}}
    found["peers"] = [f"{name} {version}" for name, version in named.items()]
    return found | {"bars": list(bars(found))}


def _found(workdir: Path, workers: Mapping[str, Worker], threads: int, names: list[str], rounds: int) -> dict[str, Any]:
    solves: list[dict[str, Any]] = []
    hessians: list[dict[str, Any]] = []
    for name in names:
        given = workdir / f"{name}.pt"
        solves += turns(workers, "solve", given, threads=threads, rounds=rounds, keep=True)
        seen = workdir / f"{name}-inputs.pt"
        hessians += turns({BOUND: workers[OURS], **workers}, "hessian", seen, threads=threads, rounds=rounds)
    chunk = next(turns({OURS: workers[OURS]}, "chunk", workdir / "chunk.pt", threads=threads, rounds=1))
    return {"solves": solves, "hessians": hessians, "chunk": chunk | {"experts": EXPERTS}}


def bars(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is promised, and what was measured."""
    rows = {(row["of"], row["who"]): row for row in found["solves"]}
    for name, who in rows:
        if who == PEER:
            ours, peer = rows[name, OURS], rows[name, PEER]
            speed, error = peer["median"] / ours["median"], ours["error"] / peer["error"]
            yield _bar(f"{name}: faster than {PEER}", f"{SPEED_BAR:g}x", f"{speed:.2f}x", met=speed >= SPEED_BAR)
            yield _bar(f"{name}: error over {PEER}'s", f"{ERROR_BAR}", f"{error:.4f}", met=error <= ERROR_BAR)
    busy = busy_share(found)
    what = f"{found['chunk']['experts']} experts: share of {found['threads']} cores"
    yield _bar(what, f"{CORES_BAR:.0%}", f"{busy:.0%}", met=busy >= CORES_BAR)
    times = {(row["of"], row["who"]): row["median"] for row in found["hessians"]}
    for name, who in times:
        if who == OURS:
            ratio = times[name, OURS] / (times[name, BOUND] / 2)
            yield _bar(
                f"{name}: a Hessian against its bound", f"{HESSIAN_BAR}x", f"{ratio:.2f}x", met=ratio <= HESSIAN_BAR
            )


def _bar(what: str, bar: str, measured: str, *, met: bool) -> dict[str, Any]:
    return {"what": what, "bar": bar, "measured": measured, "met": met}


def busy_share(found: Mapping[str, Any]) -> float:
    """Return which share of its cores a chunk kept busy."""
    return float(found["chunk"]["cores"] / found["chunk"]["median"] / found["threads"])


def page(results: Mapping[str, Any]) -> str:
    """Return the page of the rates."""
    halves = {row["of"]: row["median"] / 2 for row in results["hessians"] if row["who"] == BOUND}
    columns: dict[str, Show] = {
        "of": lambda row: row["of"],
        "by": lambda row: row["who"],
        "s": lambda row: f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
        "CPU s": lambda row: f"{row['cores']:.2f}",
        "own memory MiB": lambda row: f"{row['own'] / 2**20:,.0f}",
    }
    error: dict[str, Show] = {"error": lambda row: f"{row['error']:.5g}"}
    against: dict[str, Show] = {"against the bound": lambda row: f"{row['median'] / halves[row['of']]:.2f}x"}
    shown = {
        "facts": facts(results),
        "peers": f"Peers: {', '.join(results['peers'])}." if results["peers"] else "No peer was at hand.",
        "tokens": " and ".join(f"{count:,}" for count in results["tokens"].values()),
        "bars": table(BARS, results["bars"]),
        "solves": table(columns | error, results["solves"]),
        "hessians": table(columns | against, results["hessians"]),
        "experts": results["chunk"]["experts"],
        "chunk": results["chunk"]["median"],
        "expert": results["chunk"]["median"] / results["chunk"]["experts"],
        "busy": busy_share(results),
    }
    return PAGE.format(**dict(results) | shown)
