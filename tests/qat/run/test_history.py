"""A run and what it has recorded: a history with a hole is never built on, and nothing that is recorded is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from k2quant.errors import BadValue, MalformedFile
from k2quant.qat.exporting.export import export_run
from k2quant.qat.job import Job, job_from
from k2quant.qat.run.history import StepRecord, read_history
from k2quant.qat.run.summary import read_summary
from k2quant.qat.training.stepping import Stepper
from k2quant.qat.training.training import train
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")


def make_job(folder: Path, **changes: dict[str, Any]) -> Job:
    """Return a job of four steps; checkpoints after two and four."""
    return job_from(job_content(folder, "run", **changes))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and a finished run. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("history")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    train(make_job(folder))
    return folder


@pytest.fixture
def home(sources: Path, ram: Path) -> Path:
    """A folder of one's own with model, data and a finished run, whose job names the sources' model and data."""
    shutil.copytree(sources / "run", ram / "run")
    return ram


def job_of(sources: Path, home: Path, **changes: dict[str, Any]) -> Job:
    """Return the job of the sources, in a folder of one's own."""
    found = make_job(sources, **changes)
    object.__setattr__(found, "output", str(home / "run"))
    return found


def files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Return what a run's folder says of itself, with the times of writing."""
    names = ("history.jsonl", "summary.json", "report.html")
    return {
        name: ((run / name).stat().st_mtime_ns, (run / name).read_bytes()) for name in names if (run / name).exists()
    }


def without(*lacking: tuple[str, int]) -> Callable[[Path], None]:
    """Return what takes records out of a history."""

    def change(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if (json.loads(line)["kind"], json.loads(line)["step"]) not in lacking]
        assert len(kept) == len(lines) - len(lacking)
        path.write_text("".join(kept))

    return change


def shortened(path: Path) -> None:
    """Cut off the last bytes."""
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    """Leave nothing of it."""
    path.write_bytes(b"")


def spoilt(path: Path) -> None:
    """Put a line before it that is no record."""
    path.write_text("{\n" + path.read_text())


def back_to(step: int, run: Path) -> None:
    """Take a run back to an earlier checkpoint."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{step:08}":
            shutil.rmtree(path)


DAMAGE: dict[str, tuple[int, Callable[[Path], None], str]] = {
    "its last bytes are gone": (
        4,
        shortened,
        "expected the evaluation after step 4, found 4 of 4 steps and 2 of 3 evaluations",
    ),
    "it is empty": (4, emptied, "expected step 1, found 0 of 4 steps and 0 of 3"),
    "it is gone": (4, Path.unlink, "No such file"),
    "it is gone, and steps are left": (2, Path.unlink, "No such file"),
    "a hole": (2, without(("step", 2)), "expected step 2, found 1 of 2 steps and 2 of 2"),
    "a hole at the front": (4, without(("step", 1)), "expected step 1, found 3 of 4 steps"),
    "an evaluation is gone": (2, without(("evaluation", 0)), "expected the evaluation after step 0"),
    "a line is damaged": (2, spoilt, "line 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_history(sources: Path, home: Path, damage: str) -> None:
    """No run, finished or not, goes on with half a history: one line says why and what to do, and all files stay."""
    step, change, said = DAMAGE[damage]
    back_to(step, home / "run")
    change(home / "run" / "history.jsonl")
    before = files(home / "run")
    with pytest.raises(MalformedFile, match=r"history\.jsonl") as error:
        train(job_of(sources, home))
    assert said in str(error.value)
    assert "`restart=True`" in str(error.value)
    assert "\n" not in str(error.value)
    assert files(home / "run") == before


def test_export_of_a_damaged_history(sources: Path, home: Path) -> None:
    """An export needs no history: it is the same without one."""
    (home / "run" / "history.jsonl").unlink()
    export_run(home / "run", home / "without")
    export_run(sources / "run", home / "with")
    for path in sorted((home / "with").glob("*.safetensors")):
        assert path.read_bytes() == (home / "without" / path.name).read_bytes()


def test_restart_of_a_damaged_history(sources: Path, home: Path) -> None:
    """What the error advises works: begun anew, the run has its records again."""
    (home / "run" / "history.jsonl").write_text("{\n")
    assert train(job_of(sources, home), restart=True).resumed == 0
    ours, theirs = (read_history(folder / "run" / "history.jsonl") for folder in (home, sources))
    assert ours.evaluations == theirs.evaluations
    assert [record.step for record in ours.steps] == [1, 2, 3, 4]


def test_damage_behind_the_first_checkpoint_is_cut(sources: Path, home: Path) -> None:
    """Records behind the checkpoint may be torn or lacking: their steps are taken again, to the same losses."""
    back_to(2, home / "run")
    path = home / "run" / "history.jsonl"
    without(("step", 3))(path)
    shortened(path)
    assert train(job_of(sources, home)).resumed == 2
    ours, theirs = (read_history(folder / "run" / "history.jsonl") for folder in (home, sources))
    assert ours.evaluations == theirs.evaluations
    assert [record.loss for record in ours.steps] == [record.loss for record in theirs.steps]


@pytest.mark.parametrize(("every", "held_out"), [(3, 4), (2, 0), (100, 4)])
def test_whole_histories_are_taken(sources: Path, ram: Path, every: int, held_out: int) -> None:
    """Steps that are no multiple of the evaluations' distance, and runs without held-out rows, resume as before."""
    job = job_of(sources, ram, training={"evaluate_every": every}, data={"held_out": held_out})
    last = train(job).evaluation
    assert (last is None) == (held_out == 0)
    assert train(job).evaluation == last
    back_to(2, ram / "run")
    again = train(job)
    assert (again.resumed, again.evaluation) == (2, last)


