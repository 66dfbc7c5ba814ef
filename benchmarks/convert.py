r"""Time `k2quant convert` against its peers and against the disk, and write `benchmarks/README.md`.

Example:
    python benchmarks/convert.py --workdir /data/bench --ram-workdir /dev/shm/bench \
        --peers-python /envs/peers/bin/python --json benchmarks/results/convert.json

The peers live in an environment of their own: torch 2.13.0 (CPU), compressed-tensors 0.20.0, transformers 5.23.0,
accelerate, datasets, requests, and llmcompressor 0.14.0.1, the last with --no-deps. Its Python also writes the slices.
A whole run needs 30 GB in the workdir, 12 GB in the memory workdir and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suites.common import machine, measure
from suites.conversion.bars import PEERS
from suites.conversion.projection import WEIGHTS, project, scaled
from suites.conversion.render import render

HERE = Path(__file__).resolve().parent
SUITE = HERE / "suites" / "conversion"
ROOT = HERE.parent
PAGE = HERE / "README.md"
PEER_OF = {task: "compressed-tensors" if task.endswith("bf16") else "llm-compressor" for task in PEERS}
IMPORT_K2QUANT = "import k2quant.convert, k2quant.kernels.codecs.cpu"
"""What `k2quant convert` imports before it works."""
IMPORTS, HELPS = 5, 10
"""Runs of the short commands."""
TRIAL_THREADS = (1, 2)
EXPERT_WEIGHTS, OTHER_WEIGHTS = 3 * 2048 * 7168, (576 + 384) * 7168
SECTIONS = ("start", "peers", "cat", "memory", "codecs")
MEDIA = ("tmpfs", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asked for."""

    workdir: Path
    """Folder on the disk that is measured; emptied of what this benchmark puts there."""
    ram_workdir: Path
    """Folder on a tmpfs."""
    peers_python: str
    """Python of the peers' environment."""
    k2quant: list[str]
    """The command under test."""
    workers: int | None
    """Passed to k2quant; None: its own default."""
    experts: int
    """In the slice that the peers convert on the disk."""
    ram_experts: int
    """In the slice that the peers convert in memory, which must hold source and both outputs."""
    disk_experts: int
    """In the slice that is held against `cat`; the single large shard has twice as many."""
    runs: int
    """Of each tool and task."""
    media: list[str]
    """Where the peers are met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A few experts of layer 1, written by `sources.py`, one folder for each format."""

    folder: Path
    experts: int
    per_shard: int
    formats: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return self.experts * EXPERT_WEIGHTS + OTHER_WEIGHTS

    def source(self, task: str) -> Path:
        """Return the folder that a task reads."""
        return self.folder / task.partition("-")[0]

    def write(self, python: str) -> None:
        """Write it, unless the same slice stands there already."""
        stamp = self.folder.with_suffix(".json")
        wanted = json.dumps([self.experts, self.per_shard, self.formats])
        if stamp.exists() and stamp.read_text() == wanted:
            return
        measure.remove(self.folder)
        arguments = [str(self.folder), str(self.experts), str(self.per_shard), *self.formats]
        subprocess.run([python, str(SUITE / "sources.py"), *arguments], check=True)
        stamp.write_text(wanted)
        os.sync()

    def record(self) -> dict[str, Any]:
        """Describe it for JSON."""
        sizes = {form: measure.size(self.folder / form) for form in self.formats}
        count = -(-self.experts // self.per_shard)
        return {"experts": self.experts, "shards": count, "weights": self.weights, "bytes": sizes}


class Bench:
    """The tools and slices of one run; each section adds its results and saves them."""

    def __init__(self, settings: Settings, file: Path) -> None:
        """Take up the results that stand in `file`, so that sections can be measured one at a time."""
        self.settings, self.file = settings, file
        self.log = settings.workdir / "log.txt"
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.results |= machine.describe(settings.workdir, settings.k2quant[0], settings.peers_python)
        self.results["settings"] = {"runs": settings.runs, "workers": settings.workers}
        self.results["command"] = shlex.join(["python", "benchmarks/convert.py", *sys.argv[1:]])

    def save(self, **sections: Any) -> None:
        """Add results and write them all."""
        self.results |= sections
        self.results["date"] = dt.datetime.now(dt.UTC).date().isoformat()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")

    def slice(self, name: str, folder: Path, experts: int, per_shard: int, *formats: str) -> Slice:
        """Write a slice and note what it holds."""
        made = Slice(folder=folder / name, experts=experts, per_shard=per_shard, formats=formats)
        made.write(self.settings.peers_python)
        self.results.setdefault("slices", {})[name] = made.record()
        return made

    def peers_slice(self, medium: str, folder: Path) -> Slice:
        """Write a slice for the peers in three formats: larger in memory than on the disk, where its speed rules."""
        experts = self.settings.ram_experts if medium == "tmpfs" else self.settings.experts
        return self.slice(f"peers-{medium}", folder, experts, -(-experts // 4), "bf16", "fp8", "int4")

    def disk_slice(self) -> Slice:
        """Write the slice for the disk: shards of 1 GB."""
        return self.slice("disk", self.settings.workdir, self.settings.disk_experts, 23, "fp8")

    def k2quant(
        self, task: str, made: Slice, out: Path, *, sample: bool = False, env: dict[str, str] | None = None
    ) -> measure.Run:
        """Convert a slice with k2quant."""
        target = task.partition("-")[2]
        workers = ["--workers", str(self.settings.workers)] if self.settings.workers else []
        paths = [str(made.source(task)), str(out)]
        command = [*self.settings.k2quant, "convert", "--to", target, *workers, *paths]
        return measure.run(command, log=self.log, cwd=ROOT, env=env, sample=sample)

    def import_k2quant(self) -> dict[str, Any]:
        """Only import what a conversion needs."""
        return measure.run([self.settings.k2quant[0], "-c", IMPORT_K2QUANT], log=self.log, cwd=ROOT).record()

    def peer(self, task: str, threads: int, *paths: Path) -> measure.Run:
        """Convert a slice with the peer for this task; without paths, only import the peer."""
        command = [self.settings.peers_python, str(SUITE / "peers" / "run_peer.py"), task, *map(str, paths)]
        env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        return measure.run(command, log=self.log, env=env)

    def tiny(self) -> Slice:
        """Write one expert in every format."""
        return self.slice("tiny", self.settings.ram_workdir, 1, 1, "bf16", "fp8", "int4")

    def compile(self) -> None:
        """Let k2quant compile and keep its codecs, so that no timed run does."""
        tiny, out = self.tiny(), self.settings.ram_workdir / "out"
        for task in PEERS:
            self.k2quant(task, tiny, out)
            measure.remove(out)

    def start(self) -> None:
        """Measure `--help`, the imports, and a first run, which compiles."""
        tiny, out = self.tiny(), self.settings.ram_workdir / "out"
        with tempfile.TemporaryDirectory() as cache:
            first = self.k2quant("fp8-int4", tiny, out, env={"NUMBA_CACHE_DIR": cache})
        measure.remove(out)
        imports: dict[str, list[dict[str, Any]]] = {tool: [] for tool in ("k2quant", *sorted(set(PEER_OF.values())))}
        for _ in range(IMPORTS):
            imports["k2quant"].append(self.import_k2quant())
            imports["llm-compressor"].append(self.peer("fp8-int4", 1).record())
            imports["compressed-tensors"].append(self.peer("fp8-bf16", 1).record())
        command = [*self.settings.k2quant, "--help"]
        helps = [measure.run(command, log=self.log, cwd=ROOT).record() for _ in range(HELPS)]
        self.save(imports=imports, help=helps, first_run=first.record())

    def peers(self) -> None:
        """Take turns with the peers, in memory and on the disk."""
        rows = [row for row in self.results.get("peers", []) if row["medium"] not in self.settings.media]
        threads = self.results.get("trial") or {task: self.trial(task) for task in PEERS}
        self.save(trial=threads)
        folders = {"tmpfs": self.settings.ram_workdir, "disk": self.settings.workdir}
        for medium, folder in ((medium, folders[medium]) for medium in self.settings.media):
            made = self.peers_slice(medium, folder)
            for task in PEERS:
                rows.append(self.versus(task, medium, made, threads[task]))
                print(f"{medium} {task}: {PEER_OF[task]} with {rows[-1]['threads']} threads")
                self.save(peers=rows)

    def few(self) -> Slice:
        """Write four experts in every format."""
        return self.slice("trial", self.settings.ram_workdir, 4, 2, "bf16", "fp8", "int4")

    def trial(self, task: str) -> int:
        """Return the number of threads with which a peer is faster, from one run each on a few experts."""
        made = self.few()
        out = made.folder.parent / "out"
        seconds = {}
        for threads in TRIAL_THREADS:
            seconds[threads] = self.peer(task, threads, made.source(task), out).wall_s
            measure.remove(out)
        return min(seconds, key=seconds.__getitem__)

    def versus(self, task: str, medium: str, made: Slice, threads: int) -> dict[str, Any]:
        """Let a peer and k2quant convert a slice in turn; compare what they wrote once."""
        source, out = made.source(task), made.folder.parent / "out"
        theirs, ours = out / "peer", out / "k2quant"
        row: dict[str, Any] = {"task": task, "medium": medium, "peer": PEER_OF[task], "threads": threads}
        row |= {"peer_runs": [], "k2quant_runs": []}
        for _ in range(self.settings.runs):
            out.mkdir()
            measure.warm(source)
            measure.flush()
            done = self.peer(task, threads, source, theirs)
            row["peer_runs"].append(done.record() | {"flush_s": measure.flush()})
            row["peer_bytes"] = measure.size(theirs)
            measure.remove(theirs)  # or the tool that runs second would get the memory that nobody has touched yet
            measure.warm(source)
            done = self.k2quant(task, made, ours)
            row["k2quant_runs"].append(done.record() | {"flush_s": measure.flush()})
            row["k2quant_bytes"] = measure.size(ours)
            measure.remove(out)
        if medium == "tmpfs":
            row["check"] = self.check(task, threads)
        return row

    def check(self, task: str, threads: int) -> Any:
        """Let both convert a few experts; hold the outputs against the weights and against each other."""
        made, out = self.few(), self.settings.ram_workdir / "out"
        out.mkdir()
        self.peer(task, threads, made.source(task), out / "peer")
        self.k2quant(task, made, out / "k2quant")
        folders = map(str, (made.folder / "bf16", out / "k2quant", out / "peer"))
        command = [self.settings.peers_python, str(SUITE / "check.py"), *folders]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        measure.remove(out)
        return found

    def cat(self) -> None:
        """Hold conversions against reading and writing the same bytes on the same disk, in turn."""
        made = self.disk_slice()
        source, out = made.folder / "fp8", self.settings.workdir / "out"
        command = [measure.CAT, *map(str, measure.shards(source))]
        measure.cool(source)
        cold = measure.run(command, log=Path(os.devnull)).wall_s
        rows: list[dict[str, Any]] = [{"task": task, "weights": made.weights} for task in ("fp8-int4", "fp8-bf16")]
        for row in rows * self.settings.runs:
            measure.warm(source)
            measure.flush()
            cat = measure.run(command, log=Path(os.devnull)).wall_s
            done = self.k2quant(row["task"], made, out).record()
            row["output_bytes"], files = measure.size(out), len(measure.shards(out))
            measure.remove(out)
            write = measure.write_bytes(out, row["output_bytes"], files)
            took = {"cat_s": cat, "write_s": write, "k2quant_runs": done, "k2quant_imports": self.import_k2quant()}
            for key, value in took.items():
                row.setdefault(key, []).append(value)
        self.save(cat=rows, cold_read_gbps=measure.size(source) / cold / 1e9)

    def memory(self) -> None:
        """Watch the memory of conversions from small shards and from one large shard."""
        out, rows = self.settings.workdir / "out", []
        experts = 2 * self.settings.disk_experts
        for made in (self.disk_slice(), self.slice("one-shard", self.settings.workdir, experts, experts, "fp8")):
            files = measure.shards(made.folder / "fp8")
            for task in ("fp8-int4", "fp8-bf16"):
                done = self.k2quant(task, made, out, sample=True)
                measure.remove(out)
                largest = max(file.stat().st_size for file in files)
                rows.append({"task": task, "shards": len(files), "shard_bytes": largest, "run": done.record()})
        measure.remove(made.folder)
        self.save(memory=rows)

    def codecs(self) -> None:
        """Let `codec_rates.py` measure the codecs in memory."""
        file = self.settings.workdir / "codecs.json"
        command = [self.settings.k2quant[0], str(SUITE / "codec_rates.py"), "--json", str(file)]
        measure.run(command, log=self.log, env={"PYTHONPATH": str(ROOT)})
        self.save(codecs=json.loads(file.read_text()))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="folder on the disk to measure")
    parser.add_argument("--ram-workdir", type=Path, help="folder on a tmpfs")
    parser.add_argument("--peers-python", help="Python of the peers' environment")
    parser.add_argument("--json", type=Path, help="file for the results; sections not measured now are kept in it")
    parser.add_argument(
        "--k2quant", default=f"{sys.executable} -m k2quant", help="command under test: a Python and its arguments"
    )
    parser.add_argument("--workers", type=int, help="passed to k2quant")
    parser.add_argument(
        "--experts", type=int, help="experts in the slice for the peers on the disk (16: 0.7 G weights)"
    )
    parser.add_argument(
        "--ram-experts", type=int, help="experts in the slice for the peers in memory (32: 1.4 G weights)"
    )
    parser.add_argument("--disk-experts", type=int, help="experts in the slice for cat (68: 3 GB of FP8)")
    parser.add_argument("--runs", type=int, help="runs of each tool and task (3)")
    parser.add_argument("--quick", action="store_true", help="tiny slices, one run: to see that everything works")
    parser.add_argument("--media", nargs="+", choices=MEDIA, default=MEDIA, help="meet the peers only there")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure only these")
    parser.add_argument("--disk-gbps", type=float, nargs="+", default=[2.0, 7.0], help="disks of the projection")
    parser.add_argument("--page", type=Path, help="page to write (benchmarks/README.md; beside the JSON if quick)")
    parser.add_argument("--render", type=Path, metavar="FILE.json", help="only write the page from these results")
    given = parser.parse_args()
    if not given.render and not all((given.workdir, given.ram_workdir, given.peers_python, given.json)):
        parser.error("--workdir, --ram-workdir, --peers-python and --json are needed, or --render")
    return given


def settings(given: argparse.Namespace) -> Settings:
    """Turn the command line into settings."""
    experts, ram_experts, disk_experts, runs = (2, 2, 4, 1) if given.quick else (16, 32, 68, 3)
    workdir, ram_workdir = given.workdir.resolve(), given.ram_workdir.resolve()
    for folder in (workdir, ram_workdir):
        folder.mkdir(parents=True, exist_ok=True)
        measure.remove(folder / "out")
    return Settings(
        workdir=workdir,
        ram_workdir=ram_workdir,
        peers_python=given.peers_python,
        k2quant=shlex.split(given.k2quant),
        workers=given.workers,
        experts=given.experts or experts,
        ram_experts=given.ram_experts or ram_experts,
        disk_experts=given.disk_experts or disk_experts,
        runs=given.runs or runs,
        media=given.media,
    )


def write_page(results: dict[str, Any], file: Path, page: Path) -> None:
    """Write the page, naming the results by their path in the repository; remarks on them lie beside them, as `.md`."""
    path = file.resolve()
    remarks = path.with_suffix(".md")
    text = remarks.read_text() if remarks.exists() else ""
    render(results, str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path), page, remarks=text)


def main() -> None:
    """Measure and render."""
    given = parse()
    if given.render:
        write_page(json.loads(given.render.read_text()), given.render, given.page or PAGE)
        return
    bench = Bench(settings(given), given.json)
    bench.compile()
    for section in SECTIONS:
        if section in given.sections:
            print(f"measuring: {section}", flush=True)
            getattr(bench, section)()
    rows = project(bench.results, given.disk_gbps)
    if rows:
        bench.save(projection={"weights": WEIGHTS, "rows": rows, "scaled_s": scaled(bench.results)})
    write_page(bench.results, given.json, given.page or (given.json.with_suffix(".md") if given.quick else PAGE))


if __name__ == "__main__":
    main()
