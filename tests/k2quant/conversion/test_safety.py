"""Whatever goes wrong on the way, nothing is lost and nothing looks finished that is not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import k2quant
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.writing.destination import Destination
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.errors import (
    CheckpointError,
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    OutputError,
    UsageError,
)

SHARDS = tuple(f"model-{number}-of-3.safetensors" for number in (1, 2, 3))
JOURNAL = Path(".k2quant") / "journal.jsonl"


def write_source(folder: Path, *, code: int = 0x38) -> Path:
    """Write three shards of two block-FP8 weights each, and files beside them."""
    shards: dict[str, Shard] = {}
    for number, (file, name) in enumerate(zip(SHARDS, ("q_a_proj", "q_b_proj", "o_proj"), strict=True)):
        shard: Shard = {}
        for base in (f"model.layers.1.self_attn.{name}", f"model.layers.1.mlp.experts.{number}.up_proj"):
            shard[f"{base}.weight"] = ("F8_E4M3", np.full((64, 64), code + number, np.uint8))
            shard[f"{base}.weight_scale_inv"] = ("F32", np.ones((1, 1), np.float32))
        shards[file] = shard
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("pass\n")
    return folder


@pytest.fixture
def source(ram: Path) -> Path:
    """A source of three shards."""
    return write_source(ram / "source")


@pytest.fixture
def destination(ram: Path) -> Path:
    """A destination that does not exist yet."""
    return ram / "destination"


@pytest.fixture
def whole(ram: Path, source: Path) -> dict[str, bytes]:
    """What an undisturbed conversion of the source to INT4 writes, the report aside."""
    k2quant.convert(source, ram / "undisturbed", to="int4")
    return contents(ram / "undisturbed")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != REPORT
    }


def half_finished(folder: Path) -> None:
    """Check that a folder does not look like a model, and says why."""
    assert "resumes" in (folder / INCOMPLETE).read_text()
    assert not {CONFIG, INDEX, REPORT} & {path.name for path in folder.iterdir()}


class Stop(Exception):
    """Raised from a progress callback to stop a conversion where a test wants it."""


def stop(_done: int, _total: int) -> None:
    """Stop the conversion after its first piece of work."""
    raise Stop


def after_first_shard(destination: Path, act: Callable[[], None]) -> Callable[[int, int], None]:
    """Return a progress callback that acts once, when the first shard has its name and another is being written."""
    pending = [act]

    def progress(done: int, total: int) -> None:
        if pending and total / 3 < done < total:
            for _ in range(2000):  # the shard is flushed and renamed by a thread of its own
                if len((destination / JOURNAL).read_bytes().splitlines()) > 1:
                    break
                threading.Event().wait(0.001)
            pending.pop()()

    return progress


def begin(source: Path, destination: Path) -> None:
    """Leave a conversion to INT4 with one shard finished."""

    def act() -> None:
        raise Stop

    with pytest.raises(Stop):
        k2quant.convert(source, destination, to="int4", workers=1, progress=after_first_shard(destination, act))
    half_finished(destination)
    assert (destination / SHARDS[0]).exists()


def command(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, [str(argument) for argument in ("convert", *arguments)])


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_two_runs_on_one_destination(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """The second of two runs on one destination is refused, and the first does not notice."""
    at_work, go_on = threading.Event(), threading.Event()

    def progress(_done: int, _total: int) -> None:
        at_work.set()
        go_on.wait(30)

    run = threading.Thread(
        target=k2quant.convert,
        args=(source, destination),
        kwargs={"to": "int4", "workers": 1, "progress": progress},
    )
    run.start()
    try:
        assert at_work.wait(30)
        second = command("--to", "int4", source, destination)
        with pytest.raises(DestinationInUse):
            k2quant.convert(source, destination, to="int4", restart=True)
    finally:
        go_on.set()
        run.join()
    assert second.exit_code == 1
    assert "another k2quant works here" in second.stderr
    assert contents(destination) == whole


def test_two_runs_at_once(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """Of two runs that start together one does the work; the other is refused, or finds it done."""

    def run(outcomes: list[object]) -> None:
        try:
            outcomes.append(k2quant.convert(source, destination, to="int4", workers=1).already_done)
        except Exception as error:  # noqa: BLE001  looked at below
            outcomes.append(error)

    for _ in range(40):
        shutil.rmtree(destination, ignore_errors=True)
        outcomes: list[object] = []
        threads = [threading.Thread(target=run, args=(outcomes,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(False) == 1
        assert all(outcome in {True, False} or isinstance(outcome, DestinationInUse) for outcome in outcomes), outcomes
        assert contents(destination) == whole


def test_a_run_that_ends_while_another_looks_leaves_no_damaged_journal(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun when the other looked is finished when it reads the journal, which is not there any more."""
    k2quant.convert(source, destination, to="int4", workers=1)
    folder = Destination(destination, report=REPORT, incomplete=INCOMPLETE)
    folder.work.mkdir()
    folder.begin([{}])

    def ended(self: Destination) -> list[dict[str, Any]]:
        self.finish()
        return []

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "journal", ended)
        folder.refuse_foreign()
    assert folder.finished_report() is not None
    (destination / INCOMPLETE).touch()  # so it is damaged indeed
    with pytest.raises(DestinationStale, match="the journal of an earlier run is damaged"):
        folder.refuse_foreign()


