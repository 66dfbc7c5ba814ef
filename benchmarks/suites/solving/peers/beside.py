"""GPTQ beside llm-compressor's GPTQ and AWQ and auto-round: the same models, documents, groups of 32, in one run.

The peers live in an environment of their own, whose Python is named by `--peers-python`. Each contestant quantises
every projection of a model in a process of its own, one after the other; what it writes is read back and measured here,
on the first half's test. One file for each model and width in `WORKDIR/solving-peers`; what is there is taken.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from k2quant.calib.inputs import Samples
from k2quant.nano import vocabulary
from suites.calib import drift, rounding, samples, truth
from suites.calib.proof import Tested
from suites.calib.samples import tell
from suites.calib.summing import mean
from suites.common import machine, measure
from suites.qat.summaries import interval
from suites.solving import passes

WORKER = Path(__file__).with_name("worker.py")
OWN = ("rtn", "imatrix", "gptq")
THEIRS = ("rtn", "gptq", "awq", "auto-round")
NAMES = {
    "rtn": "k2quant rtn",
    "imatrix": "k2quant imatrix",
    "gptq": "k2quant gptq",
    "peer rtn": "llm-compressor, rounding",
    "peer gptq": "llm-compressor GPTQ",
    "peer awq": "llm-compressor AWQ",
    "peer auto-round": "auto-round",
}
ROUNDING = {"imatrix": "rtn", "gptq": "rtn", "peer gptq": "peer rtn", "peer awq": "peer rtn"}
"""Who rounds on the grid of whom; auto-round's own rounding takes no part."""
PAIR = "gptq"
"""The contestant that the others are held against."""
WIDTHS = (4, 3)
DRAW = 0
DTYPE = "bfloat16"
"""Of the peers' models: that of the checkpoint, as their examples load it; k2quant's pass computes in it too."""

Rows = Sequence[dict[str, Any]]


def documents(given: Samples) -> list[Tensor]:
    """Return the documents that are measured, each by itself, as rows have them side by side."""
    found: list[Tensor] = []
    part = given.train
    for tokens, positions, real in zip(part.tokens, part.positions, part.real, strict=True):
        here, starts = tokens[real], torch.where(positions[real] == 0)[0].tolist()
        found += [here[first:last] for first, last in zip(starts, [*starts[1:], len(here)], strict=True)]
    return found


def twin(folder: Path, place: Path) -> Path:
    """Return a copy of a model under the name that transformers has for its architecture, which is the peers' too."""
    if not (place / "config.json").exists():
        shutil.copytree(folder, place, dirs_exist_ok=True)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    return place


