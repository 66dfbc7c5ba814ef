"""QAT from a job to an export: it learns, it can be killed at any moment, and it says what is wrong in one line.

Run as a script, `python test_train.py MODE FOLDER`, this file trains in children that it kills: a process of its
own, without threads, because it forks. K2QUANT_KILLS sets how many file operations of a save it kills at.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from k2quant.cli import main
from k2quant.conversion.recipes import recipe
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    MalformedFile,
    OutputError,
    UsageError,
)
from k2quant.qat import preparing
from k2quant.qat.exporting.export import export_run
from k2quant.qat.job import Job, job_from
from k2quant.qat.planning import plan_job
from k2quant.qat.run import checkpoints, naming
from k2quant.qat.run.folder import Run
from k2quant.qat.run.history import HISTORY, read_history
from k2quant.qat.run.summary import read_summary
from k2quant.qat.training.stepping import Stepper, time_job
from k2quant.qat.training.training import train
from places import SHARED
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")

KILLS = int(os.environ.get("K2QUANT_KILLS", "4"))
SEED = int(os.environ.get("K2QUANT_SEED", "20"))
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon": {"optimizer": {"method": "muon", "rate": 1e-3}},
    "learned": {
        "quantize": {"estimator": "learned", "bits": {0: None, 1: 8, 3: 4}},
        "distill": {"top_k": 8},
        "saving": {"every": 1, "tensorboard": False},
    },
}
"""What is killed: each changes a job."""


def make_job(folder: Path, output: str = "run", **changes: dict[str, Any]) -> Job:
    """Return a job of four steps on what lies in a folder, with a checkpoint after each."""
    changes["saving"] = {"every": 1, **changes.get("saving", {})}
    return job_from(job_content(folder, output, **changes))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model and data. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("qat")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    return folder


@pytest.fixture
def home(sources: Path, ram: Path) -> Path:
    """A folder of one's own with model and data."""
    shutil.copytree(sources / "model", ram / "model")
    shutil.copy(sources / "data.jsonl", ram)
    return ram


class Stopped(Exception):
    """Raised from a progress callback where a test wants a training to stop."""


def stop_after(step: int) -> Callable[[int, int, float], None]:
    """Return a callback that stops a training after a step."""

    def progress(done: int, _total: int, _loss: float) -> None:
        if done == step:
            raise Stopped

    return progress


def interrupted(job: Job, step: int) -> None:
    """Train to a step and stop there."""
    with pytest.raises(Stopped):
        train(job, progress=stop_after(step))


def weights(job: Job) -> dict[str, torch.Tensor]:
    """Return what the last checkpoint of a run holds."""
    return load_file(naming.found(Run(Path(job.output)).checkpoints)[-1] / "weights.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a run comes to: checkpoints, summary, and its history without seconds."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "checkpoints").rglob("*"))
        if path.is_file()
    }
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for record in history:
        record.pop("seconds", None)
    return files | {"history": json.dumps(history).encode(), "summary": (folder / "summary.json").read_bytes()}


def command(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, ["qat", *(str(argument) for argument in arguments)])


