"""Time whole models, k2quant's against transformers': loading, memory, tokens a second, in BF16, FP8 and INT4.

Example:
    python benchmarks/model.py --nano nano-k2

Two models: nano-K2, which `k2quant nano` trains (now, if none is given), and one layer of K2 in full size with fewer
experts. Both tools get the same bytes. Writes benchmarks/results/model-cpu.json after every process, and at the end a
page (.md) beside it. The machine must do nothing else. Checkpoints stay in the folder for work, 14 GB, 8 GB more while
they are made, and a later run finds them there; half of a run's memory is the page cache's.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
EXPERTS, QUICK_EXPERTS = 80, 16
"""Routed experts of the layer; 80 take 7 GB in BF16."""
REPETITIONS, QUICK_REPETITIONS = 2, 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", type=Path, help="BF16 checkpoint that `k2quant nano` wrote (one is made)")
    parser.add_argument("--experts", type=int, help=f"routed experts of the layer ({EXPERTS})")
    parser.add_argument("--repetitions", type=int, help=f"processes of each contestant ({REPETITIONS})")
    parser.add_argument("--only", default="", help="only what begins so, such as layer/int4/k2quant")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, one run: to see that everything works")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-run", help="folder for checkpoints (bench-run)")
    parser.add_argument("--out", type=Path, help="file for the results (benchmarks/results/model-cpu.json)")
    parser.add_argument("--render", action="store_true", help="measure nothing: only write the page anew")
    given = parser.parse_args(arguments)
    given.work = given.work.resolve()
    given.out = (given.out or (given.work if given.quick else RESULTS) / "model-cpu.json").resolve()
    given.experts = given.experts or (QUICK_EXPERTS if given.quick else EXPERTS)
    given.repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    return given


def command(given: argparse.Namespace) -> str:
    """Return the command that repeats this run; where files lie does not matter to it."""
    words = ["python", "benchmarks/model.py"] + ["--quick"] * given.quick
    words += ["--nano", given.nano.name] if given.nano else []
    words += ["--experts", str(given.experts)] if given.experts not in {EXPERTS, QUICK_EXPERTS} else []
    usual = QUICK_REPETITIONS if given.quick else REPETITIONS
    words += ["--repetitions", str(given.repetitions)] if given.repetitions != usual else []
    words += ["--only", given.only] if given.only else []
    return shlex.join(words)


def measure(given: argparse.Namespace) -> None:
    """Make the checkpoints and measure."""
    from suites.models import run as model_run
    from suites.models import sources as model_sources

    given.work.mkdir(parents=True, exist_ok=True)
    quick = model_run.Workload(prefill=64, new_tokens=4, samples=1, seconds=1.0) if given.quick else None
    models = []
    if given.only.partition("/")[0] in {"", "nano"}:
        nano = model_sources.nano(given.work, given.nano and given.nano.resolve())
        models.append((nano, quick or model_run.Workload(new_tokens=64, seconds=2.0)))
    if given.only.partition("/")[0] in {"", "layer"}:
        layer = model_sources.layer(given.work, given.experts, tiny=given.quick)
        models.append((layer, quick or model_run.Workload(new_tokens=12, seconds=3.0)))
    model_run.Bench(given.out, given.work, command(given), given.only).run(models, given.repetitions)


def main() -> None:
    """Measure and render."""
    from suites.models import report as model_report

    given = parse()
    if not given.render:
        measure(given)
    model_report.write(given.out)


if __name__ == "__main__":
    main()
