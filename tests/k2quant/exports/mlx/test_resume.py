"""Killed at any moment, an export for mlx-lm goes on to the same bytes; and what is not ours stays as it is."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.files.locks import take
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.writing.destination import Destination
from k2quant.conversion.convert import convert
from k2quant.errors import CheckpointError, DestinationForeign, DestinationInUse, DestinationStale, OutputError
from k2quant.exports import export_mlx, look_ahead_mlx
from kill_everywhere import arm, in_a_child, operations

SHARD = 3_000_000


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what stands in a folder under its name, the report aside: that has times in it."""
    if not folder.is_dir():
        return {}
    names = (path for path in folder.iterdir() if path.is_file() and path.name not in {REPORT, INCOMPLETE})
    return {path.name: path.read_bytes() for path in names if not path.name.endswith(".partial")}


@pytest.mark.parametrize("restart", [False, True])
def test_killed_at_any_operation_it_goes_on_to_the_same_bytes(k2_thinking: Path, ram: Path, *, restart: bool) -> None:
    """At writes, flushes, renames and removals: nothing has its name that is not whole, and the same call ends it.

    K2QUANT_KILLS has it killed at each; else at some in the middle, and at all of the last.
    """
    whole = files_of(export_mlx(k2_thinking, ram / "whole", workers=1, shard_size=SHARD).folder)
    before, there = ram / "before", ram / "out"
    before.mkdir()
    if restart:
        export_mlx(k2_thinking, before, workers=1)
    earlier = files_of(before)

    def begin() -> None:
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(before, there)

    def export() -> Any:
        return export_mlx(k2_thinking, there, workers=1, shard_size=SHARD, restart=restart)

    def killed_at(number: int) -> None:
        arm(number)
        export()

    begin()
    count = operations(export)
    some = (*range(1, count - 9, 97), *range(count - 9, count + 1))
    for number in range(1, count + 1) if "K2QUANT_KILLS" in os.environ else some:
        begin()
        assert in_a_child(partial(killed_at, number))
        left = files_of(there)
        assert left.items() <= (whole.items() | earlier.items())
        assert CONFIG not in left or left in (whole, earlier) or left.keys() < earlier.keys()
        done = export()
        assert files_of(there) == whole
        assert sorted(path.name for path in there.iterdir()) == sorted([*whole, REPORT])
        assert done.report["files"].keys() == whole.keys()