_HOLD = """
import sys, time, k2quant
def progress(done, total):
    print("at work", flush=True)
    time.sleep(60)
k2quant.convert(sys.argv[1], sys.argv[2], to="int4", workers=1, progress=progress)
"""


def test_lock_dies_with_its_process(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """A run in another process holds the destination as long as it lives, and not a moment longer."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, source, destination], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"at work\n"
            assert command("--to", "int4", source, destination).exit_code == 1
            half_finished(destination)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert command("--to", "int4", source, destination).exit_code == 0
    assert contents(destination) == whole


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "model.safetensors", "config.json", "folder/x", "INCOMPLETE2"]
)
def test_foreign_folder(source: Path, destination: Path, name: str) -> None:
    """A folder that holds anything of someone else's is refused and left as it is, with --restart as well."""
    (destination / name).parent.mkdir(parents=True)
    (destination / name).write_text("precious")
    for options in ([], ["--restart"]):
        found = command("--to", "int4", source, destination, *options)
        assert found.exit_code == 1
        assert "not written by k2quant" in found.stderr
    assert contents(destination) == {name: b"precious"}


def test_destination_is_a_file(source: Path, destination: Path) -> None:
    """A file in the place of the destination is refused and left as it is."""
    destination.write_text("precious")
    with pytest.raises(DestinationForeign, match="not a folder"):
        k2quant.convert(source, destination, to="int4")
    assert destination.read_text() == "precious"


def test_journal_folder_is_a_link(source: Path, destination: Path, ram: Path) -> None:
    """A link in the place of our work folder is not followed."""
    destination.mkdir()
    (ram / "elsewhere").mkdir()
    (destination / ".k2quant").symlink_to(ram / "elsewhere")
    with pytest.raises(DestinationForeign, match="a link"):
        k2quant.convert(source, destination, to="int4")
    assert not list((ram / "elsewhere").iterdir())


@pytest.mark.parametrize("path", ["source", "source/inside", ".", "link", "link/inside", "source/../source/code"])
def test_nested_folders(source: Path, ram: Path, path: str) -> None:
    """A destination that is, holds or lies in the source is refused."""
    (ram / "link").symlink_to(source)
    before = contents(source)
    found = command("--to", "int4", source, ram / path)
    assert found.exit_code == 2
    assert "neither inside the other" in found.stderr
    assert contents(source) == before


def test_journal_folder_is_a_file(source: Path, destination: Path) -> None:
    """A file in the place of our work folder ends the run; nobody waits for it to go away."""
    destination.mkdir()
    (destination / ".k2quant").write_text("precious")
    with pytest.raises(OutputError):
        k2quant.convert(source, destination, to="int4")
    assert contents(destination) == {".k2quant": b"precious"}


def test_destination_is_a_loop_of_links(source: Path, destination: Path) -> None:
    """A destination that links to itself is refused."""
    destination.symlink_to(destination)
    with pytest.raises(k2quant.K2QuantError):
        k2quant.convert(source, destination, to="int4")


def test_empty_destination(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """An empty folder that is there already is taken."""
    destination.mkdir()
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


# --- again ------------------------------------------------------------------------------------------------------------


def _touch(source: Path) -> None:
    os.utime(source / SHARDS[2], ns=(0, 0))


def _rewrite(source: Path) -> None:
    shutil.rmtree(source)
    write_source(source, code=0x40)


def _edit_config(source: Path) -> None:
    (source / CONFIG).write_text('{"model_type": "deepseek_v3"}')


def _edit_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text("{ }")


def _drop_tensors(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    for name in [name for name, file in index["weight_map"].items() if file == SHARDS[1] and "self_attn" in name]:
        del index["weight_map"][name]
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("change", [_touch, _rewrite, _edit_config, _edit_tokenizer, _drop_tensors])
@pytest.mark.parametrize("finished", [False, True], ids=["half finished", "finished"])
def test_changed_source(source: Path, destination: Path, change: Callable[[Path], None], *, finished: bool) -> None:
    """A source that has changed since is refused, with the way out, and what stands there is kept."""
    if finished:
        k2quant.convert(source, destination, to="int4")
    else:
        begin(source, destination)
    before = contents(destination)
    change(source)
    found = command("--to", "int4", source, destination)
    assert found.exit_code == 1
    assert "another source" in found.stderr
    assert "--restart" in found.stderr
    assert contents(destination) == before
    assert command("--to", "int4", source, destination, "--restart").exit_code == 0
    assert k2quant.verify(source, destination).passed


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "bf16"],
        ["--to", "fp8"],
        ["--to", "int4", "--scope", "linear"],
        ["--to", "int4", "--ignore", "experts.1", "--allow-split"],
        ["--to", "int4", "--allow-split"],
        ["--to", "int4", "--grid", "compressed-tensors"],
        ["--to", "int4", "--shard-size", "1MB"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("finished", [False, True], ids=["half finished", "finished"])
def test_changed_options(source: Path, destination: Path, ram: Path, options: list[str], *, finished: bool) -> None:
    """Other options on the same destination are refused, with the way out; --restart leaves no trace of the old run."""
    if finished:
        k2quant.convert(source, destination, to="int4")
    else:
        begin(source, destination)
    before = contents(destination)
    found = command(*options, source, destination)
    assert found.exit_code == 1
    assert "other options" in found.stderr
    assert "--restart" in found.stderr
    assert contents(destination) == before
    assert command(*options, source, destination, "--restart").exit_code == 0
    assert command(*options, source, ram / "fresh").exit_code == 0
    assert contents(destination) == contents(ram / "fresh")
    assert command("--to", "int4", source, destination, "--restart").exit_code == 0


def test_finished_destination(source: Path, destination: Path) -> None:
    """The same command on a finished destination says so, exits 0 and touches nothing."""
    command("--to", "int4", source, destination)
    before = {path: path.stat().st_mtime_ns for path in destination.rglob("*")}
    found = command("--to", "int4", source, destination)
    assert found.exit_code == 0
    assert "already finished" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in destination.rglob("*")} == before
    assert k2quant.convert(source, destination, to="int4").already_done


def test_options_that_do_not_change_the_output(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """Threads and progress may differ between a run and the one that resumes it."""
    begin(source, destination)
    done = k2quant.convert(source, destination, to="int4", workers=3)
    assert done.resumed >= 1
    assert contents(destination) == whole


@pytest.mark.parametrize("name", [SHARDS[1], INDEX, CONFIG, "tokenizer.json", "code/modeling.py"])
@pytest.mark.parametrize("damage", ["truncated", "removed", "longer"])
def test_damaged_after_it_was_finished(
    source: Path, destination: Path, whole: dict[str, bytes], name: str, damage: str
) -> None:
    """A finished destination that is not whole any more is not called finished; --restart mends it."""
    k2quant.convert(source, destination, to="int4")
    path = destination / name
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncated" else data + b" ")
    found = command("--to", "int4", source, destination)
    assert found.exit_code == 1
    assert name in found.stderr
    assert "--restart" in found.stderr
    assert command("--to", "int4", source, destination, "--restart").exit_code == 0
    assert contents(destination) == whole


def test_shard_damaged_before_the_run_resumes(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """A finished shard that has lost its end before the run resumes is written again."""
    begin(source, destination)
    with (destination / SHARDS[0]).open("r+b") as file:
        file.truncate(100)
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


def test_stopped_at_the_very_end_and_damaged(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """A run that has to write a shard again takes the index and config away first."""
    begin(source, destination)
    journal = (destination / JOURNAL).read_bytes()
    k2quant.convert(source, destination, to="int4")
    (destination / JOURNAL).parent.mkdir()
    (destination / JOURNAL).write_bytes(journal)  # as if killed before the last step
    (destination / SHARDS[1]).unlink()
    with pytest.raises(Stop):
        k2quant.convert(source, destination, to="int4", workers=1, progress=stop)
    half_finished(destination)
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data + b"{",
        lambda data: data + b"\xff\xfe\n",
        lambda data: data + b"[]\n",
        lambda data: data + b'{"shard": ["x"]}\n',
        lambda data: data + b'{"shard": {}}\n{"shard": null}\n{}\n',
        lambda data: data + b'{"shard": "../../x", "size": 1, "tensors": {}}\n',
        lambda data: data + b'{"shard": "model-2-of-3.safetensors"}\n',
        lambda data: data.replace(b'"tensors":{', b'"tensors":[{', 1),
    ],
    ids=range(9),
)
def test_damaged_journal(
    source: Path, destination: Path, whole: dict[str, bytes], damage: Callable[[bytes], bytes]
) -> None:
    """What a damaged journal does not say clearly is done again."""
    begin(source, destination)
    path = destination / JOURNAL
    path.write_bytes(damage(path.read_bytes()))
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


@pytest.mark.parametrize("head", [b"", b"{", b"[]\n", b"\0" * 100, b"{}\n", b'{"journal": 1, "files": 3}\n'])
def test_journal_without_a_head(source: Path, destination: Path, head: bytes) -> None:
    """A destination whose journal does not say what is being made is refused."""
    begin(source, destination)
    (destination / JOURNAL).write_bytes(head)
    with pytest.raises(OutputError):
        k2quant.convert(source, destination, to="int4")


@pytest.mark.parametrize("report", [b"", b"[]", b"{}", b'{"files": []}', b'{"tool": 1, "files": {"../victim": 1}}'])
def test_report_that_is_not_ours(source: Path, destination: Path, report: bytes) -> None:
    """A report that k2quant did not write does not make a folder ours."""
    destination.mkdir()
    (destination / REPORT).write_bytes(report)
    for restart in (False, True):
        with pytest.raises(DestinationForeign):
            k2quant.convert(source, destination, to="int4", restart=restart)
    assert contents(destination) == {}
    assert (destination / REPORT).read_bytes() == report


@pytest.mark.parametrize(
    "files", ['"files": 3', '"files": []', '"files": {"../victim": {}, "a": [], "b": {"size": []}}']
)
def test_report_that_lies(source: Path, destination: Path, ram: Path, files: str) -> None:
    """A report of ours that says nothing of this conversion is refused; with --restart nothing outside is deleted."""
    victim = ram / "victim"
    victim.write_text("precious")
    destination.mkdir()
    (destination / REPORT).write_text(f'{{"tool": "k2quant", {files}}}')
    with pytest.raises(DestinationStale):
        k2quant.convert(source, destination, to="int4")
    k2quant.convert(source, destination, to="int4", restart=True)
    assert k2quant.verify(source, destination).passed
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["../victim", "{ram}/victim", "out/victim", "code/../../victim"])
def test_restart_deletes_nothing_outside(source: Path, destination: Path, ram: Path, name: str) -> None:
    """Whatever a journal lists, --restart deletes files of the destination alone, and not through links."""
    victim = ram / "victim"
    victim.write_text("precious")
    begin(source, destination)
    (destination / "out").symlink_to(ram)
    head, *rest = (destination / JOURNAL).read_text().splitlines()
    files = [name.format(ram=ram), "tokenizer.json"]
    (destination / JOURNAL).write_text("\n".join([json.dumps(json.loads(head) | {"files": files}), *rest, ""]))
    k2quant.convert(source, destination, to="int4", restart=True)
    assert victim.read_text() == "precious"


def test_restart_keeps_what_others_put_there(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """--restart deletes what k2quant wrote and nothing else."""
    k2quant.convert(source, destination, to="bf16")
    (destination / "README.md").write_text("precious")
    k2quant.convert(source, destination, to="int4", restart=True)
    assert contents(destination) == whole | {"README.md": b"precious"}


def test_restart_of_a_source_that_cannot_be_converted(source: Path, destination: Path) -> None:
    """--restart checks the source before it deletes anything."""
    k2quant.convert(source, destination, to="int4")
    before = contents(destination)
    (source / SHARDS[2]).unlink()
    with pytest.raises(CheckpointError):
        k2quant.convert(source, destination, to="int4", restart=True)
    assert contents(destination) == before


def test_links_planted_in_the_destination(source: Path, destination: Path, ram: Path, whole: dict[str, bytes]) -> None:
    """Links in the place of files to be written are replaced, not written through."""
    victim = ram / "victim"
    victim.write_text("precious")
    begin(source, destination)
    for name in (SHARDS[1], f"{SHARDS[2]}.partial", f"{INDEX}.partial", CONFIG, "tokenizer.json", f"{REPORT}.partial"):
        (destination / name).unlink(missing_ok=True)
        (destination / name).symlink_to(victim)
    k2quant.convert(source, destination, to="int4")
    assert victim.read_text() == "precious"
    assert contents(destination) == whole
    assert not any(path.is_symlink() for path in destination.rglob("*"))


def test_unfinished_destination_is_no_source(source: Path, destination: Path, ram: Path) -> None:
    """A half-finished conversion says that it is one when somebody converts it further."""
    begin(source, destination)
    with pytest.raises(CheckpointError, match="not finished"):
        k2quant.convert(destination, ram / "next", to="bf16")
    for name in (INDEX, CONFIG):  # as when it is stopped at its very end
        shutil.copy(source / name, destination)
    with pytest.raises(CheckpointError, match="not finished"):
        k2quant.convert(destination, ram / "next", to="bf16")


def test_interrupted_by_the_keyboard(
    source: Path, destination: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command with exit code 130 and a word on how to go on."""

    def interrupt(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("k2quant.conversion.stream.Stream._work", interrupt)
        found = command("--to", "int4", source, destination, "--workers", "2")
    assert found.exit_code == 130
    assert "resumes" in found.stderr
    half_finished(destination)
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


# --- the machine fails ------------------------------------------------------------------------------------------------

_OPERATIONS = ("open", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "unlink", "mkdir")


class Trouble:
    """Lets one file operation of this process fail."""

    def __init__(self, patch: pytest.MonkeyPatch, operation: str, number: int, code: int) -> None:
        """Let the operation of this number, counted among its kind, fail with this errno."""
        self.struck = False
        count, real = itertools.count(1), getattr(os, operation)

        def fail(*arguments: Any, **options: Any) -> Any:
            writes = operation != "open" or arguments[1] & os.O_CREAT
            if writes and next(count) == number:
                self.struck = True
                path = arguments[0] if isinstance(arguments[0], (str, Path)) else None
                raise OSError(code, os.strerror(code), path and str(path))
            return real(*arguments, **options)

        patch.setattr(os, operation, fail)


def outcome(source: Path, destination: Path) -> str | None:
    """Convert and return the message of the error, or None."""
    try:
        k2quant.convert(source, destination, to="int4", workers=1)
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_any_file_operation_may_fail(
    source: Path,
    destination: Path,
    whole: dict[str, bytes],
    operation: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk, a lost permission or a broken disk at any point is one clear sentence, and the next run resumes."""
    monkeypatch.setattr("k2quant.checkpoint.writing.writer.FLUSH_BYTES", 1)
    for number in itertools.count(1):
        shutil.rmtree(destination, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            trouble = Trouble(patch, operation, number, code)
            message = outcome(source, destination)
        if not trouble.struck:
            break
        if message is None:  # it struck where nothing depends on it: at the removal of the lock's file
            assert contents(destination).items() - whole.items() <= {(".k2quant/lock", b"")}
            continue
        assert os.strerror(code) in message
        assert message.isprintable()
        found = contents(destination) if destination.exists() else {}
        if {CONFIG, INDEX} & found.keys():
            assert found.items() >= {name: data for name, data in whole.items() if "safetensors" in name}.items() - {
                (INDEX, whole[INDEX])
            }
        for name, data in found.items():
            assert name.startswith((".k2quant", INCOMPLETE)) or name.endswith(".partial") or data == whole[name]
        k2quant.convert(source, destination, to="int4", workers=1)
        assert contents(destination) == whole
    assert number > 1, "the operation is not used at all"


def test_files_are_flushed_before_they_are_named(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is on the disk before it has its name, and config.json is the last of all, so a power cut is safe."""
    dirty: dict[int, bool] = {}  # by inode: written since its last fsync
    named: list[str] = []
    pwrite, fsync, rename = os.pwrite, os.fsync, os.rename

    def watched_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        dirty[os.fstat(descriptor).st_ino] = True
        return pwrite(descriptor, data, offset)

    def watched_fsync(descriptor: int) -> None:
        dirty[os.fstat(descriptor).st_ino] = False
        fsync(descriptor)

    def watched_rename(old: Path, new: Path) -> None:
        assert dirty.get(Path(old).stat().st_ino) is False, f"{old} was not flushed"
        if Path(new).parent == destination:
            named.append(Path(new).name)
        rename(old, new)

    monkeypatch.setattr(os, "pwrite", watched_pwrite)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    k2quant.convert(source, destination, to="int4", workers=1)
    assert named == [INCOMPLETE, *SHARDS, "tokenizer.json", "README.md", REPORT, INDEX, CONFIG]


def test_disk_too_small(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which the output cannot fit is refused before anything is written, with the bytes that are missing."""
    usage = shutil.disk_usage(source.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    found = command("--to", "int4", source, destination)
    assert found.exit_code == 1
    assert "the disk is too small" in found.stderr
    assert "1000 bytes" in found.stderr
    assert not list(destination.iterdir())


_LIMITED = """
import resource, sys
from k2quant.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(["convert", "--to", "bf16", "--workers", "1", *sys.argv[2:]])
"""


def test_file_size_limit_of_the_system(source: Path, destination: Path, ram: Path) -> None:
    """Where the system forbids the shards' size, that is said, and without the limit the run resumes."""
    limited = [sys.executable, "-c", _LIMITED]
    found = subprocess.run([*limited, "12000", source, destination], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert os.strerror(errno.EFBIG) in found.stderr
    assert "Traceback" not in found.stderr
    half_finished(destination)
    found = subprocess.run([*limited, "10000000", source, destination], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    k2quant.convert(source, ram / "reference", to="bf16")
    assert contents(destination) == contents(ram / "reference")


_FULL_DISK = """
import os, pathlib, subprocess, sys, k2quant
source, disk = map(pathlib.Path, sys.argv[1:])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
    sys.exit(77)
junk = disk / "junk"

def fill(done, total):
    if not junk.exists() and (disk / "out" / "model-1-of-3.safetensors").exists():
        with junk.open("wb", 0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

try:
    k2quant.convert(source, disk / "out", to="bf16", workers=1, progress=fill)
except k2quant.K2QuantError as error:
    print(error)
print(sorted(path.name for path in (disk / "out").iterdir()))
junk.unlink()
print(k2quant.convert(source, disk / "out", to="bf16", workers=1).resumed)
print(k2quant.verify(source, disk / "out").passed)
"""


def test_disk_full(ram: Path) -> None:
    """A disk that others fill half-way is one clear sentence; with space again, the run resumes."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here to mount a small disk with")
    source = ram / "source"
    shards: dict[str, Shard] = {
        file: {f"model.layers.1.mlp.experts.{number}.up_proj.weight": ("F32", np.ones((200, 128), np.float32))}
        for number, file in enumerate(SHARDS)
    }
    write_checkpoint(source, shards, None)
    (ram / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", _FULL_DISK, source, ram / "disk"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a small disk cannot be mounted here")
    assert done.returncode == 0, done.stderr
    error, files, resumed, passed = done.stdout.splitlines()
    assert os.strerror(errno.ENOSPC) in error
    assert "resumes" in error
    assert INCOMPLETE in files
    assert CONFIG not in files
    assert INDEX not in files
    assert int(resumed) >= 1
    assert passed == "True"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_permission_lost_half_way(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """A destination that may not be written any more is one clear sentence, and a later run resumes."""
    with pytest.raises(OutputError, match=os.strerror(errno.EACCES)):
        k2quant.convert(
            source,
            destination,
            to="int4",
            workers=1,
            progress=after_first_shard(destination, lambda: destination.chmod(0o500)),
        )
    destination.chmod(0o700)
    half_finished(destination)
    assert k2quant.convert(source, destination, to="int4").resumed >= 1
    assert contents(destination) == whole


def test_destination_taken_away(source: Path, destination: Path) -> None:
    """A destination that somebody moves away half-way is one clear sentence."""

    def move() -> None:
        destination.rename(destination.with_name("moved"))

    away = after_first_shard(destination, move)
    with pytest.raises(OutputError):
        k2quant.convert(source, destination, to="int4", workers=1, progress=away)


# --- the source changes under our hands -------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other_bytes(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100))


@pytest.mark.parametrize("change", [_truncate, Path.unlink, _pipe, _folder, _other_bytes])
def test_source_changes_half_way(
    source: Path, destination: Path, whole: dict[str, bytes], change: Callable[[Path], None]
) -> None:
    """A shard that is cut short, taken away or rewritten while it is read is named; restored, the run resumes."""
    shard = source / SHARDS[2]
    status, data = shard.stat(), shard.read_bytes()
    with pytest.raises(CheckpointError, match=SHARDS[2]) as caught:
        k2quant.convert(
            source, destination, to="int4", workers=1, progress=after_first_shard(destination, lambda: change(shard))
        )
    assert str(caught.value).isprintable()
    half_finished(destination)
    if shard.is_dir():
        shard.rmdir()
    shard.unlink(missing_ok=True)
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert k2quant.convert(source, destination, to="int4").resumed >= 1
    assert contents(destination) == whole


def test_source_cut_short_in_the_middle_of_a_read(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that comes back empty although the file is long enough ends the conversion; it does not loop."""
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="ends too early"):
        k2quant.convert(source, destination, to="int4", workers=1)
    assert not (destination / CONFIG).exists()


def test_source_on_a_broken_disk(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails is the source's fault, and the message says so."""

    def fail(*_arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        k2quant.convert(source, destination, to="int4", workers=1)
    half_finished(destination)


def test_other_file_changes_half_way(source: Path, destination: Path, whole: dict[str, bytes]) -> None:
    """A tokenizer that turns into a link out of the folder while we work is not followed."""
    before = (source / "tokenizer.json").stat()

    def change() -> None:
        (source / "tokenizer.json").unlink()
        (source / "tokenizer.json").symlink_to("/etc/hostname")

    with pytest.raises(CheckpointError, match="leaves the folder"):
        k2quant.convert(source, destination, to="int4", workers=1, progress=after_first_shard(destination, change))
    half_finished(destination)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").write_text("{}")
    os.utime(source / "tokenizer.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    k2quant.convert(source, destination, to="int4")
    assert contents(destination) == whole


@pytest.mark.parametrize("option", [0, -1])
def test_no_workers(source: Path, destination: Path, option: int) -> None:
    """A conversion without workers is refused, not waited for."""
    with pytest.raises(UsageError):
        k2quant.convert(source, destination, to="int4", workers=option)
