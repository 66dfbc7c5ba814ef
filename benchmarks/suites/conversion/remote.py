r"""Compare the two ways in which a source comes from a hub: ranges straight into memory, and whole shards by the disk.

Example:
    PYTHONPATH=benchmarks python -m suites.conversion.remote --workdir /dev/shm/remote

A hub of this machine serves 1.9 GB of FP8 in K2's shapes, over the loopback address, as fast as it can and at a rate;
each run converts it to INT4 in a fresh process, ways in turns. Where the disk is memory (tmpfs), whole shards are at
their best.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from suites.common import machine

SHARDS, EXPERTS = 8, 8
RATES = (0.0, 1e9, 2e8)
"""Bytes a second of the line; 0: as fast as it goes."""
WAYS = ("folder", "ranges", "shards")
RESULTS = machine.ROOT / "benchmarks" / "results"
CODE = ("k2quant", "kernels", "benchmarks/suites/conversion/remote.py")
TEXT = """\
{read:.2f} GB of FP8 in K2's shapes, {shards} shards, to INT4 ({written:.2f} GB). A hub of the same machine serves them
over the loopback address and shares its cores; source, stage and output lie in memory (tmpfs), where whole shards are
at their best: a disk would have to write and read each once more. Both ways prove each shard's sha256. `folder` is the
same conversion of a local folder. Ways in turns; medians (range) of {runs} runs. The machine did other work meanwhile
(load)."""
SERVE = """
import sys
from pathlib import Path
from served.hub import hub
with hub() as server:
    server.repo("org/name", Path(sys.argv[1]))
    server.link.rate = float(sys.argv[2])
    print(server.url, flush=True)
    sys.stdin.read()
"""
CONVERT = """
import json, resource, sys, time
from k2quant.checkpoint.supply import choosing, supply
from k2quant.conversion.convert import convert
source, there, way = sys.argv[1:]
if way == "shards":
    supply.way_of = lambda *_, **__: choosing.Choice("shards", 0)
begun = time.perf_counter()
done = convert(source, there, "int4", low_disk=way == "shards")
seconds = time.perf_counter() - begun
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
print(json.dumps({"s": seconds, "cpu_s": cpu, "peak": peak, **done.report.get("fetched", {})}))
"""


def write_source(folder: Path) -> None:
    """Write random FP8 in K2's shapes: each shard has the gate and down projections of some experts."""
    import numpy as np

    from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint

    random = np.random.default_rng(0)
    shards: dict[str, Shard] = {}
    for layer in range(SHARDS):
        shard: Shard = {}
        for expert in range(EXPERTS):
            for name, (rows, width) in {"gate_proj": (2048, 7168), "down_proj": (7168, 2048)}.items():
                base = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                codes = random.integers(0, 256, (rows, width), np.uint8)
                codes[codes & 0x7F == 0x7F] = 0  # no NaN
                shard[f"{base}.weight"] = ("F8_E4M3", codes)
                shard[f"{base}.weight_scale_inv"] = ("F32", random.random((rows // 128, width // 128), np.float32))
        shards[f"model-{layer + 1}-of-{SHARDS}.safetensors"] = shard
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})


def converted(workdir: Path, url: str, way: str) -> dict[str, Any]:
    """Convert once, in a process of its own."""
    for name in ("out", "home"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    source = str(workdir / "source") if way == "folder" else "hf://org/name"
    command = [sys.executable, "-c", CONVERT, source, str(workdir / "out"), way]
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(workdir / "home"), "HF_HUB_DISABLE_XET": "1"}
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"load": load}


def measured(workdir: Path, rounds: int) -> dict[str, Any]:
    """Return the runs of each way at each rate, in turns."""
    source = workdir / "source"
    if not source.exists():
        write_source(source)
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (machine.ROOT / "tests" / "shared", machine.ROOT)))}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for rate in RATES:
        command = [sys.executable, "-c", SERVE, str(source), str(rate)]
        with subprocess.Popen(command, env=shared, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            url = server.stdout.readline().strip() if server.stdout else ""
            found = runs.setdefault(f"{rate:.0f}", {way: [] for way in WAYS})
            converted(workdir, url, "folder")  # fills caches
            for _ in range(rounds):
                for way in WAYS:
                    found[way].append(converted(workdir, url, way))
                print({way: round(every[-1]["s"], 2) for way, every in found.items()}, flush=True)
            server.kill()
    report = json.loads((workdir / "out" / "k2quant_report.json").read_bytes())
    return {"runs": runs, "read": report["bytes_read"], "written": report["bytes_written"]}


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "# How a source comes from a hub: ranges into memory, or whole shards by the disk",
        "",
        "Written by `benchmarks/suites/conversion/remote.py`; do not edit.",
        "",
        f"{found['cpu']}, {found['cores']} cores; {versions}; commit {found['commit']}. `{found['command']}`",
        "",
        TEXT.format(
            read=found["read"] / 1e9,
            written=found["written"] / 1e9,
            shards=SHARDS,
            runs=len(next(iter(found["runs"].values()))["ranges"]),
        ),
        "",
        "| line | way | seconds | CPU s | memory MiB | came over the network | source on the disk at most | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rate, ways in found["runs"].items():
        line = f"{float(rate) / 1e6:,.0f} MB/s" if float(rate) else "not limited"
        for way, runs in ways.items():
            seconds, loads = [run["s"] for run in runs], [run["load"] for run in runs]
            traffic = f"{runs[0]['traffic'] / 1e9:.2f} GB" if "traffic" in runs[0] else "-"
            lies = {"folder": "all of it", "ranges": "nothing", "shards": "two shards"}[way]
            lines.append(
                f"| {line} | {way} | {median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
                f"| {median(run['cpu_s'] for run in runs):.1f} | {max(run['peak'] for run in runs) / 2**20:.0f} "
                f"| {traffic} | {lies} | {min(loads):.1f}-{max(loads):.1f} |"
            )
    return "\n".join([*lines, "", *verdicts(found), ""])


def verdicts(found: dict[str, Any]) -> list[str]:
    """Say which way was faster at each rate."""
    said = []
    for rate, ways in found["runs"].items():
        ranges, shards = (median(run["s"] for run in ways[way]) for way in ("ranges", "shards"))
        line = f"At {float(rate) / 1e6:,.0f} MB/s" if float(rate) else "Without a limit"
        said.append(f"- {line}, ranges take {ranges / shards:.2f} of the time of whole shards.")
    return said


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder on a tmpfs with 5 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="only draw the page anew")
    given = parser.parse_args()
    if given.page:
        found = json.loads((RESULTS / "remote-ways.json").read_bytes())
    else:
        given.workdir.mkdir(parents=True, exist_ok=True)
        module = "suites.conversion.remote"
        command = f"PYTHONPATH=benchmarks python -m {module} --workdir {given.workdir} --rounds {given.rounds}"
        found = machine.facts(command, *CODE) | measured(given.workdir, given.rounds)
        (RESULTS / "remote-ways.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "remote-ways.md").write_text(page(found))


if __name__ == "__main__":
    main()
