"""Runs that end early: killed at any file operation, or by a full disk, they go on and end with equal bytes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2quant.calib.solving import choosing
from k2quant.calib.solving.passing import groups
from k2quant.calib.solving.writing import spool
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, open_checkpoint
from k2quant.errors import CheckpointError, DestinationForeign, DestinationStale, MalformedFile, OutputError

pytestmark = pytest.mark.usefixtures("one_thread")

Made = Callable[[Path], dict[str, Any]]


class Killed(BaseException):
    """Ends a run where a kill would."""


def stops(patch: pytest.MonkeyPatch, number: int, error: BaseException | None = None) -> Callable[[], int]:
    """Have the file operation of a number, and all after it, fail; return what counts them."""
    count = itertools.count(1)
    last = [0]

    def armed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            last[0] = next(count)
            if number and last[0] >= number:
                raise error or Killed
            return operation(*given, **options)

        return call

    patch.setattr(fcntl, "flock", lambda *_: None)  # a dead process's lock is gone, this one's is not
    for name in ("pwrite", "fsync", "rename", "unlink", "rmdir"):
        patch.setattr(os, name, armed(getattr(os, name)))
    return lambda: last[0]


def test_a_killed_run_goes_on_with_equal_bytes(
    place: Any, ram: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a layer, between layers, between shards and at the end: never finished, and the same in the end."""
    with pytest.MonkeyPatch.context() as patch:
        operations = stops(patch, 0)
        place.solve(ram / "whole", shard_size=40_000)
        total = operations()
    wanted = made(ram / "whole")
    settled: list[str] = []
    solved: list[int] = []

    def settle(weights: Any, *more: Any) -> Any:
        settled.extend(weights)
        return choosing.settle(weights, *more)

    monkeypatch.setattr(groups, "settle", settle)
    for number in [3, *range(20, total, total // 5), total - 4]:
        folder = ram / "killed"
        with pytest.MonkeyPatch.context() as patch:
            stops(patch, number)
            with pytest.raises(Killed):
                place.solve(folder, shard_size=40_000)
        assert (folder / INCOMPLETE).exists() or not (folder / CONFIG).exists() or made(folder) == wanted
        settled.clear()
        place.solve(folder, shard_size=40_000)
        solved.append(len(settled))
        assert made(folder) == wanted, f"killed at {number} of {total}"
        shutil.rmtree(folder)
    assert solved == sorted(solved, reverse=True)  # what stood was not solved again
    assert solved[0] > solved[len(solved) // 2] > solved[-1] == 0


def test_a_full_disk_loses_nothing(place: Any, whole: Path, made: Made, ram: Path) -> None:
    """Wherever it fills up, the error names the file, and the same call goes on when there is room."""
    for number in (60, 160):
        folder = ram / "full"
        with pytest.MonkeyPatch.context() as patch:
            stops(patch, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
                place.solve(folder)
        assert (folder / INCOMPLETE).exists()
        assert not (folder / CONFIG).exists()
        place.solve(folder)
        assert made(folder) == made(whole)
        shutil.rmtree(folder)


@pytest.fixture
def stopped(place: Any, ram: Path) -> Path:
    """A run that was stopped in its second layer."""
    count = itertools.count()

    def enough(weights: Any, *more: Any) -> Any:
        if next(count) == 12:
            raise KeyboardInterrupt
        return choosing.settle(weights, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "settle", enough)
        with pytest.raises(KeyboardInterrupt):
            place.solve(ram / "out", shard_size=10**9)
    return ram / "out"


def solved_files(folder: Path) -> list[Path]:
    """Return what waits for its shard."""
    return sorted((folder / ".k2quant" / "solved").rglob("*.safetensors"))


@pytest.mark.parametrize("harm", ["a bit", "the end", "a name"])
def test_a_changed_file_is_refused_by_name(place: Any, stopped: Path, harm: str) -> None:
    """What was solved is checked before it is used: bytes, length, and whose it is."""
    path = solved_files(stopped)[0]
    data = bytearray(path.read_bytes())
    if harm == "a bit":
        data[-5] ^= 1
    elif harm == "the end":
        del data[-1]
    path.write_bytes(data)
    if harm == "a name":
        path.rename(path.with_name("mlp.experts.7.down_proj.safetensors"))
    with pytest.raises(MalformedFile, match=r"not what was solved.*restart=True"):
        place.solve(stopped, shard_size=10**9)


@pytest.mark.parametrize("below", ["", "layer-00000"])
def test_nothing_is_written_through_a_link(place: Any, stopped: Path, tmp_path: Path, below: str) -> None:
    """Neither the folder of what is solved nor that of a layer may lead elsewhere."""
    path = stopped / ".k2quant" / "solved" / below
    shutil.rmtree(path)
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DestinationForeign, match="a link where k2quant keeps"):
        place.solve(stopped, shard_size=10**9)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_changed_source_is_noticed(place: Any, stopped: Path) -> None:
    """A matrix that was solved, and has other bytes when it is read again: by name, and nothing looks finished."""
    entry = open_checkpoint(place.model).tensors["model.layers.0.mlp.up_proj.weight"]
    shard = place.model / entry.file
    before, times = shard.read_bytes(), shard.stat()
    data = bytearray(before)
    data[entry.start] ^= 1
    try:
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj.*not the weight that was solved"):
            place.solve(stopped, shard_size=10**9)
        assert not (stopped / CONFIG).exists()
    finally:
        shard.write_bytes(before)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_restart_begins_anew(place: Any, whole: Path, made: Made, stopped: Path) -> None:
    """What an earlier run kept to go on from is thrown away with its shards."""
    path = solved_files(stopped)[0]
    path.write_bytes(b"")
    place.solve(stopped, restart=True)
    assert made(stopped) == made(whole)


def test_what_no_journal_explains_is_not_used(place: Any, made: Made, stopped: Path, ram: Path) -> None:
    """What is left of a run whose journal is gone does not get into one with other settings; a damaged one is said."""
    work = stopped / ".k2quant"
    journal = (work / "journal.jsonl").read_bytes()
    (work / "journal.jsonl").write_bytes(journal[:-9])
    with pytest.raises(DestinationStale, match=r"journal.*damaged.*restart=True"):
        place.solve(stopped, shard_size=10**9)
    assert solved_files(stopped)
    for path in (work / "journal.jsonl", stopped / INCOMPLETE):
        path.unlink()
    shutil.rmtree(work / "states")
    for folder in (stopped, ram / "new"):
        place.by(damping=0.5).solve(folder, shard_size=10**9)
    assert made(stopped) == made(ram / "new")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("facts", {}, "not what was solved"),
        ("facts", {"method": "gptq", "relative": 1e300, "measure": "weights"}, "not what was solved"),
        ("facts", ["gptq"], "not what was solved"),
        ("source", {"other": "0badcafe"}, "not the weight that was solved"),
    ],
)
def test_forged_notes_get_into_no_report(
    place: Any, stopped: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, error: str
) -> None:
    """Notes whose checksum is right are read as what a report says: nothing ends in one that nobody can read."""

    def forged(*given: Any) -> dict[str, Any]:
        return {base: {**own, key: value} for base, own in notes(*given).items()}

    notes = spool._notes  # noqa: SLF001  what reads them from a file
    monkeypatch.setattr(spool, "_notes", forged)
    with pytest.raises(CheckpointError, match=error):
        place.solve(stopped, shard_size=10**9)
    assert not (stopped / CONFIG).exists()