def test_only_what_is_missing_is_written(k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill shards that were finished are neither read nor written, and the report has them all."""
    whole = export_mlx(k2_thinking, tmp_path / "whole", workers=1, shard_size=SHARD)
    there = tmp_path / "out"
    shards: list[str] = []
    record = Destination.record

    def stop(self: Any, found: dict[str, Any]) -> None:
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(found["shard"])
        record(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            export_mlx(k2_thinking, there, workers=1, shard_size=SHARD)
    plan, done, room = look_ahead_mlx(k2_thinking, there, shard_size=SHARD)
    assert list(done) == shards
    assert room.needed < plan.size
    begun: list[str] = []
    writer = Destination.writer

    def noted(self: Any, file: str, header: bytes, size: int) -> Any:
        begun.append(file)
        return writer(self, file, header, size)

    monkeypatch.setattr(Destination, "writer", noted)
    found = export_mlx(k2_thinking, there, workers=1, shard_size=SHARD)
    assert begun
    assert not set(begun) & set(shards)
    assert (found.resumed, found.already_done) == (2, False)
    assert files_of(there) == files_of(whole.folder)
    assert found.report["tensors"] == whole.report["tensors"]


def test_a_finished_folder_is_left_alone(k2_thinking: Path, k2_bf16: Path, tmp_path: Path) -> None:
    """The same call does nothing; another is refused, and writes anew only where that was asked for."""
    there = tmp_path / "out"
    export_mlx(k2_thinking, there)
    before = files_of(there)
    (there / "README.md").write_text("mine")
    assert export_mlx(k2_thinking, there).already_done
    with pytest.raises(DestinationStale, match="a finished export of other options; write it anew"):
        export_mlx(k2_thinking, there, shard_size=SHARD)
    with pytest.raises(DestinationStale, match="a finished export of another source"):
        look_ahead_mlx(k2_bf16, there)
    export_mlx(k2_thinking, there, shard_size=SHARD, restart=True)
    assert len(list(there.glob("model-*-of-00001.safetensors"))) == 0
    export_mlx(k2_thinking, there, restart=True)
    assert files_of(there) == before | {"README.md": b"mine"}


def test_a_folder_that_lost_something_is_named(k2_thinking: Path, tmp_path: Path) -> None:
    """With both sizes, and what to do."""
    there = export_mlx(k2_thinking, tmp_path / "out").folder
    os.truncate(there / INDEX, 10)
    with pytest.raises(DestinationStale, match=r"not whole any more, expected \d+ bytes, found 10 bytes"):
        export_mlx(k2_thinking, there)


def test_conversions_and_exports_do_not_go_on_with_each_other(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished or half-finished, either is named as what it is."""
    there = convert(k2_thinking, tmp_path / "finished", to="bf16").folder
    with pytest.raises(DestinationStale, match="holds a finished conversion; write it anew"):
        export_mlx(k2_thinking, there)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name, work in (
        ("converted", lambda there: convert(k2_thinking, there, to="bf16")),
        ("exported", lambda there: export_mlx(k2_thinking, there)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                work(tmp_path / name)
    with pytest.raises(DestinationStale, match="holds a half-finished conversion; go on with"):
        export_mlx(k2_thinking, tmp_path / "converted")
    with pytest.raises(DestinationStale, match="half-finished"):
        convert(k2_thinking, tmp_path / "exported", to="bf16")
    export_mlx(k2_thinking, tmp_path / "converted", restart=True)
    assert files_of(tmp_path / "converted") == files_of(export_mlx(k2_thinking, tmp_path / "exported").folder)


def test_a_folder_of_somebody_is_not_written_to(k2_thinking: Path, tmp_path: Path) -> None:
    """Neither with `restart`: that throws away what an earlier run of ours left, and nothing else."""
    there = tmp_path / "out"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(DestinationForeign, match="not empty, and not written by k2quant"):
            export_mlx(k2_thinking, there, restart=restart)
    assert files_of(there) == {"notes.txt": b"mine"}


def test_two_exports_do_not_write_one_folder(k2_thinking: Path, tmp_path: Path) -> None:
    """The second is told who is at work."""
    work = tmp_path / "out" / ".k2quant"
    work.mkdir(parents=True)
    lock = take(work / "lock", folder=tmp_path / "out", soft=False)
    try:
        with pytest.raises(DestinationInUse):
            export_mlx(k2_thinking, tmp_path / "out")
    finally:
        lock.release()


@pytest.mark.parametrize("number", [0, 7, 60])
def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(
    k2_thinking: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a header, and in the middle; nothing looks finished."""
    count, real = itertools.count(), os.pwrite

    def pwrite(*arguments: Any) -> int:
        if next(count) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"cannot be written, found No space left on device; when that is mended"):
            export_mlx(k2_thinking, tmp_path / "out", shard_size=SHARD)
    assert not {CONFIG, INDEX, REPORT} & files_of(tmp_path / "out").keys()
    done = export_mlx(k2_thinking, tmp_path / "out", shard_size=SHARD).folder
    assert files_of(done) == files_of(export_mlx(k2_thinking, tmp_path / "other", shard_size=SHARD).folder)


def test_a_disk_that_is_too_small_is_named_first(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what is there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"too small, expected \d{7,} bytes free, found 1000 bytes"):
        export_mlx(k2_thinking, tmp_path / "out")
    assert look_ahead_mlx(k2_thinking, tmp_path / "new")[2].free == 1000
    assert not (tmp_path / "new").exists()


def test_a_source_that_changes_is_named(k2_thinking: Path, tmp_path: Path) -> None:
    """One that is cut short meanwhile ends in a sentence, and nothing looks finished."""
    source = shutil.copytree(k2_thinking, tmp_path / "source")

    def change(done: int, _: int) -> None:
        if done:
            os.truncate(source / "model-3-of-3.safetensors", 1000)

    with pytest.raises(CheckpointError, match=r"model-3-of-3.safetensors"):
        export_mlx(source, tmp_path / "out", workers=1, shard_size=SHARD, progress=change)
    assert not (tmp_path / "out" / CONFIG).exists()
