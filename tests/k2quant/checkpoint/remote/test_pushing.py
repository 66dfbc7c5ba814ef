"""`k2quant push`: an output in one commit, or nothing; what is there is not sent again; errors say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.remote import retrying
from k2quant.checkpoint.remote.pushing import push
from k2quant.cli import main
from k2quant.errors import CheckpointError, OutputError, UsageError
from served.hub import Hub, hub

LOGIN = "hf_abcdefghijklmnop"
NAME = "somebody/Kimi-K2-Small-INT4"
ADDRESS = f"hf://{NAME}"


@pytest.fixture(scope="module")
def made(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output, not to be changed."""
    return k2quant.convert(k2_source, tmp_path_factory.mktemp("made") / "Kimi-K2-Small-INT4", "int4").folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories on which somebody may write."""
    with hub(tmp_path / "hub") as running:
        running.token = LOGIN
        running.here(monkeypatch, LOGIN)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(retrying, "pause", lambda _: None)
        yield running


def on_hub(server: Hub, branch: str = "main") -> dict[str, bytes]:
    """The files of the repository, by name."""
    return {name: blob.read(0, blob.size) for name, blob in server.files(NAME, branch).items() if name[0] != "."}


def in_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_is_uploaded_in_one_commit(server: Hub, made: Path) -> None:
    """All its files and no others, in a private repository if asked; a second push sends nothing."""
    before = in_folder(made)
    found = CliRunner().invoke(main, ["push", str(made), ADDRESS, "--private", "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert on_hub(server) == before == in_folder(made)
    repo = server.repos[NAME]
    assert repo.private
    assert len(repo.commits) == 2  # that of the hub when it was made, and ours
    assert said["address"] == f"{ADDRESS}@{repo.branches['main']}"
    assert said["sent"] == said["size"] == sum(map(len, before.values()))
    puts = len([seen for seen in server.seen if seen.kind == "put"])
    again = CliRunner().invoke(main, ["push", str(made), ADDRESS])
    assert again.exit_code == 0, again.output
    assert ", 0 B of them sent now" in again.stdout
    assert len([seen for seen in server.seen if seen.kind == "put"]) == puts
    assert len(repo.commits) == 2


def test_what_was_pushed_is_converted_from_there(server: Hub, made: Path, tmp_path: Path) -> None:
    """Up and down again: a conversion of the hub's copy has the bytes of one of the folder."""
    push(made, f"{ADDRESS}@quantised")
    assert "config.json" not in server.files(NAME)
    k2quant.convert(f"{ADDRESS}@quantised", tmp_path / "remote", "bf16")
    k2quant.convert(made, tmp_path / "local", "bf16")
    apart = {"README.md", "k2quant_report.json"}  # which name the source
    remote, local = (
        {name: data for name, data in in_folder(tmp_path / where).items() if name not in apart}
        for where in ("remote", "local")
    )
    assert remote == local


@pytest.mark.parametrize(
    ("kind", "on"), [("drop", "put"), ("status", "put"), ("status", "commit"), ("status", "batch")]
)
def test_a_server_that_falters_is_asked_again(server: Hub, made: Path, kind: str, on: str) -> None:
    """Dropped connections and errors of a moment while something is uploaded: it is uploaded nevertheless."""
    fault = server.fault(kind, on=on, after=1000, status=503, times=2)
    push(made, ADDRESS)
    assert fault.fired == 2
    assert on_hub(server) == in_folder(made)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    server: Hub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub made it and the connection broke: it is found there."""
    answer: Any = server.routes._commit  # noqa: SLF001
    calls: list[int] = []

    def lost(asked: Any, repo: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            answer(asked, repo)
            return
        asked.wfile.write = lambda _: None
        answer(asked, repo)
        raise OSError

    monkeypatch.setattr(server.routes, "_commit", lost)
    done = push(made, ADDRESS)
    assert len(calls) == 2
    assert done.address.revision == server.repos[NAME].branches["main"]
    assert len(server.repos[NAME].commits) == 2


def test_a_branch_that_moves_meanwhile_is_not_overwritten(server: Hub, made: Path) -> None:
    """Somebody commits while shards are on their way: it is said, and the next push goes on from there."""
    push(made, ADDRESS)
    server.commit(NAME, {"config.json": "{}"})
    server.fault("then", on="commit", then=lambda: server.commit(NAME, {"notes.txt": "theirs"}))
    with pytest.raises(OutputError, match="the branch moved while this was uploaded"):
        push(made, ADDRESS)
    assert on_hub(server)["config.json"] == b"{}"
    push(made, ADDRESS)
    assert on_hub(server) == in_folder(made) | {"notes.txt": b"theirs"}


def test_a_card_that_was_edited_on_the_hub_stays(server: Hub, made: Path, tmp_path: Path) -> None:
    """Ours does not take its place; the folder's own, once somebody wrote it, does."""
    push(made, ADDRESS)
    server.commit(NAME, {"README.md": "---\nlicense: mit\n---\ntheirs"})
    found = CliRunner().invoke(main, ["push", str(made), ADDRESS])
    assert found.exit_code == 0, found.output
    assert on_hub(server)["README.md"].endswith(b"theirs")
    assert "README.md on the hub is somebody's own and stays" in found.stderr
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: mit\n---\nmine")
    push(copy, ADDRESS)
    assert on_hub(server)["README.md"].endswith(b"mine")


