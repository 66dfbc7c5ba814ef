r"""Measure what a Ray cluster of two nodes of one core each costs beside a pool of two threads.

Example:
    PYTHONPATH=benchmarks python -m suites.conversion.machines.overhead --workdir /dev/shm/machines

Both convert the same slice of K2's shapes, FP8 to INT4, in memory (tmpfs), in turns, each in a fresh process. Seconds
of the pool are those of the call of `convert`; of the cluster those from the mean of the moments at which its two
workers began to the end of the call, so that the start of Ray and of its workers counts in neither.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from suites.common import machine

EXPERTS, ABREAST = 68, 6
"""Experts of the slice, and of each of its shards: twelve shards, 3.0 GB."""
BAR = 0.15
STORE = 80_000_000
RESULTS = machine.ROOT / "benchmarks" / "results"
CODE = ("k2quant", "kernels", "benchmarks/suites/conversion/machines")
TEXT = """\
A slice of K2's shapes, {read:.2f} GB of FP8 in {shards} shards, to INT4 ({written:.2f} GB), in memory (tmpfs), {runs}
runs in turns. The nodes are processes of the same machine. The machine did other work meanwhile (load below); both had
a raised priority. Work is what counts against the bar: the start of Ray and of its workers is taken off. The call has
it, with the planning of the driver."""
RUN = """
import json, logging, resource, sys, time
from k2quant.conversion.convert import convert
begun = []
class Heard(logging.Handler):
    def emit(self, record):
        if " works with " in record.getMessage():
            begun.append(time.perf_counter())
log = logging.getLogger("k2quant.conversion.spreading.cluster")
log.setLevel("INFO"); log.addHandler(Heard())
source, there, cluster, workers = sys.argv[1:]
start = time.perf_counter()
convert(source, there, "int4", cluster=cluster or None, workers=int(workers))
end = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"call_s": end - start, "began_s": [each - start for each in begun],
    "cpu_s": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}))
"""


def raised(pids: list[int]) -> None:
    """Raise the priority of processes, and of the groups that the kernel made of their sessions."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, -10)
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text("-10")


