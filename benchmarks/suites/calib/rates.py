"""How fast calibration is: the search in memory, a whole conversion by each method, and the pass that collects.

A conversion and a pass are processes of their own; contestants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.kernels.codecs.values import float_to_bf16
from suites.calib import wide
from suites.calib.peers import beside
from suites.calib.rounding import METHODS, Known
from suites.calib.samples import tell
from suites.common import machine
from suites.common.measure import remove, run, size, warm

GIB = 1 << 30
SHAPE = (2048, 7168)
ROUNDS = 5
"""Of everything, in turns, after one that warms up."""
CODEC_BARS = {"mse": 0.35, "imatrix": 0.30}
"""10^9 weights a second on two threads, of the search and of storing at what it found."""
CONVERT_BAR = 4.0
"""Times as long as `rtn`."""
COLLECT_BAR = 1.3
"""Times as long as `stream_forward` over the same batches."""


def codecs() -> Iterator[dict[str, Any]]:
    """Yield the rate of each method on one and two threads."""
    generator = np.random.default_rng(0)
    weights = float_to_bf16(generator.standard_normal(SHAPE, np.float32) * np.float32(0.02))
    known = Known.made_up(SHAPE[1], generator)
    spent: dict[tuple[str, int], list[tuple[float, float]]] = {
        (method, threads): [] for method in METHODS for threads in (1, 2)
    }
    for turn in range(ROUNDS + 1):
        tell(f"rates: codec, round {turn}")
        for (method, threads), seconds in spent.items():
            busy = time.process_time()
            wall = beside.ours(method, threads, weights, known)
            seconds.append((wall, time.process_time() - busy))
    for (method, threads), seconds in spent.items():
        walls, cores = ([weights.size / each[side] / 1e9 for each in seconds[1:]] for side in (0, 1))
        yield {"method": method, "threads": threads, **_summed(walls), "core": statistics.median(cores)}


def _summed(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def conversions(workdir: Path, source: Path, stats: Path) -> Iterator[dict[str, Any]]:
    """Yield seconds and memory of `convert` by each method."""
    log, out = workdir / "convert.log", workdir / "converted"
    found: dict[str, list[Any]] = {method: [] for method in METHODS}
    for turn in range(wide.ROUNDS + 1):
        for method in METHODS:
            tell(f"rates: convert, {method}, round {turn}")
            remove(out)
            warm(source)
            more = ["--stats", str(stats)] if method == "imatrix" else []
            command = ["convert", "--to", "int4", "--method", method, *more, str(source), str(out), "-q"]
            # The first round warms up; only it watches memory, which costs a little.
            found[method].append(run(_k2quant(*command), log=log, sample=turn == 0))
    remove(out)
    for method, runs in found.items():
        seconds = _summed([each.wall_s for each in runs[1:]])
        yield {
            "method": method,
            **seconds,
            "cpu_s": statistics.median(each.cpu_s for each in runs[1:]),
            "own": runs[0].peak_private,
        }


def _k2quant(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "k2quant", *arguments]


def passes(workdir: Path, source: Path, memory: int) -> dict[str, Any]:
    """Return seconds and memory of the collecting pass and of a plain pass over the same rows."""
    log = workdir / "pass.log"
    found: dict[str, list[Any]] = {"stream": [], "collect": []}
    for turn in range(wide.ROUNDS + 1):
        for what, runs in found.items():
            tell(f"rates: {what}, round {turn}")
            stats = workdir / "pass-stats"
            shutil.rmtree(stats, ignore_errors=True)
            command = [sys.executable, "-m", "suites.calib.wide", what, str(source), str(stats), str(memory)]
            here = {"PYTHONPATH": ":".join(sys.path)}
            runs.append(
                (run(command, log=log, env=here, sample=turn == 0), json.loads(log.read_text().splitlines()[-1]))
            )
    made: dict[str, Any] = {"memory": memory, "tokens": found["collect"][0][1]["tokens"]}
    for what, runs in found.items():
        made[what] = _summed([answer["seconds"] for _, answer in runs[1:]]) | {"own": runs[0][0].peak_private}
    return made


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return all rates, and whether they meet their bars."""
    workdir: Path = given.workdir / "rates"
    workdir.mkdir(parents=True, exist_ok=True)
    source = wide.written(workdir / f"wide-{wide.EXPERTS}", wide.EXPERTS)
    small = wide.written(workdir / f"wide-{wide.FEW}", wide.FEW)
    stats = wide.calibrated(source, workdir / "stats")
    found = {
        "codec_load": os.getloadavg()[0],
        "codecs": list(codecs()),
        "source": {"bytes": size(source), "experts": wide.EXPERTS, "weights": wide.weights(wide.EXPERTS)},
        "converts": list(conversions(workdir, source, stats)),
        "few": {"bytes": size(small), "experts": wide.FEW},
        "passes": passes(workdir, small, wide.MEMORY),
        "disk": machine.disk(workdir),
        "rounds": {"codec": ROUNDS, "whole": wide.ROUNDS},
    }
    return found | {"bars": list(bars(found)), "paper": wide.paper(found)}


def bars(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is promised, and what was measured."""
    rates = {row["method"]: row["median"] for row in found["codecs"] if row["threads"] == 2}
    for method, least in CODEC_BARS.items():
        yield _bar(
            f"`{method}` in memory, G weights/s, 2 threads", f"{least}", f"{rates[method]:.2f}", rates[method] >= least
        )
    seconds = {row["method"]: row["median"] for row in found["converts"]}
    ratio = seconds["mse"] / seconds["rtn"]
    yield _bar(
        "`convert --method mse` against `rtn`", f"within {CONVERT_BAR:g}x", f"{ratio:.2f}x", ratio <= CONVERT_BAR
    )
    for row in found["converts"]:
        yield _bar(f"`{row['method']}`: own memory", "< 1 GiB", f"{row['own'] / 2**20:.0f} MiB", row["own"] < GIB)
    times = found["passes"]
    ratio = times["collect"]["median"] / times["stream"]["median"]
    yield _bar("collecting against `stream_forward`", f"within {COLLECT_BAR}x", f"{ratio:.2f}x", ratio <= COLLECT_BAR)
    own, memory = times["collect"]["own"], times["memory"]
    yield _bar("collecting: own memory", f"`--memory`, {memory / 1e9:.1f} GB", f"{own / 1e9:.2f} GB", own <= memory)


def _bar(what: str, bar: str, measured: str, met: bool) -> dict[str, Any]:  # noqa: FBT001
    return {"what": what, "bar": bar, "measured": measured, "met": met}
