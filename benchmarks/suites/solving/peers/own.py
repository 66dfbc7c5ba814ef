"""k2quant quantises a whole model for the comparison with its peers, in a process of its own.

Usage: python -m suites.solving.peers.own JOB

JOB is a JSON file as `worker.py` has it, with `tool` one of `rtn`, `imatrix` (collecting and searching) and `gptq` (the
pass that solves), and in the place of tokens `workdir`, `seed` and `draw`. Prints the same line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from k2quant.calib import collecting, open_stats
from k2quant.calib.inputs import Samples
from k2quant.calib.solving.settings import Settings
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.model.generation import silence
from suites.calib import rounding, truth
from suites.solving import passes


def plain(model: Any, _: Samples, job: dict[str, Any]) -> dict[str, Tensor]:
    """Round to nearest."""
    return {base: rounding.rounded(each, "rtn", job["bits"]) for base, each in truth.matrices(model).items()}


def searched(model: Any, given: Samples, job: dict[str, Any]) -> dict[str, Tensor]:
    """Collect what goes into each matrix, and search its scales by that."""
    with tempfile.TemporaryDirectory() as place:
        stats = Path(place) / "stats"
        collecting.collect(open_checkpoint(Path(job["model"])), stats, given, memory=passes.MEMORY)
        known = open_stats(stats)
        return {
            base: rounding.rounded(each, "imatrix", job["bits"], rounding.Known.of(known, base))
            for base, each in truth.matrices(model).items()
        }


def solved(model: Any, given: Samples, job: dict[str, Any]) -> dict[str, Tensor]:
    """Solve, a layer at a time."""
    found = passes.solved(Path(job["model"]), given, list(truth.matrices(model)), Settings(bits=job["bits"]))
    return {base: each.values for base, each in found.items()}


TOOLS: dict[str, Callable[[Any, Samples, dict[str, Any]], dict[str, Tensor]]] = {
    "rtn": plain,
    "imatrix": searched,
    "gptq": solved,
}


def main(path: str) -> None:
    """Do a job."""
    job = json.loads(Path(path).read_text())
    silence()
    torch.set_num_threads(job["threads"])
    folder = Path(job["model"])
    model, given = truth.load(folder), passes.read(Path(job["workdir"]), folder, job["seed"], job["draw"])
    begun = time.perf_counter()
    found = TOOLS[job["tool"]](model, given, job)
    seconds = time.perf_counter() - begun
    save_file({f"{base}.weight": each.bfloat16().contiguous() for base, each in found.items()}, job["output"])
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
