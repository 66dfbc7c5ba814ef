"""What INT4 loses on its way to FP4: K2.6's own weights, and nano-K2 after QAT, by weight, by prediction and by answer.

The INT4 model is the truth here, as K2-Thinking and later are: there is no BF16 of theirs. Every conversion is what the
command does, INT4 to FP4 and that to BF16, so what is measured is what stands in the files.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import k2quant
from k2quant.calib import calibrate
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.ground.release import INSTRUCT_CONFIG
from k2quant.model.generation import silence
from k2quant.nano.tasks import Item
from k2quant.qat import export
from k2quant.qat.exporting.export import load_run
from k2quant.qat.job import job_from
from k2quant.qat.training.training import train
from suites.calib import drift, samples, truth
from suites.calib.proof import LENGTH, kind
from suites.calib.samples import tell
from suites.calib.summing import mean
from suites.common import machine
from suites.qat import arms as qat_arms
from suites.qat.summaries import interval
from suites.solving.summing import verdict

SLICES = machine.ROOT / "tests" / "data" / "golden_int4_slices.json"
"""Published slices of INT4 checkpoints; see tests/data/README.md."""
OF_K2 = "moonshotai/Kimi-K2.6"
SCOPES = ("experts", "projections")
"""What is INT4 in the source: as Moonshot ships it, and every matrix of the layers."""
DRAW = 0
"""Of the documents that `imatrix` is calibrated on."""


class Target(NamedTuple):
    """A format, and how its scales are chosen."""

    to: str
    method: str
    layout: str | None = None

    @property
    def name(self) -> str:
        """As the results have it."""
        return f"{self.to} {self.method}"


TARGETS = (
    Target("nvfp4", "rtn"),
    Target("nvfp4", "mse"),
    Target("nvfp4", "imatrix"),
    Target("mxfp4", "rtn"),
    Target("mxfp4", "mse"),
    Target("mxfp4", "imatrix"),
)


class Errors(NamedTuple):
    """How far a matrix lies from what it was."""

    squared: float
    """sum (W - Q)^2."""
    of: float
    """sum W^2."""
    exact: int
    """Weights that are what they were."""
    weights: int

    @property
    def relative(self) -> float:
        """The relative squared error."""
        return self.squared / self.of

    @property
    def decibels(self) -> float:
        """Signal to quantisation noise, in dB."""
        return math.inf if self.squared == 0 else -10 * math.log10(self.relative)

    def record(self) -> dict[str, Any]:
        """Return it for JSON; no error at all has no SQNR."""
        return {
            "relative": self.relative,
            "decibels": self.decibels if self.squared else None,
            "exact": self.exact / self.weights,
            "weights": self.weights,
        }


def errors(before: Tensor, after: Tensor) -> Errors:
    """Compare two matrices `[N, K]`, in float64."""
    one, other = before.double(), after.double()
    return Errors(float(((one - other) ** 2).sum()), float((one**2).sum()), int((one == other).sum()), one.numel())


def added(found: Sequence[Errors]) -> Errors:
    """Return the errors of several matrices together."""
    return Errors(*(sum(column) for column in zip(*found, strict=True)))


def values(folder: Path) -> dict[str, Tensor]:
    """Return the matrices of a BF16 checkpoint by base, float32."""
    checkpoint = open_checkpoint(folder)
    found = {}
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "BF16" and len(entry.shape) == 2:
            bits = np.frombuffer(read_tensor(checkpoint, entry), np.uint16).reshape(entry.shape)
            found[name.removesuffix(".weight")] = torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
    return found


def converted(source: Path, place: Path, target: Target, scope: str, stats: Path | None) -> Path:
    """Convert a checkpoint to FP4 and that to BF16; return the second folder."""
    for folder in (place / "fp4", place / "bf16"):
        shutil.rmtree(folder, ignore_errors=True)
    asked: dict[str, Any] = {"to": target.to, "scope": scope, "method": target.method, "layout": target.layout}
    k2quant.convert(source, place / "fp4", **asked, stats=stats if target.method == "imatrix" else None)
    return k2quant.convert(place / "fp4", place / "bf16", to="bf16").folder


# --- the weights of K2.6 ----------------------------------------------------------------------------------------------


def write_slice(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a published slice as a checkpoint of one matrix."""
    rows, columns = content["rows"], content["cols"]
    base = "model.layers.1.mlp.experts.0.gate_proj"
    words = np.array(content["weight_packed_int32"], np.int64).astype(np.int32).reshape(rows, columns // 8)
    scale = np.array(content["weight_scale_bf16_bits"], np.uint16).reshape(rows, columns // 32)
    tensors: Shard = {
        f"{base}.weight_packed": ("I32", words),
        f"{base}.weight_scale": ("BF16", scale),
        f"{base}.weight_shape": ("I32", np.array([rows, columns], np.int32)),
    }
    config = {"model_type": INSTRUCT_CONFIG["model_type"], "architectures": INSTRUCT_CONFIG["architectures"]}
    write_checkpoint(folder, {"model.safetensors": tensors}, config)


def of_checkpoint(source: Path, place: Path, targets: Sequence[Target]) -> Iterator[dict[str, Any]]:
    """Yield a row for each matrix that is INT4 in a checkpoint, and each target that needs no data."""
    plain = k2quant.convert(source, place / "plain", to="bf16").folder
    before = values(plain)
    for target in targets:
        after = values(converted(source, place, target, "experts", None))
        for base, matrix in before.items():
            if not torch.equal(matrix, after[base]) or ".experts." in base:
                yield {"tensor": base, "target": target.name, **errors(matrix, after[base]).record()}


def slices(workdir: Path, path: Path) -> list[dict[str, Any]]:
    """Return the errors of the published slices of K2.6."""
    found = []
    for number, content in enumerate(json.loads(path.read_text())["slices"]):
        if content["model"] == OF_K2:
            place = workdir / "fp4" / f"slice-{number}"
            shutil.rmtree(place, ignore_errors=True)
            write_slice(place / "int4", content)
            targets = [target for target in TARGETS if target.method != "imatrix"]
            rows = of_checkpoint(place / "int4", place, targets)
            found += [row | {"tensor": f"{content['model']}, {content['tensor']}"} for row in rows]
    return found


# --- nano-K2 after QAT ------------------------------------------------------------------------------------------------


def exported(workdir: Path, base: Path, seed: int, scope: str) -> Path:
    """Return the INT4 export of a nano-K2 that was trained with the rounding; it is trained where there is none yet."""
    place = workdir / "fp4" / f"qat-{seed}-{scope}"
    folder = place / "export"
    if not (folder / "config.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        data = samples.write_draw(place / "data.jsonl", seed, DRAW)
        content = qat_arms.job(str(base), str(place / "run"), str(data), kind="plain", bits=4, seed=seed)
        content["quantize"]["scope"] = scope
        job = job_from(content)
        train(job, restart=True)
        export(load_run(Path(job.output), job), folder)
        shutil.rmtree(place / "run")
    return folder


def calibrated(workdir: Path, folder: Path, seed: int, scope: str) -> Path:
    """Return the statistics of an export."""
    stats = workdir / "fp4" / f"stats-{seed}-{scope}"
    if not (stats / "k2quant_stats.json").exists():
        data = samples.write_draw(workdir / "fp4" / "data" / f"{seed}.jsonl", seed, DRAW)
        calibrate(folder, stats, data=str(data), samples=samples.DOCUMENTS, length=LENGTH)
    return stats


def arm(workdir: Path, base: Path, seed: int, scope: str, items: Sequence[Item]) -> dict[str, Any]:
    """Return what is measured of one model."""
    tell(f"fp4, proof: seed {seed}, {scope}")
    source = exported(workdir, base, seed, scope)
    stats = calibrated(workdir, source, seed, scope)
    place = workdir / "fp4" / f"converted-{seed}-{scope}"
    taken = {weight.removesuffix(".weight_packed") for weight in open_checkpoint(source).tensors if "packed" in weight}
    plain = truth.load(k2quant.convert(source, place / "plain", to="bf16", restart=True).folder)
    before, told = truth.matrices(plain), drift.predicted(plain, items)
    rows, drifts = [], []
    for target in TARGETS:
        model = truth.load(converted(source, place, target, scope, stats))
        after = truth.matrices(model)
        found = {name: errors(matrix, after[name]) for name, matrix in before.items() if name in taken}
        rows += [
            {"base": name, "kind": kind(name), "target": target.name, **each.record()} for name, each in found.items()
        ]
        seen = drift.predicted(model, items)
        drifts.append(
            {
                "target": target.name,
                "kl": drift.divergence(told, seen),
                "right": seen.right,
                "gate": verdict(told.right, seen.right),
                "whole": added(list(found.values())).record(),
            }
        )
    shutil.rmtree(place)
    return {"seed": seed, "scope": scope, "right": told.right, "rows": rows, "drift": drifts}


def of_seed(workdir: Path, base: Path, seed: int) -> list[dict[str, Any]]:
    """Return the arms of one model; what is there is taken."""
    found, items = [], samples.exam()
    for scope in SCOPES:
        path = workdir / "fp4" / "proof" / f"{seed}-{scope}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(arm(workdir, base, seed, scope, items)))
            partial.rename(path)
        found.append(json.loads(path.read_text()))
    return found


def arms(workdir: Path, seeds: Sequence[int], at_once: int) -> list[dict[str, Any]]:
    """Return all arms; so many models are measured at once, each in a process with one thread of torch."""
    folders = samples.bases(workdir, seeds)
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _begin) as pool:
        found = [pool.submit(of_seed, workdir, folders[seed], seed) for seed in seeds]
        return [one for each in found for one in each.result()]


def _begin() -> None:
    silence()
    torch.set_num_threads(1)


# --- what they come to ------------------------------------------------------------------------------------------------


def levels(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield for each scope and target what it comes to over the models."""
    for scope in SCOPES:
        mine = [one for one in found if one["scope"] == scope]
        for target in TARGETS:
            drifts = [next(row for row in one["drift"] if row["target"] == target.name) for one in mine]
            plain = [next(row for row in one["drift"] if row["target"] == f"{target.to} rtn") for one in mine]
            ratios = [math.log(own["kl"] / other["kl"]) for own, other in zip(drifts, plain, strict=True)]
            share = [mean(map(int, row["right"])) for row in drifts]
            yield {
                "scope": scope,
                "target": target.name,
                "models": len(mine),
                "relative": mean(row["whole"]["relative"] for row in drifts),
                "decibels": -10 * math.log10(mean(row["whole"]["relative"] for row in drifts)),
                "exact": mean(row["whole"]["exact"] for row in drifts),
                "kl": mean(row["kl"] for row in drifts),
                "ratio": [math.exp(each) for each in interval(ratios)]
                if target.method != "rtn" and len(mine) > 1
                else None,
                "right": mean(share),
                "before": mean(mean(map(int, one["right"])) for one in mine),
                "gates": {
                    word: sum(row["gate"] == word for row in drifts) for word in sorted({r["gate"] for r in drifts})
                },
            }


def kinds(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield for each kind of matrix the mean, least and largest relative squared error of each target."""
    rows = [row for one in found if one["scope"] == "projections" for row in one["rows"]]
    for name in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == name]
        of = {target.name: [row["relative"] for row in mine if row["target"] == target.name] for target in TARGETS}
        yield {
            "kind": name,
            "count": len(mine) // len(TARGETS),
            "error": {each: {"mean": mean(all_), "least": min(all_), "most": max(all_)} for each, all_ in of.items()},
        }


def measure_all(given: argparse.Namespace, _before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results."""
    seeds = samples.SEEDS[: given.seeds]
    own = slices(given.workdir, given.slices)
    found = arms(given.workdir, seeds, given.threads)
    return {
        "slices": own,
        "seeds": given.seeds,
        "documents": samples.DOCUMENTS,
        "tested": len(samples.exam()),
        "steps": qat_arms.STEPS,
        "levels": list(levels(found)),
        "kinds": list(kinds(found)),
        "bars": [],
    }
