"""Whole commands that write FP4, in memory: k2quant's beside those of its peers, on the same bytes, in turns.

The slice is that of the conversions' benchmark (`suites.conversion.sources`): routed experts of K2's shapes and what
lies beside them. What both wrote is compared tensor by tensor, by name and byte.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from suites.common import machine, measure

WORKER = Path(__file__).with_name("run_peer.py")
SOURCES = machine.ROOT / "benchmarks" / "suites" / "conversion" / "sources.py"
BAR = 15.0
"""How many times faster a whole command has to be."""
SHARDS = 4


class Task(NamedTuple):
    """One conversion, and who does it besides k2quant."""

    source: str
    target: str
    layout: str
    peer: str
    method: str | None = None
    """k2quant's, where it is not the default."""

    @property
    def name(self) -> str:
        """As the command line and the results have it."""
        asked = f"-{self.method}" if self.method else ""
        return f"{self.source}-{self.target}-{self.peer}{asked}"


TASKS = {
    task.name: task
    for task in (
        Task("bf16", "nvfp4", "compressed-tensors", "llm-compressor"),
        Task("fp8", "nvfp4", "compressed-tensors", "llm-compressor"),
        Task("int4", "nvfp4", "compressed-tensors", "llm-compressor"),
        Task("int4", "nvfp4", "compressed-tensors", "llm-compressor", "rtn"),
        Task("bf16", "mxfp4", "compressed-tensors", "llm-compressor"),
        Task("bf16", "nvfp4", "modelopt", "modelopt"),
    )
}
"""INT4 -> NVFP4 is k2quant's default there, a search, against the peer's rounding: bytes are not compared."""
SEARCHED = ("int4",)