def written(value: Any) -> Any:
    """Return what a job's file says of a part of a job: nothing where there is nothing."""
    return {name: written(one) for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def as_yaml(job: Job, path: Path) -> Path:
    """Write a job's file."""
    content = written(json.loads(json.dumps(asdict(job))))
    del content["trust_remote_code"], content["follow_links"]
    content.pop("bits")
    path.write_text(json.dumps({**content, "saving": {"every": job.saving.every}}))  # JSON is YAML
    return path


# --- it trains --------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"weight_decay": 0.1, "warmup": 2, "decay": "linear"}},
    "muon": {"optimizer": {"method": "muon"}},
    "muon of experts alone": {"optimizer": {"method": "muon"}, "quantize": {"train": "experts"}},
    "experts": {"quantize": {"train": "experts"}},
    "clipped": {"quantize": {"estimator": "clipped", "bits": 2}},
    "learned": {"quantize": {"estimator": "learned", "bits": 3}, "optimizer": {"scale_rate": 1e-2}},
    "learned from 8 bits": {"quantize": {"estimator": "learned", "bits": {0: 8, 2: 4}}},
    "begins later": {"quantize": {"bits": {0: None, 2: 4}}},
    "from 8 bits": {"quantize": {"bits": {0: 8, 2: 4}}},
    "adapters": {"quantize": {"train": "adapters", "adapter": {"rank": 2}}, "training": {"precision": "bfloat16"}},
    "fp8": {"quantize": {"to": "fp8"}},
    "nvfp4": {"quantize": {"to": "nvfp4", "layout": "compressed-tensors"}},
    "mxfp4": {"quantize": {"to": "mxfp4", "estimator": "clipped"}},
    "autocast": {"training": {"precision": "bfloat16"}},
    "BF16 masters": {"training": {"masters": "bfloat16"}},
    "teacher": {"distill": {"weight": 0.7, "temperature": 2.0}},
    "teacher's likeliest": {"distill": {"top_k": 8}},
    "control": {"training": {"fake_quantize": False}},
    "starved": {"training": {"least_tokens": 10**6}, "quantize": {"estimator": "learned"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_exports(home: Path, kind: str, sketched: pytest.MonkeyPatch) -> None:
    """Every way to train moves what it shall, ends in finite losses, and its export passes the gate of equal bits.

    With its page as a reader gets it.
    """
    sketched.undo()
    job = make_job(home, **KINDS[kind])
    result = train(job)
    history = read_history(home / "run" / "history.jsonl")
    assert [record.step for record in history.steps] == [1, 2, 3, 4]
    assert [record.step for record in history.evaluations] == [0, 2, 4]
    assert [record.bits for record in history.steps] == (
        [None] * 4 if not job.quantize.bit_widths else [job.bits_at(step) for step in range(4)]
    )
    assert result.evaluation == history.evaluations[-1]
    assert all(record.norm > 0 for record in history.steps)
    if kind != "starved":
        assert result.evaluation.loss != result.evaluation.start_rounded
    assert not export_run(home / "run", home / "export").already_done
    shown = command("export", home / "run", home / "export")
    assert (shown.exit_code, "already finished" in shown.output) == (0, True)


SAME: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_batch": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "eager": {"experts": "eager"},
    "batched_mm": {"experts": "batched_mm"},
    "grouped_mm": {"experts": "grouped_mm"},
}


@pytest.fixture(scope="module")
def plain(sources: Path) -> list[float]:
    """The losses of the plain job."""
    train(make_job(sources, "plain"))
    return [record.loss for record in read_history(sources / "plain" / "history.jsonl").steps]


@pytest.mark.parametrize("way", SAME)
def test_another_way_to_the_same(home: Path, plain: list[float], way: str) -> None:
    """Micro-batches, recomputed activations and every implementation of experts give the same loss at every step.

    The tolerance: float32 sums in another order differ by some 1e-7 of a loss of 5; Adam divides small gradients by
    their own size, which lets a difference grow from step to step.
    """
    train(make_job(home, training=SAME[way]))
    losses = [record.loss for record in read_history(home / "run" / "history.jsonl").steps]
    assert losses == pytest.approx(plain, rel=2e-5)


def test_rounds_once_a_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are rounded once for each step of the optimizer, not once for each of its micro-batches."""
    rounded: list[str] = []
    values = preparing.Prepared.fill

    def noted(self: preparing.Prepared, target: Any, *rest: Any, **options: Any) -> None:
        rounded.append(target.name)
        values(self, target, *rest, **options)

    monkeypatch.setattr(preparing.Prepared, "fill", noted)
    seen: list[int] = []

    def progress(*_: object) -> None:
        seen.append(sum(name.endswith(".mlp.experts.down_proj") for name in rounded))
        rounded.clear()

    train(make_job(home, training={"micro_batch": 1, "evaluate_every": 100}), progress=progress)
    assert seen[1:] == [1, 1, 1], f"{seen}: the first step has the measurements before it"


LEARN: dict[str, Any] = {"training": {"steps": 40, "batch": 8}, "optimizer": {"rate": 5e-3}, "saving": {"every": 100}}


def test_learns(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained experts alone bring the rounded model's loss down; with a zero gradient for the STE they do not."""
    job = make_job(home, **LEARN, quantize={"train": "experts", "bits": 2})
    learnt = train(job).evaluation
    assert learnt is not None
    assert learnt.start_rounded is not None
    assert learnt.loss < learnt.start_rounded - 0.3

    def nothing(master: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values + 0 * master

    assert hasattr(preparing, "straight")
    monkeypatch.setattr(preparing, "straight", nothing)
    control = train(make_job(home, "control", **LEARN, quantize={"train": "experts", "bits": 2})).evaluation
    assert control is not None
    assert control.loss == control.start_rounded


def test_muon_moves_every_projection(home: Path) -> None:
    """With BF16 masters too, Muon has the projections and AdamW the rest: attention is no exception."""
    job = make_job(home, optimizer={"method": "muon"}, training={"masters": "bfloat16", "steps": 1})
    train(job)
    state = load_file(naming.found(Run(Path(job.output)).checkpoints)[-1] / "optimizer.safetensors")
    by_adam = {name.split("|")[0] for name in state if name.endswith("|exp_avg")}
    by_muon = {name.split("|")[0] for name in state if name.endswith("|momentum_buffer")}
    assert sum(".experts." in name for name in by_muon) == 8 * 3
    assert sum("self_attn" in name for name in by_muon) == 2 * 5
    assert by_adam == {name for name in by_adam if "norm" in name or "embed" in name or "lm_head" in name}


def test_starved_experts_fall_back(home: Path) -> None:
    """Experts that saw too few tokens get the weights of the start back and are listed with their tokens."""
    job = make_job(home, training={"least_tokens": 10**6})
    assert train(job).starved == 8
    starved = read_summary(home / "run").starved
    assert {name for name, _ in starved} == {f"model.layers.1.mlp.experts.{expert}" for expert in range(8)}
    trained = weights(job)["model.layers.1.mlp.experts.down_proj"]
    untrained = load_file(home / "model" / "model-2-of-2.safetensors")
    for expert in range(8):
        assert torch.equal(trained[expert], untrained[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].float())
    assert sum(tokens for _, tokens in starved) > 0


def test_loss_that_is_not_finite(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of NaN ends the training with an error that names the step; the last checkpoint stands and resumes."""
    job = make_job(home)
    step = Stepper._gradients  # noqa: SLF001  the trainer's own

    def broken(self: Stepper, *arguments: Any) -> tuple[float, float]:
        found = step(self, *arguments)
        number = len(read_history(home / "run" / "history.jsonl").steps)
        return (float("nan"), 0.0) if number == 2 else found

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "_gradients", broken)
        with pytest.raises(BadValue, match=r"not finite at step 3.*last checkpoint stands"):
            train(job)
    assert [naming.step_of(path) for path in naming.found(home / "run" / "checkpoints")] == [1, 2]
    assert train(job).resumed == 2


# --- it goes on -------------------------------------------------------------------------------------------------------


def test_killed_before_the_first_checkpoint(home: Path) -> None:
    """A run that ended before anything was saved begins anew, and comes to the same."""
    job = make_job(home, saving={"every": 3})
    interrupted(job, 2)
    assert not naming.found(home / "run" / "checkpoints")
    assert train(job).resumed == 0
    train(make_job(home, "reference", saving={"every": 3}))
    assert contents(home / "run") == contents(home / "reference")


def test_history_is_rewound(home: Path) -> None:
    """Steps behind the checkpoint are taken again and stand once in the history."""
    job = make_job(home, saving={"every": 2})
    interrupted(job, 3)
    assert len(read_history(home / "run" / "history.jsonl").steps) == 3
    assert train(job).resumed == 2
    train(make_job(home, "reference", saving={"every": 2}))
    assert contents(home / "run") == contents(home / "reference")


def test_finished(home: Path) -> None:
    """A run that is done is not trained again, and the command says so."""
    job = make_job(home)
    train(job)
    before = contents(home / "run")
    shown = command("train", as_yaml(job, home / "job.yaml"))
    assert "trained before, nothing to do" in shown.output
    assert contents(home / "run") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": {"rate": 2e-3}}, r"optimizer\.rate"),
        ({"quantize": {"bits": {0: 8, 2: 4}}}, "bits"),
        ({"distill": {}}, "distill"),
        ({"training": {"seed": 1, "clip": 2.0}}, r"training\.clip, training\.seed"),
    ],
)
def test_another_job(sources: Path, change: dict[str, Any], named: str) -> None:
    """A folder with a run of another job is left alone, and the error names what differs."""
    if not (sources / "taken").exists():
        train(make_job(sources, "taken"))
    before = contents(sources / "taken")
    with pytest.raises(DestinationStale, match=named):
        train(make_job(sources, "taken", **change))
    assert contents(sources / "taken") == before


def test_other_data_or_model(home: Path) -> None:
    """The same job on changed data or a changed model is refused; `restart` trains anew."""
    job = make_job(home)
    train(job)
    write_data(home / "data.jsonl", 41)
    with pytest.raises(DestinationStale, match=r"data.*`restart=True`"):
        train(job)
    write_data(home / "data.jsonl")
    shard = home / "model" / "model-1-of-2.safetensors"
    data, times = bytearray(shard.read_bytes()), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=times)  # sizes and times are as they were, as on a disk that fails
    with pytest.raises(DestinationStale, match="another model"):
        train(job)
    with pytest.raises(DestinationStale, match=r"model-1-of-2\.safetensors differ"):
        export_run(home / "run", home / "export")
    assert not (home / "export").exists()
    assert train(job, restart=True).resumed == 0


def noted(run: Path) -> dict[str, Any]:
    """Return what a run's manifest says."""
    found: dict[str, Any] = json.loads((run / "k2quant_qat.json").read_text())
    return found


def forget_targets(run: Path) -> None:
    """Leave a manifest as versions wrote it that did not note which weights are fake-quantised."""
    manifest = noted(run)
    del manifest["targets"], manifest["job"]["follow_links"]
    (run / "k2quant_qat.json").write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_meaning_of_linear(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun when INT4's `linear` took kv_b_proj too: neither trained on nor exported as it is; `projections` does both.

    The kind of fault: a word whose meaning has changed, and values that are wrong without a word.
    """

    def linear(scope: str = "linear") -> Job:
        return make_job(home, quantize={"scope": scope}, training={"steps": 2})

    with monkeypatch.context() as earlier:
        earlier.setattr(recipe, "is_unfit", lambda *_: False)
        interrupted(linear(), 1)
    forget_targets(home / "run")
    before = noted(home / "run")
    match = r"`scope: linear` took kv_b_proj too; say `scope: projections` .* `restart=True`"
    for act in (lambda: train(linear()), lambda: export_run(home / "run", home / "out")):
        with pytest.raises(DestinationStale, match=match):
            act()
    assert re.search(match, plan_job(linear()).obstacle or "")
    assert noted(home / "run") == before
    assert not (home / "out").exists()
    assert plan_job(linear("projections")).obstacle is None
    assert train(linear("projections")).resumed == 1
    assert train(linear("projections")).resumed == 2
    with pytest.raises(DestinationStale, match=r"another job \(quantize\.scope\)"):
        train(linear())
    export_run(home / "run", home / "out")
    train(make_job(home, "whole", quantize={"scope": "projections"}, training={"steps": 2}))
    export_run(home / "whole", home / "expected")
    for shard in (home / "expected").glob("*.safetensors"):
        assert (home / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_a_run_that_noted_no_targets_goes_on(home: Path) -> None:
    """Where the scope's meaning is as it was, a run of an earlier version is trained on, and notes its targets."""
    job = make_job(home, training={"steps": 2})
    interrupted(job, 1)
    targets = noted(home / "run")["targets"]
    forget_targets(home / "run")
    assert (plan_job(job).obstacle, plan_job(job).begun) == (None, 1)
    assert train(job).resumed == 1
    assert noted(home / "run")["targets"] == targets
    forget_targets(home / "run")
    export_run(home / "run", home / "out")


def test_other_targets_are_another_training(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a version take other weights for the same words, a run is neither trained on nor exported."""
    job = make_job(home, quantize={"scope": "linear"}, training={"steps": 1})
    train(job)
    monkeypatch.setattr(recipe, "is_unfit", lambda *_: False)
    said = "holds a training of another choice of weights"
    for act in (lambda: train(job), lambda: export_run(home / "run", home / "out")):
        with pytest.raises(DestinationStale, match=said):
            act()
    assert said in (plan_job(job).obstacle or "")


def test_a_damaged_manifest_does_not_stop_a_restart(home: Path) -> None:
    """Without it nobody can tell what was trained: refused, and thrown away when the user says so."""
    job = make_job(home, training={"steps": 1})
    train(job)
    (home / "run" / "k2quant_qat.json").write_text("{")
    with pytest.raises(MalformedFile, match=r"k2quant_qat\.json"):
        train(job)
    assert train(job, restart=True).resumed == 0
    assert train(job).resumed == 1


def test_a_run_goes_on_elsewhere(home: Path) -> None:
    """Model, data and run can be moved: bytes count, not places and times; an export is told of the model."""
    interrupted(make_job(home), 3)
    train(make_job(home, "undisturbed"))
    export_run(home / "undisturbed", home / "expected")
    (home / "there").mkdir()
    for name in ("model", "data.jsonl", "run"):
        shutil.move(home / name, home / "there" / name)
    for path in (home / "there" / "model").iterdir():
        path.touch()
    assert train(make_job(home / "there")).resumed == 3
    moved, expected = contents(home / "there" / "run"), contents(home / "undisturbed")
    assert moved.pop("summary") != expected.pop("summary")  # it names the model
    assert moved == expected
    shown = command("export", home / "undisturbed", home / "out")
    assert (shown.exit_code, "--model" in shown.stderr.splitlines()[-1]) == (2, True)
    shown = command("export", home / "undisturbed", home / "out", "--model", home / "there" / "model")
    assert shown.exit_code == 0, shown.output
    export_run(home / "there" / "run", home / "moved")  # the run knows the place from which it was resumed
    for name in ("out", "moved"):
        for shard in (home / "expected").glob("*.safetensors"):
            assert (home / name / shard.name).read_bytes() == shard.read_bytes()


def test_a_null_phase_is_measured_as_it_would_be_exported(home: Path) -> None:
    """Learned scales that have not begun are those of the weights now, in the measurement as in the export."""
    change: dict[str, Any] = {"quantize": {"estimator": "learned", "bits": {0: None, 3: 3}}, "saving": {"every": 2}}
    job = make_job(home, optimizer={"rate": 1e-2}, **change)
    interrupted(job, 3)
    export_run(home / "run", home / "export")
    said = next(record for record in read_history(home / "run" / HISTORY).evaluations if record.step == 2)
    other = make_job(home, "other", training={"steps": 1, "evaluate_every": 1}, quantize={"bits": 3})
    other = replace(other, model=str(home / "export"))
    train(other)
    (found,) = (record for record in read_history(home / "other" / HISTORY).evaluations if record.step == 0)
    assert found.start_rounded == pytest.approx(said.loss, rel=1e-6)
    assert said.loss != pytest.approx(said.start_rounded, rel=1e-4)


def test_foreign_folder(home: Path) -> None:
    """A folder with files of others is not trained into, not even with `restart`."""
    (home / "run").mkdir()
    (home / "run" / "thesis.tex").write_text("mine")
    for restart in (False, True):
        with pytest.raises(DestinationForeign):
            train(make_job(home), restart=restart)
    assert [path.name for path in (home / "run").iterdir()] == ["thesis.tex"]


def test_two_at_once(home: Path) -> None:
    """While a run is trained, a second one on its folder is refused, and the first does not notice."""
    job, refused = make_job(home), []

    def progress(done: int, _total: int, _loss: float) -> None:
        if done == 2:
            with pytest.raises(DestinationInUse):
                train(job, restart=True)
            refused.append(done)

    assert train(job, progress=progress).resumed == 0
    assert refused == [2]


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def retyped(path: Path) -> None:
    """Give a tensor another dtype."""
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].double()}, path)


def thinned(path: Path) -> None:
    """Take a tensor out."""
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def flipped(path: Path) -> None:
    """Change a bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def of_another_step(path: Path) -> None:
    """Say that it was saved after another step."""
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def of_another_training(path: Path) -> None:
    """Say that it is of another job."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"training": "0" * 64}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", cut),
        ("state.json", of_another_step),
        ("state.json", of_another_training),
        ("weights.safetensors", flipped),
        ("optimizer.safetensors", flipped),
        ("weights.safetensors", cut),
        ("optimizer.safetensors", cut),
        ("watch.safetensors", cut),
        ("weights.safetensors", Path.unlink),
        ("optimizer.safetensors", Path.unlink),
        ("watch.safetensors", Path.unlink),
        ("weights.safetensors", retyped),
        ("weights.safetensors", thinned),
        ("optimizer.safetensors", thinned),
        ("state.json", lambda path: path.write_text('{"files": [], "start": {"start": "x"}}')),
        ("state.json", lambda path: path.write_text("{}")),
    ],
)
def test_damaged_checkpoint(sources: Path, ram: Path, name: str, damage: Callable[[Path], None]) -> None:
    """A damaged file of the last checkpoint is named, with what to delete; nothing is trained on the rest of it.

    Once that is deleted, the run goes on from the checkpoint before.
    """
    if not (sources / "whole").exists():
        interrupted(make_job(sources, "whole"), 2)
    shutil.copytree(sources / "whole", ram / "run")
    job = make_job(sources, str(ram / "run"))
    last = ram / "run" / "checkpoints" / "step-00000002"
    damage(last / name)
    with pytest.raises(CheckpointError) as caught:
        train(job)
    assert name in str(caught.value)
    assert f"delete {last}" in str(caught.value)
    with pytest.raises(CheckpointError, match=name):
        export_run(ram / "run", ram / "export")
    if damage is cut:
        shutil.rmtree(last)
        assert train(job).resumed == 1


@pytest.mark.parametrize("operation", ["pwrite", "ftruncate", "fsync", "rename"])
def test_disk_full_while_saving(home: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """A disk that fills up while a checkpoint is saved gives one line and exit 1; the last one stands and resumes."""
    job = make_job(home, saving={"every": 2})
    saving: list[int] = []
    plain_save, plain_call = checkpoints.save, getattr(os, operation)

    def save(folder: Path, step: int, *arguments: Any, **options: Any) -> None:
        saving.append(step)
        plain_save(folder, step, *arguments, **options)

    def full(*arguments: Any, **options: Any) -> Any:
        if saving == [2, 4]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain_call(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        patch.setattr(os, operation, full)
        shown = command("train", as_yaml(job, home / "job.yaml"))
    assert shown.exit_code == 1, shown.output
    assert "No space left" in shown.stderr.splitlines()[-1]
    assert "step-00000004" in shown.stderr.splitlines()[-1]
    assert [path.name for path in (home / "run" / "checkpoints").iterdir() if path.suffix != ".partial"] == [
        "step-00000002"
    ]
    assert train(job).resumed == 2
    assert {path.name for path in (home / "run" / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


def test_killed_at_random(sources: Path, ram: Path) -> None:
    """Killed at random moments after its first checkpoint and resumed, a run has the bytes of one left alone.

    Its export too; with Muon, and with learned scales, widths that change and a teacher's cache.
    """
    assert script("random", sources, ram) >= len(MODES)


def test_killed_before_file_operations(sources: Path, ram: Path) -> None:
    """Killed before a file operation of a save, a run keeps a whole checkpoint and comes to the same bytes."""
    assert script("operations", sources, ram) >= KILLS // 2


def script(way: str, sources: Path, folder: Path) -> int:
    """Run this file as a script; return the number of kills."""
    arguments = [sys.executable, __file__, way, str(sources), str(folder)]
    path = os.pathsep.join([str(SHARED), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.splitlines()[-1])


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [("{", 1), ('{"txt": "a"}', 1), ('{"text": 1}', 1), ('{"text": ""}', 1)],
    ids=["no JSON", "no known key", "no text", "nothing"],
)
def test_damaged_data(home: Path, line: str, code: int) -> None:
    """What is wrong with the data is one line with file and line number, and nothing is trained."""
    (home / "data.jsonl").write_text('{"text": "abc"}\n' * 3 + line + "\n")
    shown = command("train", as_yaml(make_job(home), home / "job.yaml"))
    assert shown.exit_code == code, shown.output
    assert "data.jsonl, line 4" in shown.stderr.splitlines()[-1]
    assert not (home / "run" / "history.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data": {"path": "nowhere.jsonl"}}, 2, "nowhere.jsonl"),
        ({"data": {"held_out": 1000}}, 2, "held_out"),
        ({"data": {"length": 10**6}}, 2, "length"),
        ({"quantize": {"ignore": ["experts"]}}, 2, "no routed expert"),
        ({"distill": {"top_k": 129}}, 2, "top_k 129"),
    ],
)
@pytest.mark.parametrize("name", ["train", "plan"])
def test_impossible_jobs(sources: Path, ram: Path, name: str, change: dict[str, Any], code: int, said: str) -> None:
    """A job that cannot be done ends in one line and its exit code before the first step, planned or trained."""
    job = make_job(sources, str(ram / "run"), **change)
    content = written(json.loads(json.dumps(asdict(job))))
    del content["trust_remote_code"], content["follow_links"]
    content["quantize"]["bits"] = dict(content.pop("bits")) or content["quantize"]["bits"]
    import yaml

    (ram / "job.yaml").write_text(yaml.safe_dump(content))
    shown = command(name, ram / "job.yaml")
    if name == "plan" and "top_k" in said:
        pytest.skip("a plan does not ask the teacher")
    assert shown.exit_code == code, shown.output
    assert shown.stderr.splitlines()[-1].startswith("k2quant: ")
    assert said in shown.stderr.splitlines()[-1]


def test_plan(home: Path) -> None:
    """A plan lists coverage, memory that adds up, data and export, as a table and as JSON."""
    path = as_yaml(make_job(home, optimizer={"method": "muon"}), home / "job.yaml")
    shown, facts = command("plan", path), json.loads(command("plan", path, "--json").stdout)
    assert shown.exit_code == 0, shown.output
    assert "routed experts               49,152         49,152  100.0%" in shown.stdout
    assert facts["bytes_needed"] == sum(facts["memory"].values())
    assert facts["coverage"]["attention"]["quantised"] == 0
    assert (facts["rows"], facts["held_out"], facts["epochs"]) == (36, 4, pytest.approx(16 / 36))
    job = make_job(home, optimizer={"method": "muon"})
    train(job)
    kept = naming.found(home / "run" / "checkpoints")[-1]
    moments = sum(
        tensor.nbytes
        for name, tensor in load_file(kept / "optimizer.safetensors").items()
        if not name.endswith("|step")
    )
    assert facts["memory"]["optimizer"] == moments
    assert facts["checkpoint_bytes"] == moments + sum(tensor.nbytes for tensor in weights(job).values())
    assert (facts["checkpoints"], facts["disk_needed"]) == (3, 3 * facts["checkpoint_bytes"])
    assert 0 < facts["disk_free"] <= shutil.disk_usage(home).total
    assert facts["memory"]["gradients"] == sum(tensor.nbytes for tensor in weights(job).values())
    assert facts["trained"] == sum(tensor.numel() for tensor in weights(job).values())
    assert facts["export_bytes"] == export_run(home / "run", home / "export").report["bytes_written"]


def test_plan_follows_links_when_it_is_told_to(home: Path) -> None:
    """A model whose files are links to elsewhere is planned with `--follow-links`, and with that alone."""
    job = make_job(home)
    linked = home / "linked"
    linked.mkdir()
    for file in Path(job.model).iterdir():
        (linked / file.name).symlink_to(file.absolute())
    path = as_yaml(replace(job, model=str(linked)), home / "job.yaml")
    assert "--follow-links" in command("plan", path).stderr
    followed = command("plan", path, "--follow-links")
    assert followed.exit_code == 0, followed.output


def test_plan_looks_at_the_output(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `train` would be refused stops no plan, which warns of it; a disk too small for checkpoints is said to be.

    A run that is begun or done is no obstacle either, and the plan says which of the two it is.
    """

    def planned(job: Path, *arguments: str) -> Result:
        return command("plan", job, "--no-measure", *arguments)  # a step is not what this is about

    path = as_yaml(make_job(home), home / "job.yaml")
    usage = shutil.disk_usage(home)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "TOO LITTLE" in planned(path).stdout
    (home / "run").mkdir()
    (home / "run" / "thesis.txt").write_text("mine")
    (home / "file").write_text("")
    train(make_job(home, "taken"))
    below = as_yaml(make_job(home, "file/run"), home / "below.yaml")
    other = as_yaml(make_job(home, "taken", training={"steps": 3}), home / "other.yaml")
    for job, said in ((path, "no training of ours"), (below, "not a folder"), (other, r"training.steps")):
        refused, shown = command("train", job), planned(job)
        assert (refused.exit_code, said in refused.stderr) == (1, True), refused.output
        assert (shown.exit_code, said in shown.stderr) == (0, True), shown.output
        assert "warning: train would be refused the output" in shown.stderr
        assert said in json.loads(planned(job, "--json").stdout)["obstacle"]
    assert "train anew with --restart" in shown.stderr
    assert re.search(r"^output +train would be refused .* train anew with --restart", shown.stdout, re.MULTILINE)
    assert (home / "run" / "thesis.txt").read_text() == "mine"
    done = as_yaml(make_job(home, "taken"), home / "taken.yaml")
    assert "output               holds this training, done" in planned(done).stdout
    shutil.rmtree(naming.path_of(home / "taken" / "checkpoints", 4))
    shown = planned(done)
    assert "holds this training up to step 3: train goes on from there" in shown.stdout
    assert "warning" not in shown.stderr
    assert "output               new" in planned(as_yaml(make_job(home, "new"), home / "new.yaml")).stdout


def test_plan_and_train_fit_the_terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both say at the end is folded for narrow terminals, and is as it is where nothing asks for that."""
    path = as_yaml(make_job(home), home / "job.yaml")
    train(make_job(home))
    calls = {"plan": ("plan", path, "--no-measure"), "train": ("train", path)}
    whole = {name: command(*call).stdout for name, call in calls.items()}
    monkeypatch.setenv("COLUMNS", "50")
    folded = {name: command(*call).stdout for name, call in calls.items()}
    assert folded["train"].split() == whole["train"].split()
    for name, text in folded.items():
        wide, narrow = (
            [len(line) for line in each.splitlines() if str(home) not in line]  # a path is not folded
            for each in (whole[name], text)
        )
        assert (max(wide) > 50, max(narrow) <= 50) == (True, True), text


def test_plan_says_how_long_it_takes(home: Path) -> None:
    """A small model takes a few steps at once, and writes nothing; a larger one when it is asked to, or not at all."""
    path = as_yaml(make_job(home, training={"steps": 40}), home / "job.yaml")
    shown = command("plan", path)
    assert re.search(r"^time +about .+ here: 40 steps of .+; from 3 steps just now$", shown.stdout, re.MULTILINE)
    facts = json.loads(command("plan", path, "--json").stdout)["time"]
    assert (facts["taken"], facts["step"] > 0, facts["evaluation"] > 0) == (3, True, True)
    # 21 measurements of the 40 steps, two after each other, and the start point's own
    assert facts["whole"] == pytest.approx(facts["loading"] + 40 * facts["step"] + 22 * facts["evaluation"])
    for arguments in (["--no-measure"], ["--processes", 2]):
        assert json.loads(command("plan", path, "--json", *arguments).stdout)["time"] is None
        assert "not measured: --measure takes a few steps" in command("plan", path, *arguments).stdout
    refused = command("plan", path, "--processes", 2, "--measure")
    assert (refused.exit_code, "in one process" in refused.stderr) == (2, True)
    assert not (home / "run").exists()
    assert sorted(path.name for path in home.iterdir()) == ["data.jsonl", "job.yaml", "model"]


@pytest.mark.parametrize("width", [60, 80])
def test_a_plan_fits_the_terminal(home: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """On a terminal words go on below one another, and no line is wider; in a pipe each fact is one line."""
    path = as_yaml(make_job(home, training={"steps": 40}), home / "job.yaml")
    piped = command("plan", path, "--no-measure").stdout
    assert max(map(len, piped.splitlines())) > 80
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
    monkeypatch.setenv("COLUMNS", str(width))
    shown = command("plan", path, "--no-measure").stdout
    assert max(map(len, shown.splitlines())) <= width
    assert shown.split() == piped.split()


def test_a_plan_of_much_work_takes_no_step_unasked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step would take long nothing is loaded to time it; what goes wrong unasked is a warning."""
    path = as_yaml(make_job(home), home / "job.yaml")

    def broken(_: Job) -> None:
        raise BadValue("the loss is not finite")

    monkeypatch.setattr("k2quant.qat.training.stepping.time_job", broken)
    shown = command("plan", path)
    assert (shown.exit_code, "warning: no step could be taken" in shown.stderr) == (0, True), shown.output
    assert command("plan", path, "--measure").exit_code == 1
    monkeypatch.setattr("k2quant.cli.qat.plan._SMALL", 6 * 100_000 * 4 * 32)
    assert "loss" not in command("plan", path).stderr
    assert command("plan", path, "--measure").exit_code == 1


@pytest.mark.parametrize("distill", [None, {}, {"top_k": 4}])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_steps_are_timed_without_a_trace(home: Path, distill: dict[str, Any] | None, steps: int) -> None:
    """A live teacher runs beside the steps that are timed, a cached one is not asked; the same job trains as before."""
    changes: dict[str, dict[str, Any]] = {
        "training": {"steps": steps},
        "data": {"held_out": 0 if steps == 1 else 4},
        **({} if distill is None else {"distill": distill}),
    }
    job = make_job(home, "run", **changes)
    timing = time_job(job)
    assert timing.taken == min(max(steps - 1, 1), 3)
    assert (timing.evaluation > 0) is (steps > 1)
    assert timing.whole > timing.loading + steps * timing.step - 1e-9
    assert not (home / "run").exists()


def test_plan_counts_what_a_teacher_says(home: Path) -> None:
    """Likeliest tokens that are kept on the disk are part of what it takes."""
    path = as_yaml(make_job(home, distill={"top_k": 4}), home / "job.yaml")
    facts = json.loads(command("plan", path, "--json").stdout)
    train(make_job(home, distill={"top_k": 4}))
    assert 0 <= (home / "run" / "teacher.safetensors").stat().st_size - facts["teacher_bytes"] < 1000
    assert facts["disk_needed"] == facts["checkpoints"] * facts["checkpoint_bytes"] + facts["teacher_bytes"]


def test_what_the_data_loses_is_told_before_the_first_step(home: Path) -> None:
    """A plan says what the tokenizer does not know, and so does a training before it begins."""
    (home / "data.jsonl").write_text('{"text": "abc\u2603"}\n' * 40)
    job = make_job(home)
    said: list[str] = []
    assert "\u2603" in command("plan", as_yaml(job, home / "job.yaml")).stdout
    train(job, stage=said.append)
    assert next(place for place, text in enumerate(said) if "\u2603" in text) < said.index("training")


def test_plan_for_processes(home: Path) -> None:
    """A batch that the processes cannot share is an error of the plan, not of the training hours later."""
    path = as_yaml(make_job(home), home / "job.yaml")
    assert command("plan", path, "--processes", 4).exit_code == 0
    shown = command("plan", path, "--processes", 3)
    assert (shown.exit_code, "3 processes" in shown.stderr) == (2, True)


def test_an_export_says_each_remark_once(home: Path) -> None:
    """What loading the base and planning the export both find is a note, and no warning beside it."""
    path = home / "model" / "config.json"
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": block}))
    shown = command("export", as_yaml(make_job(home), home / "job.yaml"), home / "out")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.count("the tensors are believed") == 1


def test_export_to_another_format(home: Path) -> None:
    """A run for INT4 is not exported as FP8."""
    train(make_job(home, training={"steps": 1}))
    shown = command("export", home / "run", home / "export", "--to", "fp8")
    assert (shown.exit_code, "trained for int4, not for fp8" in shown.stderr) == (2, True)
    with pytest.raises(UsageError):
        export_run(home / "run", home / "export", to="fp8")


def test_nothing_held_out(home: Path) -> None:
    """Without held-out rows no loss is shown that was not measured."""
    shown = command("train", as_yaml(make_job(home, data={"held_out": 0}), home / "job.yaml"))
    assert shown.exit_code == 0, shown.output
    assert "no rows were held out" in shown.stdout
    assert "0.0000" not in shown.stdout


def test_output_error_is_no_traceback(home: Path) -> None:
    """A folder that cannot be written is an output error with its name."""
    (home / "run").write_text("a file")
    with pytest.raises(OutputError, match="not a folder"):
        train(make_job(home))


# --- the script -------------------------------------------------------------------------------------------------------


def forked(act: Callable[[], object], at: Callable[[int], None] | None = None) -> bool:
    """Do something in a child; tell whether it was killed.

    Args:
        act: what.
        at: called with the child's process id, to kill it.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # after a fork torch makes its threads anew, which two readers at once break
            act()
        except BaseException as error:  # noqa: BLE001  the child must not go on with the parent's work
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    if at is not None:
        at(child)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        sys.exit("a child failed")
    return os.WIFSIGNALED(status)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Draw no picture meanwhile: of a run that nobody kills, the page is most of the time, and no one looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2quant.report.drawing._svg", lambda *_: "")
        yield


def exported(run: Path) -> dict[str, bytes]:
    """Export a run in a child; return the shards."""
    shutil.rmtree(run.parent / "export", ignore_errors=True)
    forked(lambda: export_run(run, run.parent / "export", workers=1))
    return {path.name: path.read_bytes() for path in (run.parent / "export").glob("*.safetensors")}


def kill_at_random(sources: Path, folder: Path) -> int:
    """Kill trainings at random moments, and compare them with those that were left alone; return the kills."""
    dice = random.Random(SEED)  # noqa: S311  not for secrets
    return sum(kill_one(sources, folder / mode, changes, dice) for mode, changes in MODES.items())


def kill_one(sources: Path, folder: Path, changes: dict[str, Any], dice: random.Random) -> int:
    """Kill one of them twice."""
    whole = {"training": {"steps": 8}, **changes}
    job, other = (make_job(sources, str(folder / name), **whole) for name in ("reference", "run"))
    with undrawn():
        train(job)  # loads all there is to load, for all children
    kills, killed = 0, True

    def moment(child: int) -> None:
        begun = time.monotonic()
        while not naming.found(folder / "run" / "checkpoints") and time.monotonic() < begun + 60:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    for _ in range(2):
        if killed:
            killed = forked(lambda: train(other), moment)
            kills += killed
    with undrawn():
        if forked(lambda: train(other)):
            sys.exit("a child died that nobody killed")
    run, reference = contents(folder / "run"), contents(folder / "reference")
    if run != reference:
        names = sorted(name for name in run.keys() | reference.keys() if run.get(name) != reference.get(name))
        sys.exit(f"killed {kills} times and resumed, the run differs in {', '.join(names)}")
    if exported(folder / "run") != exported(folder / "reference"):
        sys.exit("killed and resumed, the export differs")
    return kills


def kill_at_operations(sources: Path, folder: Path) -> int:
    """Kill a training before file operations of its saves, and compare it with one that was left alone."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("kill_everywhere", SHARED / "kill_everywhere.py")
    assert spec
    assert spec.loader
    everywhere = module_from_spec(spec)
    spec.loader.exec_module(everywhere)
    changes = {"training": {"steps": 3}, "saving": {"every": 1, "keep": 1}}
    job, other = (make_job(sources, str(folder / name), **changes) for name in ("reference", "run"))

    def recorded() -> None:
        log = (folder / "log").open("w")

        def armed(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if name != "open" or arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                    log.write(f"{name}\n")
                return operation(*arguments, **options)

            return call

        for name in everywhere.OPERATIONS:
            setattr(os, name, armed(name, getattr(os, name)))
        train(job)
        log.close()

    train(job, restart=True)  # loads all there is to load, for all children
    shutil.rmtree(folder / "reference")
    forked(recorded)
    names = (folder / "log").read_text().splitlines()
    telling = [place for place in range(1, len(names)) if (names[place], names[place - 1]) != ("pwrite", "pwrite")]
    dice, kills = random.Random(SEED), 0  # noqa: S311  not for secrets
    for place in dice.sample(telling, min(KILLS, len(telling))):
        shutil.rmtree(folder / "run", ignore_errors=True)

        def act(number: int = place + 1) -> None:
            everywhere.arm(number)
            train(other)

        kills += forked(act)
        last = naming.found(folder / "run" / "checkpoints")[-1:]
        whole = [set(load_file(path / "weights.safetensors")) for path in last if checkpoints.read_state(path)]
        if last and not whole:
            sys.exit(f"killed at {place}, the last checkpoint is not whole")
        forked(lambda: train(other))
        if contents(folder / "run") != contents(folder / "reference"):
            sys.exit(f"killed at {place} ({names[place]}) and resumed, the run differs")
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    act_ = {"random": kill_at_random, "operations": undrawn()(kill_at_operations)}[sys.argv[1]]
    sys.stdout.write(f"{act_(Path(sys.argv[2]), Path(sys.argv[3]))}\n")
