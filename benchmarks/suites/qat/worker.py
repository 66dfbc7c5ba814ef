"""Train and score one arm, in a process of its own: suites.qat.worker WORKDIR SEED KIND BITS.

Writes `WORKDIR/results/SEED-KIND-BITS.json`: the loss of every held-out item as the export has it and without rounding,
how many answers are right, and whether the exported checkpoint scores the same to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from k2quant.nano import tasks
from k2quant.nano.scoring import Score, score
from k2quant.qat import export, load, prepared
from k2quant.qat.exporting.export import load_run
from k2quant.qat.job import Job, job_from
from k2quant.qat.training.training import train
from suites.common import machine
from suites.qat import arms as qat_arms

EXAM = 100
"""Held-out items of each family and level: 1,800 in all, the same for every arm and seed."""


def main(workdir: Path, seed: int, kind: str, bits: int) -> None:
    """Run one arm."""
    torch.set_num_threads(1)
    name = f"{seed}-{kind}-{bits}"
    content = qat_arms.job(
        str(workdir / f"base-{seed}"),
        str(workdir / "runs" / name),
        str(workdir / "tasks" / "train.jsonl"),
        kind=kind,
        bits=bits,
        seed=seed,
    )
    job = job_from(content)
    begun = time.perf_counter()
    train(job, restart=True)
    facts = {"commit": machine.git("rev-parse", "--short", "HEAD"), "seconds": time.perf_counter() - begun}
    result = {"seed": seed, "kind": kind, "bits": bits, **facts, **scores(workdir, job)}
    results = workdir / "results"
    results.mkdir(exist_ok=True)
    partial = results / f"{name}.partial"
    partial.write_text(json.dumps(result))
    partial.rename(results / f"{name}.json")


def scores(workdir: Path, job: Job) -> dict[str, Any]:
    """Return what a trained arm makes of the exam: as exported, from the exported files, and without rounding."""
    items = tasks.exam(EXAM)
    folder = workdir / "exports" / Path(job.output).name
    model = load_run(Path(job.output), job)
    rounded = score(model, items)
    with prepared(model).unquantised():
        plain = score(model, items)
    shutil.rmtree(folder, ignore_errors=True)
    export(model, folder)
    again = score(load(folder), items)
    return {
        "rounded": figures(rounded),
        "unrounded": figures(plain),
        "export_scores_the_same": again.losses == rounded.losses,
    }


def figures(found: Score) -> dict[str, Any]:
    """Return losses item by item, in nats a token, and how many answers are right."""
    return {"losses": list(found.losses), "right": sum(found.right), "count": len(found.right)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
