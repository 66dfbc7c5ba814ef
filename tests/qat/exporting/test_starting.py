"""Post-training rounding of QAT: starved experts, and a job that was not trained, at scales that are searched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from k2quant.calib.stats.blending import HeldOut
from k2quant.calib.stats.digests import digests_of
from k2quant.calib.stats.layout import PARTS, Input, inputs
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.calib.stats.writing import Measured, calibrating, finish, write_layer, write_outside
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import group_tensors
from k2quant.errors import CheckpointError, DestinationStale, UsageError
from k2quant.ground import names
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import F32, I32, U16
from k2quant.qat.exporting.export import export_run
from k2quant.qat.exporting.starting import PostTraining
from k2quant.qat.job import Job, job_from, read_job
from k2quant.qat.planning import plan_job
from k2quant.qat.run.folder import MANIFEST, Run
from k2quant.qat.training.training import train
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")

EXPERTS, TOKENS, TOP = 8, 400, 2
EXPERT = "model.layers.1.mlp.experts.{}.{}"
WORSE = EXPERT.format(3, "down_proj")
"""Held-out data finds a search worse for it: the two parts say opposite things of its columns."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a dense layer and one of experts, data, and statistics. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("starting")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_data(folder / "data.jsonl")
    write_stats(folder / "stats", folder / "model")
    write_stats(folder / "other-stats", folder / "other")
    return folder


def write_stats(folder: Path, source: Path) -> None:
    """Write what a calibration might have seen: columns of very different size."""
    checkpoint = open_checkpoint(source)
    model = Model.of(checkpoint.config)
    data = {name: DataPart(hashes=(), tokens=TOKENS, rows=4, digest="0" * 64) for name in ("train", "validation")}
    data["test"] = replace(data["train"], tokens=0, rows=0)
    manifest = Manifest(model=model, data=data, settings={}, version="0")
    weights = group_tensors(checkpoint.tensors).weights
    with calibrating(folder, manifest):
        for layer in range(model.layers):
            found = {(one.name, part): measured(one, part) for one in inputs(model, layer) for part in PARTS}
            here = [weight for weight in weights if names.layer(weight.main.name) == layer]
            write_layer(folder, layer, found, digests_of(checkpoint, here))
        write_outside(folder, {})
        finish(folder, manifest)


