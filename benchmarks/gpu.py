"""Find out, in the minutes for which a GPU is there, all that has been waiting for one, and write it down.

Example:
    python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --dry-run

It needs this repository and Python with torch, triton, transformers, numba, accelerate, peft, click, matplotlib,
hypothesis and pytest; it installs and fetches nothing. Stages follow each other, the most important first, each with
its own part of the time: identity, bits, numbers, tables, times, whole. After every step its result is on the disk, in
benchmarks/results/gpu-<name>/, and after every stage the page about all of it beside that, gpu-<name>.md. The GPU must
do nothing else.

--dry-run runs the same code on the CPU with tiny shapes, kernels interpreted, to prove that it works; it measures
nothing, and writes to bench-run/.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from suites.common import machine
from suites.gpu import page
from suites.gpu.running import supervise
from suites.gpu.running.record import Record
from suites.gpu.running.stages import STAGES, Setting, Stage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NAMES = tuple(stage.name for stage in STAGES)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=_minutes, default=page.MINUTES, help=f"for everything ({page.MINUTES:g})")
    parser.add_argument("--stages", type=_stages, default=NAMES, help="only these, such as bits,numbers; others stay")
    parser.add_argument("--name", type=_name, help="what the results are named after (the GPU)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results/gpu-<name>)")
    parser.add_argument("--work", type=Path, default=machine.ROOT / "bench-run", help="folder for the rest (bench-run)")
    parser.add_argument("--commit", default="", help="of this code, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="prove the script on the CPU")
    parser.add_argument("--render", action="store_true", help="measure nothing: only write the page anew")
    parser.add_argument("--stage", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not (given.stage or given.render or given.dry_run or _gpu()):
        parser.error("no GPU is here; --dry-run proves the script without one")
    if not given.out:
        name = given.name or ("dry-run" if given.dry_run else re.sub(r"[^a-z0-9]+", "-", _gpu().lower()).strip("-"))
        if not name:
            parser.error("--render: say which results, with --name or --out")
        given.out = (machine.ROOT / "bench-run" if given.dry_run else RESULTS) / f"gpu-{name}"
    given.out, given.work = given.out.resolve(), given.work.resolve()
    for folder in (given.out, given.work):
        if folder.exists() and not folder.is_dir():
            parser.error(f"{folder} is no folder")
    if given.render and not any((given.out / f"{name}.json").exists() for name in NAMES):
        parser.error(f"{given.out} has no results")
    return given


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _stages(text: str) -> tuple[str, ...]:
    found = text.split(",")
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown stage `{unknown[0]}`: expected some of {','.join(NAMES)}")
    return tuple(name for name in NAMES if name in found)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, `.`, `_` and `-`, found `{text}`")
    return text


def _gpu() -> str:
    """Return the GPU's name, or nothing where there is none; torch is loaded only if nvidia-smi cannot say."""
    names = [line.split(",")[0] for line in machine.graphics()]
    if not names:
        import torch

        names = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return names[0] if names else ""


def measure(given: argparse.Namespace) -> None:
    """Run the stages in processes that find k2quant by a link alone, as if it were installed."""
    given.work.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=given.work, ignore_cleanup_errors=True) as work:
        packages = Path(work) / "packages"
        packages.mkdir()
        (packages / "k2quant").symlink_to(machine.ROOT / "k2quant")
        paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        _take_tables(given.out, Path(work) / "caches" / "k2quant" / "tables")
        # Tables that a user tuned would be taken before those that are shipped.
        os.environ["XDG_CACHE_HOME"] = str(Path(work) / "caches")
        if given.dry_run:
            os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}

        def command(stage: Stage, until: float, resume: bool) -> list[str]:  # noqa: FBT001 - as `supervise` calls it
            words = [sys.executable, str(HERE / "gpu.py"), "--stage", stage.name, "--until", str(until)]
            words += ["--out", str(given.out), "--work", work, "--commit", commit]
            words += ["--minutes", f"{given.minutes:g}"]
            return words + ["--dry-run"] * given.dry_run + ["--resume"] * resume

        commit = given.commit or machine.git("describe", "--always", "--dirty") or "unknown"
        chosen = [stage for stage in STAGES if stage.name in given.stages]
        seconds = 60 * given.minutes
        supervise.run(chosen, given.out, command, seconds=seconds, after=lambda: page.write(given.out))


def _take_tables(out: Path, folder: Path) -> None:
    """Have the stages use the table that an earlier run tuned, if it stands among the results."""
    folder.mkdir(parents=True)
    for file in (file for file in out.glob("*.json") if file.stem not in NAMES):
        (folder / file.name).write_bytes(file.read_bytes())


def work(given: argparse.Namespace) -> None:
    """Do one stage, in its own process."""
    supervise.end_with_parent()
    setting = Setting(dry_run=given.dry_run, out=given.out, work=given.work, until=given.until)
    if given.dry_run:
        from suites.gpu.running import rehearsal

        rehearsal.begin()
    record = Record(given.out / f"{given.stage}.json", until=given.until, resume=given.resume)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    record.save(dry_run=given.dry_run, commit=given.commit, date=today, minutes=given.minutes)
    importlib.import_module(f"suites.gpu.{given.stage}").run(record, setting)
    record.finish()


def main() -> None:
    """Measure and write the page."""
    given = parse()
    if given.stage:
        work(given)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whatever was begun is cleared away
    stopped = False
    try:
        if not given.render:
            measure(given)
    except KeyboardInterrupt:
        stopped = True
    page.write(given.out)
    print(page.file_of(given.out))
    if stopped:
        sys.exit(130)


if __name__ == "__main__":
    main()