def run(job: dict[str, Any], python: str, place: Path) -> dict[str, float]:
    """Have a contestant quantise; return its seconds, those of the whole command, and its memory in bytes."""
    path, log = place / "job.json", place / "log"
    path.write_text(json.dumps(job))
    own = python == sys.executable
    command = [python, "-m", "suites.solving.peers.own"] if own else [python, str(WORKER)]
    home = machine.ROOT
    paths = [str(home / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    found = measure.run(
        [*command, str(path)], log=log, env=env | ({"PYTHONPATH": os.pathsep.join(paths)} if own else {}), sample=True
    )
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('{"seconds"')]
    seconds: float = json.loads(lines[-1])["seconds"]
    own_bytes = found.peak_private or found.peak_rss
    return {"seconds": seconds, "whole": found.wall_s, "cpu": found.cpu_s, "own": own_bytes, "resident": found.peak_rss}


def unfolded(before: Tensor, after: Tensor, folded: Tensor | None) -> Tensor:
    """Return quantised weights in the units of the original inputs and outputs, `[N, K]`.

    Args:
        before: the original weights.
        after: the quantised ones.
        folded: the ones that were quantised; None where they are the original ones.
    """
    if folded is None:
        return after
    return torch.where(folded == 0, after, after * (before / torch.where(folded == 0, 1, folded)))


def codes(matrix: Tensor) -> int:
    """Return the most values that a group of 32 has."""
    ordered = matrix.unflatten(1, (-1, 32)).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


@torch.no_grad()
def whole(model: Any, found: Mapping[str, Tensor]) -> Any:
    """Return a copy of a model with the weights that a contestant wrote, norms and routers too."""
    result = copy.deepcopy(model)
    named, left = truth.matrices(result), dict(result.state_dict())
    for name, value in found.items():
        target = named.get(name.removesuffix(".weight"), left.get(name))
        if target is not None:
            target.copy_(value)
    return result


def figures(tested: Tested, found: Mapping[str, Tensor], bits: int) -> dict[str, Any]:
    """Return what a contestant's weights come to: KL, answers, and each matrix's error over that of our `rtn`."""
    seen = drift.predicted(whole(tested.model, found), tested.items)
    rows, most = {}, 0
    for base, matrix in truth.matrices(tested.model).items():
        here, after = tested.seen.of(base), found[f"{base}.weight"].float()
        folded = found.get(f"{base}.folded")
        if here is None:
            continue
        most = max(most, codes(after))
        values = unfolded(matrix, after, None if folded is None else folded.float())
        rows[base] = here.error(matrix, values) / here.error(matrix, rounding.rounded(matrix, "rtn", bits))
    return {"kl": drift.divergence(tested.base, seen), "right": seen.right, "true": rows, "codes": most}


def of_model(
    workdir: Path, python: str | None, seed: int, tested: Tested, bits: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contestant."""
    place = workdir / "solving-peers" / f"{seed}"
    place.mkdir(parents=True, exist_ok=True)
    given = passes.read(workdir, tested.folder, seed, DRAW)
    texts = documents(given)
    tokens: dict[str, Any] = {"ids": torch.cat(texts).numpy(), "lengths": np.array([len(text) for text in texts])}
    np.savez(place / "tokens.npz", **tokens)
    common: dict[str, Any] = {"bits": bits, "threads": threads, "output": str(place / "out.safetensors")}
    own: dict[str, Any] = {"model": str(tested.folder), "workdir": str(workdir), "seed": seed, "draw": DRAW}
    theirs: dict[str, Any] = {"model": str(twin(tested.folder, place / "model")), "tokens": str(place / "tokens.npz")}
    theirs |= {"pad": vocabulary.PAD, "dtype": DTYPE}
    jobs = [(name, sys.executable, own | {"tool": name}) for name in OWN]
    jobs += [(f"peer {name}", python, theirs | {"tool": name}) for name in THEIRS] if python else []
    for name, home, job in jobs:
        tell(f"solving, peers: seed {seed}, INT{bits}, {name}")
        cost = run({**common, **job}, home, place)
        found = load_file(str(place / "out.safetensors"))
        yield {"contestant": name, "bits": bits, "seed": seed, **cost, **figures(tested, found, bits)}


def measured(
    workdir: Path, python: str | None, seeds: Sequence[int], threads: int, widths: Sequence[int] = WIDTHS
) -> list[dict[str, Any]]:
    """Return all rows."""
    folders, rows = samples.bases(workdir, seeds), []
    for bits in widths:
        for seed in seeds:
            path = workdir / "solving-peers" / f"{seed}-{bits}.json"
            if not path.exists():
                tested = Tested(folders[seed], samples.exam())
                found = list(of_model(workdir, python, seed, tested, bits, threads))
                path.write_text(json.dumps(found))
            rows += json.loads(path.read_text())
    return rows


def levels(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield for each width and contestant what it comes to over the models."""
    for bits, name in dict.fromkeys((row["bits"], row["contestant"]) for row in rows):
        mine = [row for row in rows if (row["bits"], row["contestant"]) == (bits, name)]
        ours = {row["seed"]: row for row in rows if (row["bits"], row["contestant"]) == (bits, PAIR)}
        beaten = [ours[row["seed"]]["true"][base] < error for row in mine for base, error in row["true"].items()]
        ratios = [math.log(row["kl"] / ours[row["seed"]]["kl"]) for row in mine]
        yield {
            "bits": bits,
            "contestant": name,
            "models": len(mine),
            "error": mean(error for row in mine for error in row["true"].values()),
            "beaten": mean(beaten),
            "kl": mean(row["kl"] for row in mine),
            "left": mean(_left(rows, row) for row in mine) if name in ROUNDING else None,
            "ratio": None if name == PAIR else [math.exp(each) for each in interval(ratios)],
            "right": mean(mean(map(int, row["right"])) for row in mine),
            "codes": max(row["codes"] for row in mine),
            **{key: _spread([row[key] for row in mine]) for key in ("seconds", "whole", "cpu", "own")},
        }


def _left(rows: Rows, row: Mapping[str, Any]) -> float:
    """Return the KL of a contestant over that of rounding on its own grid."""
    wanted = (row["bits"], row["seed"], ROUNDING[row["contestant"]])
    plain = next(each for each in rows if (each["bits"], each["seed"], each["contestant"]) == wanted)
    return float(row["kl"]) / float(plain["kl"])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


COMPARED = (
    ("KL", ".5f", 1),
    ("mean error of its linears", ".3f", 1),
    ("share of right answers", ".1%", -1),
    ("seconds", ".1f", 1),
    ("own memory, MB", ".0f", 1),
)
"""Figures, how they are written, and whether less is better."""


def losses(found: Rows) -> list[str]:
    """Say where a peer has the better figure than our GPTQ, or its rounding than ours."""
    said = []
    for row in found:
        if not row["contestant"].startswith("peer "):
            continue
        ours_is = "rtn" if row["contestant"] == "peer rtn" else PAIR
        own = next(each for each in found if (each["bits"], each["contestant"]) == (row["bits"], ours_is))
        for what, form, sign in COMPARED:
            if sign * _figure(row, what) < sign * _figure(own, what):
                where = f"INT{row['bits']}, {NAMES[row['contestant']]}"
                theirs, ours = (_figure(each, what) for each in (row, own))
                said.append(f"{where}: {what} {theirs:{form}}, k2quant's {ours_is} {ours:{form}}.")
    return said


def _figure(row: Mapping[str, Any], what: str) -> float:
    found: dict[str, float] = {
        "KL": row["kl"],
        "mean error of its linears": row["error"],
        "share of right answers": row["right"],
        "seconds": row["seconds"]["median"],
        "own memory, MB": row["own"]["median"] / 1e6,
    }
    return found[what]
