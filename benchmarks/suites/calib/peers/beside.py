"""k2quant's searches beside llm-compressor's and llama.cpp's: the same matrices, samples, importance and groups of 32.

The peers live in an environment of their own, whose Python is named by `--peers-python`, and llama.cpp in a shared
library, `--ggml`. A contestant whose home is not named does not take part, and the page says so.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import F32, U16, float_to_bf16
from suites.calib import rounding, samples, truth
from suites.calib.proof import calibrated, kind
from suites.calib.rounding import Known
from suites.calib.samples import tell

WORKER = Path(__file__).with_name("worker.py")
OBSERVERS = ("mse", "imatrix_mse")
GGML = ("Q4_0 plain", "Q4_0")
NAMES = {
    "rtn": "k2quant rtn",
    "mse": "k2quant mse",
    "imatrix": "k2quant imatrix",
    "peer mse": "llm-compressor memoryless_mse",
    "peer imatrix_mse": "llm-compressor imatrix_mse",
    "peer Q4_0 plain": "llama.cpp Q4_0",
    "peer Q4_0": "llama.cpp Q4_0, imatrix",
}
SHAPES = ((2048, 7168), (7168, 2048))
"""A gate or up and a down projection of K2, on which rates are taken."""
ROUNDS = 3
THREADS = (1, 2)
PANEL = 64
"""Rows that one call of our codec takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """Where peers are."""

    python: str | None
    ggml: str | None

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that take part."""
        return (OBSERVERS if self.python else ()) + (GGML if self.python and self.ggml else ())


class Worker:
    """A process in the peers' environment."""

    def __init__(self, homes: Homes) -> None:
        """Start it."""
        self.homes = homes
        self._process = subprocess.Popen(
            [str(homes.python), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, method: str, threads: int, inputs: Path, outputs: Path | None = None) -> float:
        """Have a method round the matrices of a file; return its seconds."""
        job = {"method": method, "threads": threads, "inputs": str(inputs), "ggml": self.homes.ggml}
        asked, answered = self._process.stdin, self._process.stdout
        if asked is None or answered is None:
            raise SystemExit("the peers' process has no pipes")
        asked.write(json.dumps(job | {"outputs": str(outputs) if outputs else ""}) + "\n")
        asked.flush()
        line = answered.readline()
        if not line:
            raise SystemExit(f"the peers' process ended in {method}")
        found: float = json.loads(line)["seconds"]
        return found

    def close(self) -> None:
        """End it."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


def errors(workdir: Path, homes: Homes, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield for every linear of each model the true error of each contestant over that of our `rtn`."""
    worker = Worker(homes) if homes.methods else None
    folders, items = samples.bases(workdir, seeds), samples.exam()
    for seed in seeds:
        tell(f"peers: seed {seed}")
        model, stats = truth.load(folders[seed]), calibrated(workdir, folders[seed], seed, 0)
        test, matrices = truth.seen(model, items), truth.matrices(model)
        given: dict[str, Any] = {}
        known: dict[str, Known] = {}
        for base, matrix in matrices.items():
            if (here := Known.of(stats, base)) is not None and test.of(base) is not None:
                known[base] = here
                given |= {base: rounding.bits_of(matrix), f"{base}/importance": here.importance}
        inputs = workdir / "peers" / f"{seed}.npz"
        inputs.parent.mkdir(exist_ok=True)
        np.savez(inputs, **given)
        theirs = {method: _values(worker, method, inputs) for method in homes.methods if worker}
        for base, here in known.items():
            values = {method: rounding.rounded(matrices[base], method, 4, here) for method in rounding.METHODS}
            values |= {f"peer {method}": torch.from_numpy(found[base]) for method, found in theirs.items()}
            met = test.inputs[truth.input_of(base)]
            found = {name: met.error(matrices[base], each) for name, each in values.items()}
            row = {name: each / found["rtn"] for name, each in found.items()}
            yield {"seed": seed, "base": base, "kind": kind(base), "true": row}
    if worker:
        worker.close()


def _values(worker: Worker, method: str, inputs: Path) -> dict[str, F32]:
    outputs = inputs.with_suffix(".out.npz")
    worker.run(method, 1, inputs, outputs)
    content = np.load(outputs)
    return {name: content[name] for name in content.files}


def rates(workdir: Path, homes: Homes) -> Iterator[dict[str, Any]]:
    """Yield the rate of each contestant on each shape, in turns: 10^9 weights a second, median and range of rounds."""
    worker = Worker(homes) if homes.methods else None
    for rows, columns in SHAPES:
        generator = np.random.default_rng(0)
        weights = float_to_bf16(generator.standard_normal((rows, columns), np.float32) * np.float32(0.02))
        known = Known.made_up(columns, generator)
        inputs = workdir / "peers" / f"rate-{rows}.npz"
        inputs.parent.mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {"a": weights, "a/importance": known.importance}
        np.savez(inputs, **given)
        spent: dict[tuple[str, int], list[float]] = {}
        for turn in range(ROUNDS + 1):  # the first warms up
            for threads in THREADS:
                tell(f"peers: rates, [{rows}, {columns}], round {turn}, {threads} threads")
                for method in rounding.METHODS:
                    spent.setdefault((method, threads), []).append(ours(method, threads, weights, known))
                for method in homes.methods if worker else ():
                    seconds = worker.run(method, threads, inputs) if worker else math.nan
                    spent.setdefault((f"peer {method}", threads), []).append(seconds)
        for (method, threads), times in spent.items():
            found = [weights.size / each / 1e9 for each in times[1:]]
            row = {"shape": [rows, columns], "method": method, "threads": threads}
            yield row | {"median": statistics.median(found), "least": min(found), "most": max(found)}
    if worker:
        worker.close()


def ours(method: str, threads: int, weights: U16, known: Known) -> float:
    """Return the seconds from weights to codes and scales, by the calls that a conversion makes."""
    scale = np.zeros((weights.shape[0], weights.shape[1] // 32), np.uint16)
    packed = np.zeros((weights.shape[0], weights.shape[1] // 8), np.int32)

    def panel(first: int) -> None:
        here = slice(first, first + PANEL)
        if method == "rtn":
            cpu.int4.encode(weights[here], "moonshot", packed[here], scale[here])
            return
        importance, mean = known if method == "imatrix" else (None, None)
        cpu.int4.search(weights[here], importance, scale[here], mean=mean)
        cpu.int4.store(weights[here], scale[here], "moonshot", packed[here])

    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(panel, range(0, len(weights), PANEL)))
        return time.perf_counter() - begun


def measure(workdir: Path, homes: Homes, seeds: Sequence[int]) -> dict[str, Any]:
    """Return errors and rates."""
    return {
        "contestants": [*rounding.METHODS, *(f"peer {method}" for method in homes.methods)],
        "rows": list(errors(workdir, homes, seeds)),
        "rates": list(rates(workdir, homes)),
    }