def processes() -> dict[int, tuple[int, bytes]]:
    """Return each process's parent and command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            found[int(folder.name)] = int(fields[1]), (folder / "cmdline").read_bytes()
    return found


def descendants() -> dict[int, bytes]:
    """Return all processes below this one, with their commands."""
    every, found = processes(), {}
    below = {os.getpid()}
    while more := {pid for pid, (parent, _) in every.items() if parent in below and pid not in below}:
        below |= more
    for pid in below:
        found[pid] = every.get(pid, (0, b""))[1]
    return found


class Watch(threading.Thread):
    """Raises the priority of what runs here, and notes the memory of the workers."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peaks: dict[int, int] = {}

    def run(self) -> None:
        """Look five times a second."""
        while not self.done.wait(0.2):
            found = descendants()
            raised(list(found))
            for pid in (pid for pid, command in found.items() if command.startswith(b"ray::") and b"Seat" in command):
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    size = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
                    self.peaks[pid] = max(self.peaks.get(pid, 0), size * 1024)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[str]:
    """Start a cluster of nodes of one core; give its address."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def converted(source: Path | str, there: Path, cluster: str, workers: int) -> dict[str, Any]:
    """Convert once, in a process of its own; return what it says, and the load."""
    shutil.rmtree(there, ignore_errors=True)
    watch = Watch()
    watch.start()
    load = os.getloadavg()[0]
    command = [sys.executable, "-c", RUN, str(source), str(there), cluster, str(workers)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    watch.done.set()
    watch.join()
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    began = sum(found["began_s"]) / len(found["began_s"]) if found["began_s"] else 0.0
    return found | {"work_s": found["call_s"] - began, "load": load, "worker_peaks": sorted(watch.peaks.values())}


def measured(workdir: Path, rounds: int) -> dict[str, Any]:
    """Return the runs of both, in turns."""
    source = workdir / "slice" / "fp8"
    if not source.exists():
        script = machine.ROOT / "benchmarks" / "suites" / "conversion" / "sources.py"
        subprocess.run(
            [sys.executable, str(script), str(workdir / "slice"), str(EXPERTS), str(ABREAST), "fp8"], check=True
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    runs: dict[str, list[dict[str, Any]]] = {"pool": [], "cluster": []}
    with nodes(2) as address:
        os.environ["RAY_ADDRESS"] = address
        converted(source, workdir / "out", "", 2)  # compiles codecs, fills caches
        for _ in range(rounds):
            runs["pool"].append(converted(source, workdir / "out", "", 2))
            runs["cluster"].append(converted(source, workdir / "out", "auto", 1))
            print({name: round(every[-1]["work_s"], 2) for name, every in runs.items()}, flush=True)
    report = json.loads((workdir / "out" / "k2quant_report.json").read_bytes())
    sizes = {"read": report["bytes_read"], "written": report["bytes_written"]}
    shards = [path.stat().st_size for path in sorted(source.glob("*.safetensors"))]
    shutil.rmtree(workdir / "out")
    return {"runs": runs, "bytes": sizes, "shards": shards, "experts": EXPERTS}


def overhead(found: dict[str, Any]) -> float:
    """Return by how much of the pool's time the cluster's is longer, by medians."""
    pool, cluster = (median(run["work_s"] for run in found["runs"][name]) for name in ("pool", "cluster"))
    return float(cluster / pool - 1)


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    rows = []
    for name, who in (("pool", "pool of two threads"), ("cluster", "two nodes of one core")):
        runs = found["runs"][name]
        work, call = ([run[key] for run in runs] for key in ("work_s", "call_s"))
        peak = max(max(run["worker_peaks"], default=run["peak"]) for run in runs) / 2**20
        spread = f"{median(work):.2f} ({min(work):.2f}-{max(work):.2f})"
        loads = [run["load"] for run in runs]
        rows.append(f"| {who} | {spread} | {median(call):.2f} | {peak:.0f} | {min(loads):.1f}-{max(loads):.1f} |")
    lost = overhead(found)
    box, versions = found["cpu"], ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    verdict = "met" if lost <= BAR else "**missed**"
    sizes = found["bytes"]
    return "\n".join(
        [
            "# What a cluster costs beside one machine",
            "",
            "Written by `benchmarks/suites/conversion/machines/overhead.py`; do not edit.",
            "",
            f"{box}, {found['cores']} cores; {versions}; commit {found['commit']}. `{found['command']}`",
            "",
            TEXT.format(
                read=sizes["read"] / 1e9,
                written=sizes["written"] / 1e9,
                shards=len(found["shards"]),
                runs=len(found["runs"]["pool"]),
            ),
            "",
            "| who | work s, median (range) | whole call s | memory MiB, the largest process | load before |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Overhead {lost:+.1%}, at most {BAR:.0%} asked for: {verdict}.",
            "",
        ]
    )


def main() -> int:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder on a tmpfs with 5 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="only draw the page anew")
    given = parser.parse_args()
    if given.page:
        found = json.loads((RESULTS / "machines-overhead.json").read_bytes())
        (RESULTS / "machines-overhead.md").write_text(page(found))
        return 0
    raised([os.getpid()])
    given.workdir.mkdir(parents=True, exist_ok=True)
    module = "suites.conversion.machines.overhead"
    command = f"PYTHONPATH=benchmarks python -m {module} --workdir {given.workdir} --rounds {given.rounds}"
    begun = time.time()
    found = machine.facts(command, *CODE) | measured(given.workdir, given.rounds)
    found |= {"minutes": (time.time() - begun) / 60}
    (RESULTS / "machines-overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "machines-overhead.md").write_text(page(found))
    return 0 if overhead(found) <= BAR else 3


if __name__ == "__main__":
    sys.exit(main())