def test_what_is_not_finished_is_not_uploaded(server: Hub, made: Path, tmp_path: Path) -> None:
    """A folder that is unfinished, somebody else's, cut short or changed; the hub shows nothing of it."""
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "INCOMPLETE").touch()
    with pytest.raises(CheckpointError, match="not finished"):
        push(copy, ADDRESS)
    (copy / "INCOMPLETE").unlink()
    shard = copy / "model-2-of-3.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="not as the report has it"):
        push(copy, ADDRESS)
    shard.write_bytes(whole)
    report = json.loads((copy / "k2quant_report.json").read_text())
    (copy / "k2quant_report.json").write_text(json.dumps(report | {"files": {"../x": {"size": 1}}}))
    with pytest.raises(CheckpointError):
        push(copy, ADDRESS)
    report["files"][shard.name]["sha256"] = "0" * 64
    (copy / "k2quant_report.json").write_text(json.dumps(report))
    assert not server.repos
    with pytest.raises(CheckpointError, match="changed since it was written"):
        push(copy, ADDRESS)
    assert on_hub(server) == {}
    (copy / "k2quant_report.json").unlink()
    with pytest.raises(CheckpointError, match="holds no k2quant_report"):
        push(copy, ADDRESS)


def test_hidden_and_foreign_files_stay_here(server: Hub, made: Path, tmp_path: Path) -> None:
    """What the report does not know is named and not uploaded, and hidden files are nobody's business."""
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "token").write_text(LOGIN)
    (copy / "notes.txt").write_text("mine")
    found = CliRunner().invoke(main, ["push", str(copy), ADDRESS])
    assert found.exit_code == 0, found.output
    assert on_hub(server) == in_folder(made)
    assert "not uploaded, for the report does not know them: notes.txt" in found.stderr


def test_refusals_say_what_to_do(server: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, a token that may not write, no room, an address that is no branch, a public repository."""
    with pytest.raises(UsageError, match="org/name is no address on a hub; expected hf://user/name"):
        push(made, "org/name")
    with pytest.raises(UsageError, match="is no repository on a hub"):
        push(made, "s3://bucket/x")
    with pytest.raises(UsageError, match="is a commit"):
        push(made, f"{ADDRESS}@{'a' * 40}")
    server.read_only = True
    with pytest.raises(OutputError, match=r"does not let you write.*hf auth login"):
        push(made, ADDRESS)
    server.read_only = False
    server.quota = 1000
    with pytest.raises(OutputError, match=r"Storage limit reached.*make room"):
        push(made, ADDRESS)
    assert on_hub(server) == {}
    server.quota = 10**12
    with pytest.raises(UsageError, match="and public"):
        push(made, ADDRESS, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(OutputError, match="does not know who you are") as refused:
        push(made, ADDRESS)
    assert "hf_wrongwrongwrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match=r"nobody is logged in.*hf auth login"):
        push(made, ADDRESS)


def test_a_killed_push_goes_on(server: Hub, made: Path) -> None:
    """Killed with one shard on the hub, nothing is to be seen of it; that shard is not sent again."""
    server.part_size = 10**9
    gate = threading.Event()  # the hub holds back all shards but one
    server.fault("then", on="put", nth=2, times=None, then=gate.wait)
    environment = os.environ | server.environment(LOGIN)
    command = [sys.executable, "-m", "k2quant", "push", str(made), ADDRESS]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    sleep, deadline = threading.Event().wait, time.monotonic() + 300  # `time.sleep` is nothing here
    try:
        while not any(seen.kind == "put" and seen.status == 200 for seen in server.seen):
            assert time.monotonic() < deadline
            assert process.poll() is None
            sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        gate.set()
    assert on_hub(server) == {}
    server.faults.clear()
    arrived = set(server.large_files)
    assert arrived
    server.seen.clear()
    push(made, ADDRESS)
    assert on_hub(server) == in_folder(made)
    assert not any(seen.kind == "put" and seen.path.split("/")[2] in arrived for seen in server.seen)
    assert in_folder(made).keys() == server.files(NAME).keys() - {".gitattributes"}