class Bench:
    """The folders and environments of one run."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Write the slices that are not there yet."""
        self.given = given
        self.folder: Path = given.ram_workdir / f"fp4-{given.experts}"
        self.log: Path = given.workdir / "peers.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def slice(self, form: str) -> Path:
        """Return the slice in one format."""
        folder = self.folder / form
        if not (folder / "config.json").exists():
            measure.remove(folder)
            count = self.given.experts
            arguments = [str(self.folder), str(count), str(-(-count // SHARDS)), form]
            subprocess.run([sys.executable, str(SOURCES), *arguments], check=True)
        return folder

    def ours(self, task: Task, *, sample: bool = False) -> measure.Run:
        """Convert with k2quant."""
        out = self.folder / "ours"
        measure.remove(out)
        command = [sys.executable, "-m", "k2quant", "convert", "-q", "--to", task.target]
        command += ["--layout", task.layout] if task.target == "nvfp4" else []
        command += ["--method", task.method] if task.method else []
        paths = [str(self.slice(task.source)), str(out)]
        return measure.run([*command, *paths], log=self.log, cwd=machine.ROOT, sample=sample)

    def theirs(self, task: Task, *, sample: bool = False) -> measure.Run:
        """Convert with the peer."""
        out = self.folder / "theirs"
        measure.remove(out)
        command = [self.python(task), str(WORKER), task.peer, f"{task.source}-{task.target}"]
        env = {"OMP_NUM_THREADS": str(self.given.threads), "HF_HUB_OFFLINE": "1"}
        return measure.run([*command, str(self.slice(task.source)), str(out)], log=self.log, env=env, sample=sample)

    def python(self, task: Task) -> str:
        """Return the Python of a peer."""
        found: str | None = self.given.modelopt_python if task.peer == "modelopt" else self.given.peers_python
        if found is None:
            raise SystemExit(f"{task.name} needs the Python of {task.peer}")
        return found

    def row(self, task: Task) -> dict[str, Any]:
        """Take turns, then compare what both wrote, then watch each one's memory in a run of its own."""
        print(f"fp4, peers: {task.name}", file=sys.stderr, flush=True)
        measure.warm(self.slice(task.source))
        self.ours(task)  # compiles
        runs: dict[str, list[measure.Run]] = {"ours": [], "theirs": []}
        for _ in range(self.given.runs):
            runs["ours"].append(self.ours(task))
            runs["theirs"].append(self.theirs(task))
        searched = task.source in SEARCHED and task.method is None
        same = {} if searched else compared(self.folder / "ours", self.folder / "theirs")
        watched = {"ours": self.ours(task, sample=True), "theirs": self.theirs(task, sample=True)}
        for name in ("ours", "theirs"):
            measure.remove(self.folder / name)
        wanted = ["torch", "llmcompressor", "compressed-tensors", "nvidia-modelopt"]
        return {
            **task._asdict(),
            "experts": self.given.experts,
            "bytes": measure.size(self.slice(task.source)),
            "threads": self.given.threads,
            "load": os.getloadavg()[0],
            "versions": machine.versions(self.python(task), wanted),
            "same": same,
            **{who: figures(found, watched[who]) for who, found in runs.items()},
            "times": times(runs),
        }


def figures(runs: Sequence[measure.Run], watched: measure.Run) -> dict[str, Any]:
    """Return seconds and bytes of one contestant."""
    walls = [run.wall_s for run in runs]
    return {
        "median": statistics.median(walls),
        "least": min(walls),
        "most": max(walls),
        "cpu": statistics.median(run.cpu_s for run in runs),
        "own": watched.peak_private,
        "resident": watched.peak_rss,
    }


def times(runs: Mapping[str, Sequence[measure.Run]]) -> float:
    """Return how many times faster k2quant is, median over median."""
    ours, theirs = (statistics.median(run.wall_s for run in runs[who]) for who in ("ours", "theirs"))
    return theirs / ours


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare the tensors of two checkpoints by name, dtype, shape and bytes.

    Returns:
        By the last part of a tensor's name how many both have (`of`), how many are equal (`equal`) and how many are
        equal but for another tensor scale of their weight (`apart`: their bytes follow from it); the names that only
        one has, at most three of each.
    """
    left, right = open_checkpoint(ours), open_checkpoint(theirs)
    parts: dict[str, Counter[str]] = {}
    for name in left.tensors.keys() & right.tensors.keys():
        found = parts.setdefault(name.rpartition(".")[2], Counter())
        found["of"] += 1
        if content(left, name) == content(right, name):
            found["equal"] += 1
        elif scale_of(left, name) != scale_of(right, name):
            found["apart"] += 1
    return {
        "parts": {suffix: dict(found) for suffix, found in sorted(parts.items())},
        "only ours": sorted(left.tensors.keys() - right.tensors.keys())[:3],
        "only theirs": sorted(right.tensors.keys() - left.tensors.keys())[:3],
    }


def content(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes of a tensor."""
    entry = checkpoint.tensors[name]
    return entry.dtype, entry.shape, bytes(read_tensor(checkpoint, entry))


def scale_of(checkpoint: Checkpoint, name: str) -> float | None:
    """Return the tensor scale of the weight that a tensor belongs to."""
    base = name.rpartition(".")[0]
    for suffix in ("weight_scale_2", "weight_global_scale"):
        if (entry := checkpoint.tensors.get(f"{base}.{suffix}")) is not None:
            return float(np.frombuffer(read_tensor(checkpoint, entry), np.float32)[0])
    return None


def measure_all(given: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of the tasks that were asked for, and those of the others as they were."""
    bench = Bench(given)
    rows = {row["name"]: row for row in before.get("rows", [])}
    for name in given.task or TASKS:
        path = given.workdir / "peers" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name, **bench.row(TASKS[name])}))  # what is done is not lost to the next
        rows[name] = json.loads(path.read_text())
    return {"runs": given.runs, "rows": [rows[name] for name in TASKS if name in rows], "bars": bars(rows)}


def asked(row: Mapping[str, Any]) -> str:
    """Return the method of a row as text behind its formats, where it is not the default."""
    return f", {row['method']}," if row["method"] else ""


def bars(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what has to hold."""
    return [
        {
            "what": f"{row['source'].upper()} -> {row['target'].upper()}{asked(row)} against {row['peer']}, tmpfs",
            "bar": f"{BAR:.0f}x faster",
            "measured": f"{row['times']:.1f}x",
            "met": row["times"] >= BAR,
        }
        for row in rows.values()
    ]
