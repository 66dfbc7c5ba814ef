"""What a stopped run left in a folder is named, and removed when that is asked for; what it had finished stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from k2quant.checkpoint.files.locks import Holder
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.writing.cleaning import Found, look
from k2quant.checkpoint.writing.destination import locked
from k2quant.cli import main
from k2quant.errors import DestinationForeign, DestinationInUse

SHARD = "model-00002-of-00002.safetensors"


def cleaned(folder: Path, *, remove: bool = False) -> Found:
    """Look at a folder, or clean it."""
    return look(folder, report=REPORT, incomplete=INCOMPLETE, remove=remove)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A folder in which a run was killed: a whole shard and a part of one, another attempt at that, a source shard."""
    folder = tmp_path / "out"
    with locked(folder, report=REPORT, incomplete=INCOMPLETE) as target:
        target.begin([{"files": ["config.json", "model-00001-of-00002.safetensors", SHARD]}])
        target.stage.mkdir()
        (target.stage / "model-1.safetensors").write_bytes(b"abc")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"whole")
    (folder / f"{SHARD}.partial").write_bytes(b"half")
    (folder / f"{SHARD}.2-of-3-ab12.partial").write_bytes(b"other")
    (folder / "mine.partial").write_bytes(b"somebody's own")
    return folder


def test_what_is_left_is_named_and_stays(stopped: Path) -> None:
    """Without a word nothing is removed; names of others are none of it."""
    before = sorted(stopped.rglob("*"))
    found = cleaned(stopped)
    assert {(each.kind, Path(each.name).name, each.size) for each in found.left} == {
        ("partial", f"{SHARD}.partial", 4),
        ("partial", f"{SHARD}.2-of-3-ab12.partial", 5),
        ("source", "source", 3),
    }
    assert found.goes_on
    assert sorted(stopped.rglob("*")) == before


def test_what_is_left_is_removed_and_the_run_goes_on(stopped: Path) -> None:
    """The journal, whole shards and files of others stay."""
    done = CliRunner().invoke(main, ["clean", str(stopped), "--yes"])
    assert done.exit_code == 0
    assert "3 things removed; what was finished stays, and the same command goes on" in done.stdout
    assert {path.name for path in stopped.iterdir()} == {
        ".k2quant",
        INCOMPLETE,
        "mine.partial",
        "model-00001-of-00002.safetensors",
    }
    assert not (stopped / ".k2quant" / "source").exists()
    again = json.loads(CliRunner().invoke(main, ["clean", str(stopped), "--json"]).stdout)
    assert (again["left"], again["goes_on"]) == ([], True)


def test_a_run_at_work_is_left_alone(stopped: Path) -> None:
    """As long as a process holds the folder, nothing of it is left over."""
    with (
        locked(stopped, report=REPORT, incomplete=INCOMPLETE),
        pytest.raises(DestinationInUse, match="another k2quant works here"),
    ):
        cleaned(stopped, remove=True)
    assert (stopped / f"{SHARD}.partial").exists()


def test_soft_locks_are_judged_by_their_process(stopped: Path) -> None:
    """One of a live process is respected; another machine's is named, and removed for who says so."""
    me = Holder.me()
    soft = stopped / ".k2quant" / "lock.soft"
    facts = {"host": me.host, "machine": me.machine, "pid": me.pid, "started": me.started}
    soft.write_text(json.dumps(facts))
    with pytest.raises(DestinationInUse, match=f"process {me.pid}"):
        cleaned(stopped, remove=True)
    soft.write_text(json.dumps(facts | {"host": "elsewhere"}))
    assert ("lock", f"of process {me.pid} on elsewhere") in {(each.kind, each.said) for each in cleaned(stopped).left}
    assert soft.exists()
    cleaned(stopped, remove=True)
    assert not soft.exists()


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    """A folder of somebody's, or none, is nothing to clean; names of a forged journal do not leave the folder."""
    (tmp_path / "notes.partial").touch()
    with pytest.raises(DestinationForeign, match="holds no output of k2quant"):
        cleaned(tmp_path, remove=True)
    with pytest.raises(DestinationForeign):
        cleaned(tmp_path / "nowhere")
    folder = tmp_path / "out"
    with locked(folder, report=REPORT, incomplete=INCOMPLETE) as target:
        target.begin([{"files": ["../notes", str(tmp_path / "notes"), 7, ""]}])
    assert cleaned(folder, remove=True).left == ()
    assert (tmp_path / "notes.partial").exists()


def test_a_journal_leads_nowhere_else(stopped: Path, tmp_path: Path) -> None:
    """Names in it that lead out of the folder, also by a link to another one, are passed over."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.partial").write_bytes(b"precious")
    (stopped / "link").symlink_to(other)
    (stopped / "loop").symlink_to("loop")
    with locked(stopped, report=REPORT, incomplete=INCOMPLETE) as target:
        target.begin([{"files": ["link/x", "../other/x", str(other / "x"), "", "loop/x", "a\0b", SHARD]}])
    assert {Path(each.name).name for each in cleaned(stopped, remove=True).left} >= {f"{SHARD}.partial"}
    assert (other / "x.partial").exists()