def measured(one: Input, part: str) -> Measured:
    """Return moments of one input; of `WORSE` those of the validation part are turned upside down."""
    squares = np.exp(np.random.default_rng(len(one.name)).normal(0, 2, one.shape(one.width))).astype(np.float32)
    if part == "validation" and one.name.endswith(".experts.down_proj"):
        squares[3] = 1 / squares[3]
    tokens: Any = TOKENS if one.experts is None else np.full(EXPERTS, TOKENS * TOP // EXPERTS, np.int64)
    largest = np.sqrt(squares.max(axis=-1)) * np.float32(4)
    return Measured(squares, tokens * 0.5, tokens, largest, np.sqrt(squares) * np.float32(0.6))


def make_job(home: Path, output: Path, method: str, **changes: dict[str, Any]) -> Job:
    """Return a job of one step that leaves every expert starved, and says how they are rounded then."""
    training = {"steps": 1, "least_tokens": 10**6, "fallback": method, "evaluate_every": 100}
    training |= {"fallback_stats": str(home / "stats")} if method == "imatrix" else {}
    changes["training"] = {**training, **changes.get("training", {})}
    content = job_content(home, "run", **changes)
    content["output"] = str(output)
    return job_from(content)


def stored(folder: Path, base: str, suffix: str = "weight") -> Any:
    """Return a tensor of a checkpoint as bits."""
    checkpoint = open_checkpoint(folder)
    entry = checkpoint.tensors[f"{base}.{suffix}"]
    kind = {"BF16": np.uint16, "I32": np.int32}[entry.dtype]
    return np.frombuffer(bytes(read_tensor(checkpoint, entry)), kind).reshape(entry.shape)


def searched(home: Path, base: str, method: str, bits: int) -> tuple[I32, U16]:
    """Return words and scales of a weight of the start as the codecs of a conversion give them."""
    codec, weights = codecs("cpu").int4, stored(home / "model", base)
    scale = np.empty((len(weights), weights.shape[1] // 32), np.uint16)
    packed = np.empty((len(weights), weights.shape[1] // 8), np.int32)
    stats = open_stats(home / "stats")
    importance: F32 | None = stats.importance(base) if method == "imatrix" else None
    mean: F32 | None = stats.mean(base) if method == "imatrix" else None
    if method == "rtn" or (method, base) == ("imatrix", WORSE):
        codec.choose(weights, "moonshot", scale, recover=False, bits=bits)
    else:
        codec.search(weights, importance, scale, mean=mean, bits=bits, recover=False)
    codec.store(weights, scale, "moonshot", packed, bits=bits)
    return packed, scale


def check_experts(home: Path, export: Path, method: str, bits: int = 4) -> None:
    """Compare what an export holds of every expert with what the codecs give."""
    for expert in range(EXPERTS):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            base = EXPERT.format(expert, projection)
            packed, scale = searched(home, base, method, bits)
            np.testing.assert_array_equal(stored(export, base, "weight_packed"), packed, base)
            np.testing.assert_array_equal(stored(export, base, "weight_scale"), scale, base)


WAYS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mse, 2 bits, learned": ("mse", {"quantize": {"bits": 2, "estimator": "learned"}}, 2),
    "imatrix, BF16 masters": ("imatrix", {"training": {"masters": "bfloat16"}}, 4),
}


@pytest.mark.parametrize("way", WAYS)
def test_starved_experts_are_exported_as_the_search_stores_them(way: str, home: Path, ram: Path) -> None:
    """Codes and scales of the export are those of a store at searched scales, and the gate of equal bits passes.

    Where held-out data finds the search worse than rounding, they are those of rounding.
    """
    method, changes, bits = WAYS[way]
    job = make_job(home, ram / "run", method, **copy.deepcopy(changes))
    assert train(job).starved == EXPERTS
    export_run(ram / "run", ram / "export")
    check_experts(home, ram / "export", method, bits)


@pytest.mark.parametrize("method", ["rtn", "mse", "imatrix"])
def test_an_untrained_export_is_rounded_so_too(method: str, home: Path, ram: Path) -> None:
    """Of a job's file every fake-quantised weight is exported as the job's post-training rounding has it."""
    stats = f", fallback_stats: {home / 'stats'}" if method == "imatrix" else ""
    (ram / "job.yaml").write_text(
        f"model: {home / 'model'}\noutput: {ram / 'run'}\ndata: {{path: {home / 'data.jsonl'}}}\n"
        f"training: {{steps: 1, fallback: {method}{stats}}}\n"
    )
    assert read_job(ram / "job.yaml").training.fallback == method
    export_run(ram / "job.yaml", ram / "export")
    check_experts(home, ram / "export", method)


class Shifted:
    """Statistics of which the train part knows nothing, and whose held-out inputs never leave their means."""

    def __init__(self, mean: F32, varies: float) -> None:
        """Take the means, and what a column varies."""
        self._mean, self._square = mean, np.square(mean) + np.float32(varies)

    def importance(self, _: str) -> F32:
        """Return ones."""
        return np.ones_like(self._mean)

    def mean(self, _: str) -> F32:
        """Return zeros."""
        return np.zeros_like(self._mean)

    def held_out(self, _: str) -> HeldOut:
        """Return the moments."""
        return HeldOut(self._square, self._mean, TOKENS, blended=False)


def test_errors_that_add_up_in_held_out_data_decide_too() -> None:
    """A search that squared errors alone would praise is dropped where it shifts an output more than rounding does."""
    weights = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = PostTraining("mse").rounded("any", weights, 4)
    lost = (weights - found).float()[0].numpy()
    plain = (weights - reference.fake_quantize_int4(weights, "moonshot", 4)).float()[0].numpy()
    mean = lost - plain * (lost @ plain) / (plain @ plain)  # what rounding loses, it does not shift
    mean *= np.sqrt(2 * (plain @ plain - lost @ lost)) / (lost @ mean)
    shifted, alike = (PostTraining("imatrix", cast("Stats", Shifted(each, 1))) for each in (mean, 0 * mean))
    assert shifted.rounded("any", weights, 4).equal(weights)
    assert alike.rounded("any", weights, 4).equal(found)


def test_the_case_that_held_out_data_decides_is_one(home: Path) -> None:
    """The planted matrix would be searched otherwise: the tests above compare two different things."""
    values = {method: searched(home, WORSE, method, 4)[1] for method in ("rtn", "mse", "imatrix")}
    assert (values["imatrix"] == values["rtn"]).all()
    assert (values["mse"] != values["rtn"]).any()
    other = EXPERT.format(4, "down_proj")
    assert (searched(home, other, "imatrix", 4)[1] != searched(home, other, "mse", 4)[1]).any()


def test_what_fallback_means_is_told_from_another(home: Path, ram: Path) -> None:
    """A run that was begun goes on under its own method and statistics alone; one without the key is as ever."""
    jobs = {method: make_job(home, ram / "run", method) for method in ("rtn", "mse", "imatrix")}
    assert "fallback" not in jobs["rtn"].identity()["training"]
    assert len({str(job.identity()) for job in jobs.values()}) == 3
    (ram / "run").mkdir()
    Run(ram / "run").begin(jobs["imatrix"], PostTraining.of(jobs["imatrix"]).facts())
    before = Run(ram / "run").digest()
    moved = make_job(home, ram / "run", "imatrix", training={"fallback_stats": str(home / "other-stats")})
    with pytest.raises(DestinationStale, match="another fallback_stats"):
        Run(ram / "run").compare(moved, PostTraining.of(moved).facts())
    with pytest.raises(DestinationStale, match=r"another job \(training\.fallback\)"):
        Run(ram / "run").compare(jobs["mse"], {})
    (ram / "run" / MANIFEST).unlink()
    Run(ram / "run").begin(moved, PostTraining.of(moved).facts())
    assert Run(ram / "run").digest() != before


def test_statistics_of_another_model_are_refused_before_the_first_step(home: Path, ram: Path) -> None:
    """Of the same shapes but other weights: the message names the weight, and training, plan and export refuse it."""
    job = make_job(home, ram / "run", "imatrix", training={"fallback_stats": str(home / "other-stats")})
    with pytest.raises(CheckpointError, match=r"is not the weight that was calibrated.*name the statistics"):
        train(job)
    assert not (ram / "run" / "history.jsonl").exists()
    missing = replace(job, training=replace(job.training, fallback_stats=str(home / "nothing")))
    with pytest.raises(UsageError, match=r"training: fallback_stats: .*nothing"):
        plan_job(missing)
    with pytest.raises(CheckpointError, match="no statistics here"):
        plan_job(replace(job, training=replace(job.training, fallback_stats=str(home / "model"))))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no statistics": ({"training": {"fallback": "imatrix"}}, "fallback_stats: `imatrix` needs the folder"),
    "for nothing": ({"training": {"fallback": "mse", "fallback_stats": "s"}}, "fallback_stats: has a meaning with"),
    "FP8": ({"training": {"fallback": "mse"}, "quantize": {"to": "fp8"}}, "fallback: mse searches scales of int4"),
    "another grid": (
        {"training": {"fallback": "mse"}, "quantize": {"grid": "compressed-tensors"}},
        "on the grid moonshot; use rtn",
    ),
    "adapters": ({"training": {"fallback": "mse"}, "quantize": {"train": "adapters"}}, "`train: adapters` freezes"),
    "no method": ({"training": {"fallback": "gptq"}}, "fallback: expected rtn, mse, imatrix, found 'gptq'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused(name: str, tmp_path: Path) -> None:
    """Settings that exclude one another, or have no effect, are usage errors that name the key."""
    changes, message = WRONG[name]
    with pytest.raises(UsageError, match=message):
        job_from(job_content(tmp_path, **copy.deepcopy(changes)))
