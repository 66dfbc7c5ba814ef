"""`k2quant calibrate`, from a checkpoint and a file to a folder of statistics that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import k2quant
from k2quant.calib import calibrating
from k2quant.cli import main
from k2quant.errors import DestinationForeign, DestinationStale, UsageError
from tiny import write_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS: dict[str, Any] = {"samples": 8, "length": 32, "memory": "2GB"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small K2 and data for it. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_model(folder / "model")
    rows = [{"text": f"The square of {n} is {n * n}."} for n in range(150)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Return all that lies in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Statistics of the small K2, made in one go. Not to be changed by a test."""
    k2quant.calib.calibrate(place / "model", place / "stats", data=place / "data.jsonl", **ROWS)
    return place / "stats"


def typed(place: Path, stats: Path, *more: str) -> Result:
    """Return what the command says."""
    options = ["--data", str(place / "data.jsonl"), "--samples", "8", "--length", "32", "--memory", "2GB"]
    return CliRunner().invoke(main, ["calibrate", str(place / "model"), str(stats), *options, *more])


def test_the_command_writes_what_the_function_writes(place: Path, whole: Path, tmp_path: Path) -> None:
    """Byte for byte; a line says what was measured, and how the experts fared follows it."""
    done = typed(place, tmp_path / "stats")
    assert done.exit_code == 0, done.stderr
    assert content(tmp_path / "stats") == content(whole)
    first, *others = done.stdout.splitlines()
    assert " tokens of " in first
    assert "that judge" in first
    assert any(line.startswith("8 experts in 1 layer: ") for line in others)


def test_what_was_measured_is_told_as_json(place: Path, whole: Path) -> None:
    """On a finished folder the command says so, and all that it found."""
    done = typed(place, whole, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    stats = k2quant.calib.open_stats(whole)
    assert found["already_done"]
    assert found["fingerprint"] == stats.fingerprint
    assert found["data"] == {
        name: {"documents": part.documents, "tokens": part.tokens, "rows": part.rows}
        for name, part in stats.manifest.data.items()
    }
    assert found["coverage"] == k2quant.calib.coverage_of(stats).as_json()
    assert "already finished, nothing to do" in typed(place, whole).stdout


def test_a_model_may_be_moved(place: Path, whole: Path, tmp_path: Path) -> None:
    """The same weights in another folder are the same calibration."""
    (tmp_path / "moved").mkdir()
    for name, data in content(place / "model").items():
        (tmp_path / "moved" / name).write_bytes(data)
    assert k2quant.calib.calibrate(tmp_path / "moved", whole, data=place / "data.jsonl", **ROWS).already_done


@pytest.mark.parametrize("change", [{"samples": 9}, {"length": 33}, {"hessians": True}, {"reasoning": "drop"}])
def test_another_setting_is_refused(place: Path, whole: Path, change: dict[str, Any]) -> None:
    """A finished folder of other settings is neither taken for this calibration nor overwritten."""
    before = content(whole)
    with pytest.raises(DestinationStale):
        k2quant.calib.calibrate(place / "model", whole, data=place / "data.jsonl", **ROWS | change)
    assert content(whole) == before


def test_other_data_is_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    """One document more is other data, if it is read; `restart` measures it anew."""
    rows = (place / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(rows[:-20]) + "\n")
    done = typed(place, whole, "--data", str(tmp_path / "data.jsonl"))
    assert done.exit_code == 1
    assert "--restart" in done.stderr


def test_statistics_are_no_place_for_a_conversion(place: Path, whole: Path) -> None:
    """The refusal does not deny that k2quant wrote the folder; nothing in it is touched."""
    before = content(whole)
    with pytest.raises(DestinationForeign, match="not empty, and not written by this command"):
        k2quant.convert(place / "model", whole, "int4", restart=True)
    assert content(whole) == before


def test_a_run_that_was_stopped_goes_on_and_writes_the_same_bytes(place: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped in the second layer, the same call measures that layer alone, and says that it resumed."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    stats = tmp_path / "stats"
    with pytest.raises(KeyboardInterrupt):
        k2quant.calib.calibrate(place / "model", stats, data=place / "data.jsonl", **ROWS, progress=stop)
    assert not (stats / "k2quant_stats.json").exists()
    again = typed(place, stats, "--json")
    found = json.loads(again.stdout)
    assert (found["resumed"], found["already_done"]) == (1, False)
    assert "resumed: 1 layer finished before" in again.stderr
    assert content(stats) == content(whole)


def test_progress_counts_tokens_through_layers(place: Path, tmp_path: Path) -> None:
    """From none to all; before it, notes and what is being done are told."""
    told: list[tuple[int, int]] = []
    said: list[str] = []
    done = k2quant.calib.calibrate(
        place / "model",
        tmp_path / "stats",
        data=place / "data.jsonl",
        **ROWS | {"samples": 1000},
        stage=said.append,
        progress=lambda *now: told.append(now),
    )
    rows = sum(len(part.tokens) for part in (done.samples.train, done.samples.validation))
    assert told[-1] == (2 * rows * 32, 2 * rows * 32)
    assert told == sorted(told)
    assert said[0] == "reading the data"
    assert said[1].startswith("note: the data has ")


def test_a_dry_run_writes_nothing(place: Path, tmp_path: Path) -> None:
    """It says what an expert sees, disk, memory and time, for a model without its tokenizer too."""
    done = typed(place, tmp_path / "stats", "--dry-run")
    assert done.exit_code == 0, done.stderr
    heads = [line[:16].strip() for line in done.stdout.splitlines()]
    assert heads == [
        *("tokens", "an expert", "statistics", "hidden states", "disk needed", "disk free", "memory", "read", "time")
    ]
    found = json.loads(typed(place, tmp_path / "stats", "--dry-run", "--json").stdout)
    assert (found["mean"], found["fits"]) == (8 * 32 * 2 / 8, True)
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "1MB"], "--memory is too small"),
        (["--length", "500000"], "--length: expected at most the "),
        (["--validation", "nowhere.txt"], "--validation: 'nowhere.txt': no such file"),
        (["--reasoning", "keep"], "'keep' is not one of 'split', 'drop'"),
    ],
)
def test_slips_are_told_in_flags(place: Path, options: list[str], expected: str, tmp_path: Path) -> None:
    """One line, exit 2, and nothing written."""
    done = typed(place, tmp_path / "stats", *options)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert not (tmp_path / "stats").exists()


def test_statistics_inside_the_checkpoint_are_refused(place: Path) -> None:
    """Neither may lie in the other."""
    with pytest.raises(UsageError, match="must be two folders"):
        calibrating.calibrate(place / "model", place / "model" / "stats", data=place / "data.jsonl", **ROWS)


def test_a_calibration_says_itself_in_a_line(place: Path, whole: Path) -> None:
    """For whoever calls it in Python."""
    done = k2quant.calib.calibrate(place / "model", whole, data=place / "data.jsonl", **ROWS)
    assert repr(done).startswith("Calibration(folder=")
    assert "\n" not in repr(done)
    assert "tokens in" in repr(done.samples.train)