def test_nothing_is_kept_without_a_checkpoint(sources: Path, home: Path) -> None:
    """A run that has no checkpoint yet begins anew, whatever a kill has left of its history."""
    shutil.rmtree(home / "run" / "checkpoints")
    (home / "run" / "history.jsonl").write_bytes(b"{\n\x00\n")
    assert train(job_of(sources, home)).resumed == 0
    ours, theirs = (read_history(folder / "run" / "history.jsonl") for folder in (home, sources))
    assert ours.evaluations == theirs.evaluations


def test_report_of_a_finished_run_stays(sources: Path, home: Path, sketched: pytest.MonkeyPatch) -> None:
    """Trained before, a run gives the evaluation that it recorded, and its page is written only where it is missing."""
    sketched.undo()
    before = files(home / "run")
    (home / "run" / "report.html").write_text("as it was")
    result = train(job_of(sources, home))
    assert result.evaluation == read_history(home / "run" / "history.jsonl").evaluations[-1]
    assert (home / "run" / "report.html").read_text() == "as it was"
    (home / "run" / "report.html").unlink()
    train(job_of(sources, home))
    assert {name: content for name, (_, content) in files(home / "run").items()} == {
        name: content for name, (_, content) in before.items()
    }


def test_start_point_that_is_not_finite(sources: Path, home: Path) -> None:
    """A base with NaN is named before anything is recorded."""
    shutil.rmtree(home / "run")
    shutil.copytree(sources / "model", home / "model")
    for path in (home / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    shutil.copy(sources / "data.jsonl", home)
    with pytest.raises(
        BadValue, match=r"/model: the held-out loss of the start point is not finite, found nan in BF16"
    ):
        train(make_job(home))
    assert not (home / "run" / "history.jsonl").read_bytes()


def test_held_out_loss_that_is_not_finite(sources: Path, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that spoils the weights is named at the next evaluation, and no loss of them is recorded."""
    job, step = job_of(sources, ram, training={"steps": 1}), Stepper.step

    def spoiling(self: Stepper, number: int) -> StepRecord:
        found = step(self, number)
        self.model.get_parameter("model.norm.weight").data[0] = float("inf")
        return found

    monkeypatch.setattr(Stepper, "step", spoiling)
    with pytest.raises(BadValue, match=r"the held-out loss after step 1 is not finite.*try a lower rate"):
        train(job)
    assert [record.step for record in read_history(ram / "run" / "history.jsonl").evaluations] == [0]


def test_start_choices_are_of_real_tokens(sources: Path) -> None:
    """What the routers of the start model chose is counted without padding: two experts for each real token."""
    (router,) = read_summary(sources / "run").routers
    assert router.start_load is not None
    assert len(router.start_load) == router.experts == 8
    assert sum(router.start_load) == 2 * 4 * 25  # of 4 rows of 32: a mark of the beginning, and 24 letters
