"""Killed at any moment, an export goes on and writes the same bytes; and what is not ours stays as it is."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.files.locks import take
from k2quant.conversion import stream
from k2quant.errors import DestinationForeign, DestinationInUse, DestinationStale, OutputError
from k2quant.exports import export_gguf, look_ahead_gguf
from k2quant.exports.gguf import writing
from kill_everywhere import arm, in_a_child, operations

SPLIT = 3_000_000


@pytest.fixture
def small(k2_thinking: Path) -> Path:
    """The source of all exports here."""
    return k2_thinking


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the GGUF files that have their names."""
    return {path.name: path.read_bytes() for path in folder.glob("*.gguf")}


@pytest.mark.parametrize(
    ("options", "old"),
    [({}, None), ({"split_size": SPLIT}, None), ({"split_size": SPLIT, "restart": True}, {"rest": "f32"})],
    ids=["one file", "several", "restarted"],
)
def test_killed_at_any_operation_it_goes_on_to_the_same_bytes(
    small: Path, ram: Path, options: dict[str, Any], old: dict[str, Any] | None
) -> None:
    """At writes, flushes, renames and removals: nothing has its name that is not whole, and the same call ends it.

    K2QUANT_KILLS has it killed at each; else at some in the middle, and at all of the last.
    """
    whole = files_of(export_gguf(small, ram / "whole" / "k2.gguf", workers=1, **options).file.parent)
    before, there = ram / "before", ram / "out" / "k2.gguf"
    before.mkdir()
    if old is not None:
        export_gguf(small, before / "k2.gguf", workers=1, **old)
    earlier = files_of(before)

    def begin() -> None:
        shutil.rmtree(there.parent, ignore_errors=True)
        shutil.copytree(before, there.parent)

    def killed_at(number: int) -> None:
        arm(number)
        export_gguf(small, there, workers=1, **options)

    begin()
    count = operations(lambda: export_gguf(small, there, workers=1, **options))
    some = (*range(1, count - 7, count // 3), *range(count - 7, count + 1))
    for number in range(1, count + 1) if "K2QUANT_KILLS" in os.environ else some:
        begin()
        assert in_a_child(partial(killed_at, number))
        left = files_of(there.parent)
        assert left.items() <= whole.items() or left.items() <= earlier.items()
        done = export_gguf(small, there, workers=1, **options)
        assert files_of(there.parent) == whole
        assert sorted(path.name for path in there.parent.iterdir()) == sorted([*whole, "k2.gguf.json"])
        assert done.report["files"].keys() == whole.keys()


def test_only_what_is_missing_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill parts that were finished are neither read nor written, and the report has them all."""
    whole = export_gguf(small, tmp_path / "whole.gguf", workers=1)
    there = tmp_path / "k2.gguf"
    parts: list[str] = []

    def stop(self: Any, record: dict[str, Any]) -> None:
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(record["shard"])
        self._folder.record(record)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(small, there, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2.gguf.partial", "whole.gguf", "whole.gguf.json"]
    plan, done, room = look_ahead_gguf(small, there)
    assert list(done) == parts
    assert room.needed < plan.size
    begun: list[str] = []
    writer = writing.Output.writer

    def noted(self: Any, file: str, header: bytes, size: int) -> Any:
        begun.append(file)
        return writer(self, file, header, size)

    monkeypatch.setattr(writing.Output, "writer", noted)
    found = export_gguf(small, there, workers=1)
    assert not set(begun) & set(parts)
    assert (found.resumed, found.already_done) == (2, False)
    assert there.read_bytes() == whole.file.read_bytes()
    assert found.report["tensors"] == whole.report["tensors"]


def test_a_finished_output_is_left_alone(small: Path, tmp_path: Path) -> None:
    """The same call does nothing; another one is refused, and writes anew only where that was asked for."""
    there = tmp_path / "k2.gguf"
    export_gguf(small, there)
    before = there.stat()
    done = export_gguf(small, there)
    assert done.already_done
    assert there.stat() == before
    with pytest.raises(DestinationStale, match="a finished export of other options; write it anew"):
        export_gguf(small, there, rest="q8_0")
    assert export_gguf(small, there, rest="q8_0", restart=True).report["options"]["rest"] == "q8_0"
    assert there.stat().st_size < before.st_size
    again = export_gguf(small, there, split_size=SPLIT, restart=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["k2.gguf.json", *(path.name for path in again.files)]
    )


def test_a_finished_output_that_is_cut_short_is_named(small: Path, tmp_path: Path) -> None:
    """With both sizes, and what to do."""
    there = export_gguf(small, tmp_path / "k2.gguf").file
    os.truncate(there, 1000)
    with pytest.raises(DestinationStale, match=r"not whole any more, expected \d+ bytes, found 1000 bytes"):
        export_gguf(small, there)


def test_a_half_finished_output_of_another_source_is_named(
    small: Path, k2_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of other options; what was begun stays as it is."""
    there = tmp_path / "k2.gguf"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(small, there)
    with pytest.raises(DestinationStale, match="half-finished export of another source"):
        export_gguf(k2_bf16, there)
    with pytest.raises(DestinationStale, match="half-finished export of other options"):
        export_gguf(small, there, rest="f32")
    assert export_gguf(small, there).resumed == len(look_ahead_gguf(small, tmp_path / "new.gguf")[0].export.shards)
    assert export_gguf(k2_bf16, there, restart=True).report["tensors"]


def stopped_when_named(source: Path, there: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Export, and be stopped when all files have their names and nothing says yet that they are whole."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_whole", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(source, there, **options)


def test_killed_twice_at_its_end_it_knows_its_own_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time before it looked at them: that they have their names already is not forgotten."""
    there = tmp_path / "k2.gguf"
    stopped_when_named(small, there, monkeypatch)
    before = there.stat()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(small, there)
    done = export_gguf(small, there)
    assert done.resumed == len(look_ahead_gguf(small, tmp_path / "new.gguf")[0].export.shards)
    assert there.stat() == before


def test_a_restart_takes_away_what_had_its_name_and_nothing_else(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a split model that was not finished yet; a file of somebody that has the new name is named."""
    there = tmp_path / "k2.gguf"
    stopped_when_named(small, there, monkeypatch, split_size=SPLIT)
    there.write_bytes(b"mine")
    with pytest.raises(DestinationForeign, match=r"k2.gguf: is there already"):
        export_gguf(small, there, restart=True)
    assert there.read_bytes() == b"mine"
    there.unlink()
    export_gguf(small, there, restart=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2.gguf", "k2.gguf.json"]


def test_where_the_report_goes_a_file_of_somebody_stays(small: Path, tmp_path: Path) -> None:
    """It is named before anything is written."""
    report = tmp_path / "k2.gguf.json"
    report.write_bytes(b"{}")
    with pytest.raises(DestinationForeign, match=r"k2.gguf.json: is there already"):
        export_gguf(small, tmp_path / "k2.gguf")
    assert report.read_bytes() == b"{}"
    assert [path.name for path in tmp_path.iterdir()] == ["k2.gguf.json"]


def test_a_file_of_somebody_is_not_written_over(small: Path, tmp_path: Path) -> None:
    """Neither with `restart`: that throws away what an earlier run of ours left, and nothing else."""
    there = tmp_path / "k2.gguf"
    there.write_bytes(b"mine")
    for restart in (False, True):
        with pytest.raises(DestinationForeign, match=r"k2.gguf: is there already, and was not written by this command"):
            export_gguf(small, there, restart=restart)
    assert there.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["k2.gguf"]


def test_a_report_that_lies_removes_nothing_else(small: Path, tmp_path: Path) -> None:
    """With `restart`, files that a report names are removed if they have the output's name, and no others."""
    there = export_gguf(small, tmp_path / "out" / "k2.gguf").file
    (tmp_path / "other.gguf").write_bytes(b"mine")
    (there.parent / "notes.txt").write_bytes(b"mine")
    (there.parent / "k3.gguf").write_bytes(b"mine")
    report = there.with_name("k2.gguf.json")
    content = json.loads(report.read_text())
    content["files"] |= {"../other.gguf": {}, "notes.txt": {}, "/etc/passwd": {}, "k3.gguf": {}}
    report.write_text(json.dumps(content))
    export_gguf(small, there, rest="f32", restart=True)
    assert (tmp_path / "other.gguf").read_bytes() == (there.parent / "notes.txt").read_bytes() == b"mine"
    assert (there.parent / "k3.gguf").read_bytes() == b"mine"


def test_a_copied_output_is_written_anew_without_the_first(small: Path, tmp_path: Path) -> None:
    """Its report names files of the first, which stay; what the report does not name is written over by nobody."""
    first = export_gguf(small, tmp_path / "first.gguf").file
    second = tmp_path / "second.gguf"
    shutil.copy(first, second)
    shutil.copy(tmp_path / "first.gguf.json", tmp_path / "second.gguf.json")
    before = first.read_bytes()
    with pytest.raises(DestinationForeign, match=r"second\.gguf: is there already"):
        export_gguf(small, second, rest="f32", restart=True)
    second.unlink()
    assert export_gguf(small, second, rest="f32", restart=True).file == second
    assert first.read_bytes() == before


def test_another_split_writes_over_no_part_of_somebody(small: Path, tmp_path: Path) -> None:
    """Parts that the report of the earlier output does not name are somebody's, with `restart`, too."""
    there = tmp_path / "k2.gguf"
    export_gguf(small, there)
    parts = [file.name for file in look_ahead_gguf(small, there, restart=True, split_size=SPLIT)[0].files]
    (tmp_path / parts[0]).write_bytes(b"mine")
    with pytest.raises(DestinationForeign, match=parts[0]):
        export_gguf(small, there, split_size=SPLIT, restart=True)
    assert (tmp_path / parts[0]).read_bytes() == b"mine"
    assert there.exists()


def test_two_exports_do_not_write_one_output(small: Path, tmp_path: Path) -> None:
    """The second is told who is at work; another output beside it is nobody's concern."""
    work = tmp_path / "k2.gguf.partial"
    (work / ".k2quant").mkdir(parents=True)
    lock = take(work / ".k2quant" / "lock", folder=work, soft=False)
    try:
        with pytest.raises(DestinationInUse):
            export_gguf(small, tmp_path / "k2.gguf")
        export_gguf(small, tmp_path / "other.gguf")
    finally:
        lock.release()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the disk be full at a write."""

    def arm_at(number: int) -> None:
        count, real = itertools.count(), os.pwrite

        def pwrite(*arguments: Any) -> int:
            if next(count) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        monkeypatch.setattr(os, "pwrite", pwrite)

    return arm_at


@pytest.mark.parametrize("number", [0, 5, 60])
def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(
    small: Path, tmp_path: Path, failing: Callable[[int], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the header, and in the middle; nothing has its name that is not whole."""
    there = tmp_path / "k2.gguf"
    failing(number)
    with pytest.raises(OutputError, match=r"cannot be written, found No space left on device; when that is mended"):
        export_gguf(small, there)
    assert not there.exists()
    monkeypatch.undo()
    monkeypatch.setattr("k2quant.exports.gguf.plan.vocabulary", lambda *_: ())
    assert export_gguf(small, there).file.stat().st_size == export_gguf(small, tmp_path / "b.gguf").file.stat().st_size


def test_a_disk_that_is_too_small_is_named_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, with what is needed and what is there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"too small, expected \d{7,} bytes free, found 1000 bytes"):
        export_gguf(small, tmp_path / "k2.gguf")
    assert look_ahead_gguf(small, tmp_path / "k2.gguf")[2].free == 1000
    assert list(tmp_path.iterdir()) == []


def test_a_link_where_a_file_is_made_is_not_followed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write beside the output cannot have another file overwritten."""
    target = tmp_path / "precious"
    target.write_bytes(b"mine")
    begin = stream.Stream.run

    def run(self: Any, workers: int) -> Any:
        (tmp_path / "k2.gguf.partial" / "k2.gguf").symlink_to(target)
        return begin(self, workers)

    monkeypatch.setattr(stream.Stream, "run", run)
    with pytest.raises(OutputError):
        export_gguf(small, tmp_path / "k2.gguf")
    assert target.read_bytes() == b"mine"


def test_a_source_that_changes_is_named(small: Path, tmp_path: Path) -> None:
    """One that is cut short while the export is planned ends in a sentence, and no file has its name."""
    from k2quant.errors import CheckpointError

    source = shutil.copytree(small, tmp_path / "source")

    def change(done: int, _: int) -> None:
        if done:
            os.truncate(source / "model-3-of-3.safetensors", 1000)

    with pytest.raises(CheckpointError, match=r"model-3-of-3.safetensors"):
        export_gguf(source, tmp_path / "k2.gguf", workers=1, progress=change)
    assert not (tmp_path / "k2.gguf").exists()
