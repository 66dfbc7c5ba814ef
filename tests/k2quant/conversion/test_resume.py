"""What a folder that was begun may be used for: records that count, folders that are refused, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.writing.destination import Destination
from k2quant.conversion import resume
from k2quant.conversion.plan import Options, Plan
from k2quant.errors import DestinationStale, OutputError, UsageError


class Folder(Destination):
    """A destination: what its journal and report say, and what was done to it."""

    def __init__(self, folder: Path, journal: list[Any] | None = None, report: dict[str, Any] | None = None) -> None:
        super().__init__(folder, report=REPORT, incomplete=INCOMPLETE)
        self._records, self._finished = journal or [], report
        self.begun: list[Any] = []
        self.deleted: list[str] = []
        self.cleared: list[str] | None = None

    def journal(self) -> list[Any]:
        """Return its records."""
        return self._records

    def finished_report(self) -> dict[str, Any] | None:
        """Return its report."""
        return self._finished

    def begin(self, records: list[Any]) -> None:
        """Remember what was written."""
        self.begun = records

    def delete(self, files: Sequence[str]) -> None:
        """Remember what was deleted."""
        self.deleted = list(files)

    def clear(self, files: list[str]) -> None:
        """Remember what was cleared."""
        self.cleared = files


FACTS: dict[str, Any] = {"from": "bf16", "to": "int4", "shape": [2, 2], "crc32": {}}


def record(shard: str = "one", size: int = 10, tensors: Any = None) -> dict[str, Any]:
    """Return what a journal says of a finished shard."""
    return {"shard": shard, "size": size, "tensors": {"w": FACTS} if tensors is None else tensors}


def stamps(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Return what changes with files of a folder."""
    found = {name: (folder / name).stat() for name in names}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def plan(folder: Path, **changes: Any) -> Plan:
    """Return a plan of two shards of ten bytes, with one other file of the source."""
    shards = tuple(
        SimpleNamespace(file=file, size=10, jobs=(SimpleNamespace(output_main=SimpleNamespace(name="w")),))
        for file in ("one", "two")
    )
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").write_bytes(b"xyz")
    known: dict[str, Any] = {
        "values": None,
        "method": None,
        "inputs": None,
        "companions": {},
        "options": Options(to="int4", ignore=("a", "b")),
        "copies": ["tokenizer"],
        "shards": shards,
        "bytes_written": 50,
        "index": b"12345",
        "config": b"123",
        "source": SimpleNamespace(folder=folder, fingerprint=lambda: {"index": "abc"}, stamps=partial(stamps, folder)),
    }
    found = known | changes
    last = {INDEX: found["index"], CONFIG: found["config"]}
    return cast("Plan", SimpleNamespace(**found, last={name: data for name, data in last.items() if data is not None}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the source's folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the destination's folder, with both shards whole."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_bytes(bytes(10))
    return folder


def head(made: Plan) -> dict[str, Any]:
    """Return the first record of a journal of this plan."""
    found = Folder(Path())
    resume.begin(found, made, fresh=True)
    first: dict[str, Any] = found.begun[0]
    return first


@pytest.mark.parametrize(("here", "there"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "b/../a"), ("link", "a")])
def test_source_and_destination_are_two_folders(here: str, there: str, tmp_path: Path) -> None:
    """The same one, by whatever path, and one inside the other are refused."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(UsageError, match="neither inside the other"):
        resume.refuse_nested(tmp_path / here, tmp_path / there)
    resume.refuse_nested(tmp_path / "a", tmp_path / "ab")


def test_a_path_that_leads_nowhere_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    """A name with a zero byte is no path."""
    with pytest.raises(UsageError, match="cannot be resolved"):
        resume.refuse_nested(tmp_path / "a\0", tmp_path)


def test_two_runs_are_one_where_options_source_and_other_files_are(source: Path) -> None:
    """Size and time of the files beside the weights count, too."""
    first = resume.identity(plan(source))
    status = (source / "tokenizer").stat()
    assert first == {
        "values": None,
        "options": Options(to="int4", ignore=("a", "b")).as_json(),
        "source": {"index": "abc", "other_files": {"tokenizer": [3, status.st_mtime_ns]}},
    }


def test_files_that_make_a_folder_look_finished_come_first(source: Path) -> None:
    """Config, index and report, then shards, then what is copied."""
    assert resume.output_files(plan(source)) == [CONFIG, INDEX, REPORT, "one", "two", "tokenizer"]


def test_a_journal_that_is_continued_counts_the_shards_that_stand(source: Path, out: Path) -> None:
    """The first record must say the same; of the others those count whose shard is there and whole."""
    made = plan(source)
    begun = Folder(out, [head(made), record(), record("two", size=9), record("three")])
    assert resume.finished_shards(begun, made) == {"one": record()}
    assert resume.finished_shards(Folder(out), made) == {}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("options", "other options"),
        ("source", "another source"),
        ("values", "other values"),
        ("version", "another version"),
        ("journal", "another journal"),
    ],
)
def test_a_journal_of_something_else_is_refused(key: str, words: str, source: Path, out: Path) -> None:
    """The message says what is another."""
    made = plan(source)
    begun = Folder(out, [head(made) | {key: "other"}, record()])
    with pytest.raises(DestinationStale, match=f"half-finished conversion of {words}"):
        resume.finished_shards(begun, made)


def test_a_journal_of_another_method_is_refused(source: Path, out: Path) -> None:
    """One by other statistics is named; where the options say it already, they alone are."""
    made = plan(source, method={"asked": "imatrix", "stats": "a"})
    for other, words in (
        ({"method": {"asked": "imatrix", "stats": "b"}}, "of another method, other statistics or other data;"),
        ({"method": {"asked": "mse"}, "options": "other"}, "conversion of other options;"),
    ):
        with pytest.raises(DestinationStale, match=words):
            resume.finished_shards(Folder(out, [head(made) | other, record()]), made)
    assert resume.finished_shards(Folder(out, [head(made), record()]), made)


def test_a_folder_that_was_being_emptied_is_refused(source: Path, out: Path) -> None:
    """Its journal names files and no options."""
    with pytest.raises(DestinationStale, match="being emptied"):
        resume.finished_shards(Folder(out, [{"files": []}]), plan(source))


@pytest.mark.parametrize(
    "bad",
    [
        record("three"),
        record(cast("Any", 1)),
        record(size=9),
        record(tensors=[]),
        record(tensors={}),
        record(tensors={"w": FACTS, "v": FACTS}),
        record(tensors={"w": None}),
        record(tensors={"w": {**FACTS, "more": 1}}),
        record(tensors={"w": {key: value for key, value in FACTS.items() if key != "to"}}),
        record(tensors={"w": FACTS | {"crc32": []}}),
        record(tensors={"w": FACTS | {"shape": {}}}),
        record(tensors={"w": FACTS | {"figures": []}}),
        record(tensors={"w": FACTS | {"scales": []}}),
    ],
)
def test_a_record_that_is_not_sound_does_not_count(bad: dict[str, Any], source: Path, out: Path) -> None:
    """Of no shard of the plan, of another size, or without what the report needs of each tensor."""
    made = plan(source)
    assert resume.finished_shards(Folder(out, [head(made), bad]), made) == {}


def test_figures_may_be_there_or_not(source: Path, out: Path) -> None:
    """A tensor that was copied has none; only one that was searched has facts of its scales."""
    made, good = plan(source), record(tensors={"w": FACTS | {"figures": {"count": 1}, "scales": {"relative": 1}}})
    assert resume.finished_shards(Folder(out, [head(made), good]), made) == {"one": good}


@pytest.mark.parametrize("state", ["absent", "short", "long", "folder", "link"])
def test_a_shard_that_does_not_stand_whole_is_written_again(state: str, source: Path, out: Path) -> None:
    """Gone, of another length, or no file of its own."""
    path = out / "one"
    path.unlink()
    if state == "folder":
        path.mkdir()
    elif state == "link":
        path.symlink_to("two")
    elif state != "absent":
        path.write_bytes(bytes({"short": 9, "long": 11}[state]))
    made = plan(source)
    found = resume.finished_shards(Folder(out, [head(made), record(), record("two")]), made)
    assert list(found) == ["two"]


def test_a_journal_begins_with_what_is_made_and_what_is_done(source: Path, out: Path) -> None:
    """While a shard is missing, what would make the folder look finished is deleted; a clearing's journal is over."""
    made = plan(source)
    half = Folder(out, [head(made), record()])
    assert list(resume.begin(half, made, fresh=False)) == ["one"]
    assert half.begun == [head(made), record()]
    assert half.begun[0]["files"] == resume.output_files(made)
    assert half.begun[0]["journal"] == 1  # another number is another shape, and older journals say 1
    assert half.deleted == [CONFIG, INDEX, REPORT]
    whole = Folder(out, [head(made), record(), record("two")])
    assert list(resume.begin(whole, made, fresh=False)) == ["one", "two"]
    assert whole.deleted == []
    assert resume.begin(Folder(out, [{"files": []}]), made, fresh=True) == {}


def test_missing_bytes_are_those_that_are_not_there_yet(source: Path, out: Path) -> None:
    """What is done needs no room, and what is replaced gives its own back, a partial file too."""
    made = plan(source)
    assert resume.room(made, out, {}).needed == 50 - 20
    assert resume.room(made, out, {"one": {}}).needed == 50 - 10 - 10
    (out / "two.partial").touch()
    os.truncate(out / "two.partial", 1 << 20)  # as a run begins it: all of it a hole
    assert resume.room(made, out, {"one": {}}).needed == 50 - 10 - 10
    (out / "two.partial").write_bytes(bytes(7))
    assert resume.room(made, out, {"one": {}}).needed == 50 - 10 - 17
    (out / "one.partial").write_bytes(bytes(7))
    assert resume.room(made, out, {"one": {}}).needed == 50 - 10 - 17  # that shard is not replaced


@pytest.mark.parametrize(("free", "enough"), [(29, False), (30, True), (31, True)])
def test_a_disk_that_is_too_small_is_refused(
    free: int,
    enough: bool,  # noqa: FBT001  a parameter of the test
    source: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """30 bytes are missing: 30 free ones will do."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = Folder(out)
    if enough:
        resume.begin(found, plan(source), fresh=False)
        assert found.begun
        return
    with pytest.raises(OutputError, match=r"too small.*30 bytes free.*found 29 bytes"):
        resume.begin(found, plan(source), fresh=False)
    assert not found.begun


def test_a_finished_folder_is_that_of_the_same_call_and_whole(source: Path, out: Path) -> None:
    """Every file of the report has its size there; index and config have those of the plan, where there is one."""
    made = plan(source)
    for name, size in ((INDEX, 5), (CONFIG, 3)):
        (out / name).write_bytes(bytes(size))
    shards = {"one": {"size": 10}, "two": {"size": 10}}
    report = resume.identity(made) | {"files": {**shards, INDEX: {"size": 5}, CONFIG: {"size": 3}}}
    finished = Folder(out, report=report)
    resume.check_finished(finished, report, made)
    with pytest.raises(DestinationStale, match="finished conversion of other options and another source"):
        resume.check_finished(finished, report | {"options": {}, "source": {}}, made)
    (out / CONFIG).write_bytes(bytes(4))
    resume.check_finished(finished, report | {"files": shards}, plan(source, config=None))
    for name, content, found in ((CONFIG, bytes(4), "4 bytes"), (INDEX, None, "nothing"), ("two", bytes(9), "9 bytes")):
        path = out / name
        before = path.read_bytes()
        path.write_bytes(content) if content is not None else path.unlink()
        (out / CONFIG).write_bytes(bytes(4 if name == CONFIG else 3))
        with pytest.raises(DestinationStale, match=rf"not whole any more.*found {found}") as caught:
            resume.check_finished(finished, report, made)
        assert name in str(caught.value)
        path.write_bytes(before)


@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_a_whole_folder_of_a_release_that_writes_another_config_is_not_called_damaged(
    name: str, source: Path, out: Path
) -> None:
    """The kind: a message that is not so. All files are as its report has them: what differs is what would be made."""
    made = plan(source)
    sizes = {INDEX: 5, CONFIG: 3} | {name: 9}
    for file, size in sizes.items():
        (out / file).write_bytes(bytes(size))
    report = resume.identity(made) | {"version": "0.9", "files": {f: {"size": size} for f, size in sizes.items()}}
    with pytest.raises(DestinationStale, match=r"was finished by k2quant 0\.9, which wrote another") as caught:
        resume.check_finished(Folder(out, report=report), report, made)
    assert "`restart=True`" in str(caught.value)


@pytest.mark.parametrize("files", [{"one": 10}, {"one": {}}, {"one": {"size": "10"}}])
def test_a_report_without_a_size_is_of_no_whole_folder(files: Any, source: Path, out: Path) -> None:
    """What is not said is not believed."""
    made = plan(source)
    report = resume.identity(made) | {"files": files}
    with pytest.raises(DestinationStale, match=r"not whole any more.*one|one.*not whole any more"):
        resume.check_finished(Folder(out, report=report), report, made)


@pytest.mark.parametrize(
    ("journal", "report", "names"),
    [
        ([{"files": ["one", 2, "three"]}], None, ["one", "three"]),
        ([{"files": ["one"]}, {"files": ["two"]}, record()], {"files": {"two": {}}}, ["one"]),
        ([{"files": "one"}], None, []),
        ([{}], {"files": {"two": {}}}, []),
        ([], {"files": {"one": {"size": 1}, "two": None}}, ["one", "two"]),
        ([], {"files": ["one"]}, []),
        ([], {}, []),
        ([], None, []),
    ],
)
def test_what_is_cleared_is_what_journal_or_report_names(
    journal: list[Any], report: dict[str, Any] | None, names: list[str], out: Path
) -> None:
    """Names alone, the journal's where there is one; and always what makes a folder look finished."""
    found = Folder(out, journal, report)
    resume.clear(found)
    assert found.cleared == [CONFIG, INDEX, REPORT, *names]


def test_what_begin_would_find_is_found_without_a_touch(tmp_path: Path, source: Path) -> None:
    """A folder that is not there, or that is begun anew, has nothing finished."""
    assert resume.standing_shards(plan(source), tmp_path / "absent", restart=False) == {}
    (tmp_path / "empty").mkdir()
    assert resume.standing_shards(plan(source), tmp_path / "empty", restart=False) == {}
    assert resume.standing_shards(plan(source), tmp_path / "empty", restart=True) == {}
    assert list((tmp_path / "empty").iterdir()) == []


def test_begun_anew_nothing_that_stands_counts(source: Path, out: Path) -> None:
    """A shard that the journal has is found, unless the folder is to be written anew."""
    made = plan(source)
    (out / ".k2quant").mkdir()
    Destination(out, report=REPORT, incomplete=INCOMPLETE).begin([head(made), record()])
    assert resume.standing_shards(made, out, restart=False) == {"one": record()}
    assert resume.standing_shards(made, out, restart=True) == {}
