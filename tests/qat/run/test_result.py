"""A training that is done: told at once from sizes and times, and by reading wherever these do not say it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.contents import contents
from k2quant.checkpoint.reader import Checkpoint
from k2quant.cli import main
from k2quant.errors import DestinationStale
from k2quant.qat.job import Job, job_from
from k2quant.qat.run import naming
from k2quant.qat.run.folder import DONE
from k2quant.qat.run.result import finished
from k2quant.qat.training.training import train
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, its model and data, and what it came to. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("finished")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    train(job_from(job_content(folder)))
    return folder


@pytest.fixture
def home(trained: Path, ram: Path) -> Path:
    """A copy of one's own, with the times of the first; it was moved, so paths differ."""
    shutil.copytree(trained, ram / "home")
    job = job_content(ram / "home")
    (ram / "home" / "job.yaml").write_text(json.dumps(job))
    return ram / "home"


def job_of(home: Path) -> Job:
    """Return the job of a folder."""
    return job_from(job_content(home))


def command(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, ["qat", "train", *(str(argument) for argument in arguments)])


def test_what_is_done_is_said_without_reading_it(home: Path) -> None:
    """Losses, answers and notes are those of the run, and neither torch nor transformers is loaded to say so."""
    code = (
        "import sys; from k2quant.cli import main\ntry: main()\nfinally: print(*{'torch', 'numpy'} & set(sys.modules))"
    )
    arguments = ["qat", "train", str(home / "job.yaml")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    *said, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert said[0] == f"{home / 'run'}: trained before, nothing to do"
    assert "no byte was\nread again" in done.stdout
    assert "trained, rounded" in done.stdout
    again = finished(job_of(home))
    assert again is not None
    assert (again.steps, again.resumed, again.checked) == (4, 4, "times")
    thorough = train(job_of(home))
    assert thorough._replace(seconds=0.0, checked="times") == again


def test_json_says_what_was_looked_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checked` is times without `--check`, and bytes with it: then everything is read."""
    assert json.loads(command(home / "job.yaml", "--json").stdout)["checked"] == "times"
    read: list[Path] = []

    def noting(found: Checkpoint) -> dict[str, str]:
        read.append(found.folder)
        return contents(found)

    monkeypatch.setattr("k2quant.qat.training.training.contents", noting)
    shown = command(home / "job.yaml", "--check")
    assert "trained before, nothing to do\n\n" in shown.stdout
    assert read == [home / "model"]
    assert json.loads(command(home / "job.yaml", "--check", "--json").stdout)["checked"] == "bytes"


def test_another_job_is_refused_at_once(home: Path) -> None:
    """A changed setting needs no byte of the model to be refused."""
    other = job_from(job_content(home, optimizer={"rate": 2e-3}))
    with pytest.raises(DestinationStale, match=r"optimizer\.rate"):
        finished(other)
    longer = job_from(job_content(home, training={"steps": 5}))
    with pytest.raises(DestinationStale, match=r"training\.steps"):
        finished(longer)


def touched(path: Path) -> None:
    """Let a file look as if it had been written again."""
    os.utime(path, ns=(1, 1))


def longer(path: Path) -> None:
    """Add a byte to a file, and leave its time."""
    before = path.stat()
    with path.open("ab") as file:
        file.write(b" ")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def gone(path: Path) -> None:
    """Delete a file."""
    path.unlink()


CHANGES = {
    "a shard's time": ("model/model-1-of-2.safetensors", touched),
    "a shard's size": ("model/model-2-of-2.safetensors", longer),
    "the tokenizer": ("model/tokenizer.json", touched),
    "the data": ("data.jsonl", longer),
    "the data's time": ("data.jsonl", touched),
    "a weight of the checkpoint": ("run/checkpoints/step-00000004/weights.safetensors", touched),
    "a file of the checkpoint": ("run/checkpoints/step-00000004/optimizer.safetensors", gone),
    "the checkpoint": ("run/checkpoints/step-00000004/state.json", gone),
    "the report": ("run/report.html", gone),
    "the history": ("run/history.jsonl", longer),
    "the manifest": ("run/k2quant_qat.json", gone),
    "the note": ("run/finished.json", gone),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_looks_otherwise_is_read(home: Path, name: str) -> None:
    """A file of model, data, checkpoint or report that has gone, or another size or time, is no longer believed."""
    place, change = CHANGES[name]
    assert finished(job_of(home)) is not None
    change(home / place)
    assert finished(job_of(home)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-2],
        lambda _: "[]",
        lambda _: "[" * 100_000,
        lambda text: text.replace('"starved": 0', '"starved": -1'),
        lambda text: text.replace('"notes": []', '"notes": [1]'),
        lambda text: text.replace('"notes": []', '"notes": 1'),
        lambda text: text.replace('"starved"', '"stuffed"'),
        lambda text: text.replace('"k2quant": "', '"k2quant": "0'),
        lambda text: text.replace('"steps": 4', '"steps": 3'),
        lambda text: text.replace('"run"', '"ran"'),
    ],
)
def test_a_damaged_note_costs_time_and_nothing_else(home: Path, damage: Callable[[str], str]) -> None:
    """It is a cache: whatever is wrong with it, or of another version, the files are read, and it is written anew."""
    note = home / "run" / DONE
    text = note.read_text()
    assert damage(text) != text
    note.write_text(damage(text))
    assert finished(job_of(home)) is None
    assert command(home / "job.yaml").exit_code == 0
    assert finished(job_of(home)) is not None


def test_a_training_that_goes_on_is_not_done(home: Path) -> None:
    """Without its last checkpoint it is trained on, though the note stands; a restart throws the note away first."""
    shutil.rmtree(naming.path_of(home / "run" / "checkpoints", 4))
    assert finished(job_of(home)) is None
    assert train(job_of(home)).resumed == 2
    assert finished(job_of(home)) is not None

    class Stopped(Exception):
        """Ends the training in the middle."""

    def stop(*_: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(job_of(home), restart=True, progress=stop)
    assert not (home / "run" / DONE).exists()


@pytest.mark.parametrize("name", ["data.jsonl", "model"])
def test_what_cannot_be_looked_at_is_one_line(home: Path, name: str) -> None:
    """A link to nothing in the place of data or model ends as ever, in a line that names it."""
    if (home / name).is_dir():
        shutil.rmtree(home / name)
    else:
        (home / name).unlink()
    (home / name).symlink_to("nowhere")
    shown = command(home / "job.yaml")
    assert shown.exit_code in {1, 2}, shown.output
    assert name in shown.stderr.splitlines()[-1]
    assert shown.stderr.splitlines()[-1].startswith("k2quant: ")


def test_a_dataset_of_a_hub_cannot_be_looked_at(home: Path) -> None:
    """What is no file here has no time: the note says nothing of it, and a file in its place is another thing."""
    job = job_of(home)
    hub = replace(job, data=replace(job.data, path="org/name"))
    assert finished(hub) is None
