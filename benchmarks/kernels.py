"""Time the kernels against what torch and others offer on this machine, errors beside the times, and write it down.

Example:
    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cuda

Writes benchmarks/results/kernels-cpu.json (or -cuda.json) after every cell, and at the end a page (.md) and a plot
(.svg) beside it, and the link to it in benchmarks/README.md. The machine must do nothing else. It stops when the time
is over, the most important cells first; --resume goes on from there. The cells are measured in a process of their own,
so that a library that ends it, or leaves the GPU unusable, costs only its own cell.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from suites.common import machine
from suites.products.results import Results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
MINUTES = 9.0
GRACE_SECONDS = 120
"""A cell that was begun in time may take so much longer; then it is stopped."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="only cells that goals are set for, and fewer samples")
    parser.add_argument("--full", action="store_true", help="odd numbers of rows too")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"when to stop ({MINUTES:g})")
    parser.add_argument("--only", default="", help="only cells whose name contains this, such as int4/gate")
    parser.add_argument("--out", type=Path, help="file for the results (benchmarks/results/kernels-<device>.json)")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, measure what is missing")
    parser.add_argument("--render", action="store_true", help="measure nothing: only write page and plot anew")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    folder = ROOT / "bench-run" if given.quick else RESULTS
    given.out = (given.out or folder / f"kernels-{given.device}.json").resolve()
    return given


def work(given: argparse.Namespace) -> None:
    """Measure, in the worker's process."""
    import torch

    from suites.products import cases as kernel_cases
    from suites.products import run as kernel_run

    seconds = (1.0 if given.quick else 5.0) if given.device == "cpu" else 1.0
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA; use --device cpu")
    settings = kernel_run.Settings(
        device=given.device,
        seconds=seconds,
        samples=20 if given.quick else 50,
        warm_up_seconds=0.05 if given.quick else 0.2,
        rotate_bytes=kernel_run.rotate_bytes(given.device),
    )
    cells = kernel_cases.cells(given.device, quick=given.quick, full=given.full)
    chosen = [cell for cell in cells if given.only in cell.key]
    if not chosen:
        raise SystemExit(f"--only {given.only}: no cell has this in its name, such as {cells[0].key}")
    results = Results.open(given.out, resume=given.resume)
    if "machine" not in results.data:
        results.save(**kernel_run.describe(settings), command=command(given))
    timer = (kernel_run.cpu_timer if given.device == "cpu" else kernel_run.cuda_timer)(settings)
    with torch.inference_mode():
        kernel_run.run(chosen, results, settings, timer, until=given.until)
    if given.device == "cuda":
        results.data["machine"]["nvidia_smi"]["after"] = machine.graphics()
        results.save()


def command(given: argparse.Namespace) -> str:
    """Return the command that repeats this run."""
    words = ["python", "benchmarks/kernels.py", "--device", given.device]
    words += [f"--{name}" for name in ("quick", "full") if getattr(given, name)]
    words += ["--only", given.only] if given.only else []
    words += ["--minutes", f"{given.minutes:g}"] if given.minutes != MINUTES else []
    return shlex.join(words)


def supervise(given: argparse.Namespace) -> None:
    """Start workers until one comes to its end; what ends a worker is noted as the failure of whoever was at work."""
    until = time.time() + 60 * given.minutes
    Results.open(given.out, resume=True).running.unlink(missing_ok=True)
    resume = given.resume
    while True:
        words = [sys.executable, str(HERE / "kernels.py"), "--worker", "--until", str(until), "--device", given.device]
        words += ["--minutes", str(given.minutes)]
        words += ["--out", str(given.out), "--only", given.only]
        words += [f"--{name}" for name in ("quick", "full") if getattr(given, name)] + ["--resume"] * resume
        try:
            status = subprocess.run(words, check=False, timeout=until + GRACE_SECONDS - time.time()).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if status == 0:
            return
        if not Results.open(given.out, resume=True).blame(f"ended the process with {status}"):
            raise SystemExit(f"the measuring process ended with {status} before it measured anything")
        resume = True
        if time.time() > until:
            return


def render(file: Path) -> None:
    """Write page and plot, and the page of all benchmarks if the results are among the committed ones."""
    import convert
    from suites.products import report as kernel_report

    kernel_report.write(file)
    main_results = RESULTS / "convert.json"
    if file.parent == RESULTS and main_results.exists():
        convert.write_page(json.loads(main_results.read_text()), main_results, convert.PAGE)


def main() -> None:
    """Measure and render."""
    given = parse()
    if given.worker:
        work(given)
        return
    if not given.render:
        supervise(given)
    render(given.out)


if __name__ == "__main__":
    main()
