"""One run in a folder, on file systems that have locks and on those that have none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.files import locks
from k2quant.checkpoint.files.locks import SOFT, locked_file, take
from k2quant.cli import main
from k2quant.errors import DestinationInUse, OutputError
from k2quant.eval.runs import folder as runs
from k2quant.model.passes import activations
from k2quant.nano import writing
from k2quant.qat.run.folder import Run

NO_LOCKS = {"ENOSYS": errno.ENOSYS, "ENOLCK": errno.ENOLCK, "EOPNOTSUPP": errno.EOPNOTSUPP}


def _without_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(_descriptor: int, _operation: int) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def lustre(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, as Lustre mounted without flock."""
    _without_flock(monkeypatch, errno.ENOSYS)


# --- whoever takes a lock ---------------------------------------------------------------------------------------------

HOLDERS: dict[str, Callable[[Path, bool], Any]] = {
    "nano": lambda folder, soft: writing.claimed(folder, soft_lock=soft),
    "qat": lambda folder, soft: Run(folder).held(soft_lock=soft),
    "eval": lambda folder, soft: runs.held(folder, soft_lock=soft),
    "stream": lambda folder, soft: activations.held(folder, soft_lock=soft),
}


@pytest.mark.parametrize("code", NO_LOCKS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str, code: str
) -> None:
    """Field fault, a good place refused: the cause and the switch are named, and the folder stays without a trace."""
    _without_flock(monkeypatch, NO_LOCKS[code])
    (tmp_path / "run").mkdir()
    place = HOLDERS[holder](tmp_path / "run", False)
    with pytest.raises(OutputError, match=r"a file system without locks.*`soft_lock=True`"), place:
        pytest.fail("went on without a lock")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.usefixtures("lustre")
def test_a_soft_lock_keeps_a_second_run_out_and_goes_in_the_end(tmp_path: Path, holder: str) -> None:
    """With the switch, one run holds the folder, a second is refused, and nothing of the soft lock stays."""
    folder = tmp_path / "run"
    with HOLDERS[holder](folder, True):
        assert list(folder.glob(f"*{SOFT}"))
        with (
            pytest.raises(DestinationInUse, match=r"another k2quant works here.*process"),
            HOLDERS[holder](folder, True),
        ):
            pytest.fail("two runs in one folder")
    assert not list(tmp_path.rglob(f"*{SOFT}"))
    with HOLDERS[holder](folder, True):
        pass


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_conversion_without_flock(
    k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Without locks `convert` leaves no folder behind; with the switch it converts, and the bytes are the same."""
    k2quant.convert(k2_source, tmp_path / "hard", to="bf16")
    _without_flock(monkeypatch, NO_LOCKS[code])
    with pytest.raises(OutputError, match=f"without locks.*{os.strerror(NO_LOCKS[code])}.*`soft_lock=True`"):
        k2quant.convert(k2_source, tmp_path / "soft", to="bf16")
    assert not (tmp_path / "soft").exists()
    k2quant.convert(k2_source, tmp_path / "soft", to="bf16", soft_lock=True)
    for path in (tmp_path / "hard").iterdir():
        assert path.name == "k2quant_report.json" or (tmp_path / "soft" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "soft").iterdir()) == sorted(
        path.name for path in (tmp_path / "hard").iterdir()
    )


def test_another_error_of_flock_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is said to fail; a soft lock is no answer to that."""
    _without_flock(monkeypatch, errno.EIO)
    for soft in (False, True):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked_file(tmp_path / "lock", soft=soft):
            pytest.fail("went on without a lock")


def test_the_commands_have_the_switch(tmp_path: Path) -> None:
    """Every command that locks a folder takes `--soft-lock`."""
    for command in (["convert"], ["merge"], ["nano"], ["qat", "train"], ["qat", "export"], ["eval", "run"]):
        assert "--soft-lock" in CliRunner().invoke(main, [*command, "--help"]).output
    assert not list(tmp_path.iterdir())


# --- soft and hard locks side by side ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_soft_and_hard_locks_see_each_other(tmp_path: Path, first: bool, second: bool) -> None:  # noqa: FBT001
    """Where there are locks, a run with the switch and one without it keep each other out all the same."""
    with locked_file(tmp_path / "lock", soft=first), pytest.raises(DestinationInUse):
        take(tmp_path / "lock", folder=tmp_path, soft=second)


def test_a_soft_lock_keeps_out_a_run_that_has_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that one machine locks softly is refused by another whose mount has locks."""
    with monkeypatch.context() as patch:
        _without_flock(patch, errno.ENOSYS)
        held = take(tmp_path / "lock", folder=tmp_path, soft=True)
    with pytest.raises(DestinationInUse, match="another k2quant works here"):
        take(tmp_path / "lock", folder=tmp_path, soft=False)
    held.release()
    take(tmp_path / "lock", folder=tmp_path, soft=False).release()


# --- what a kill leaves -----------------------------------------------------------------------------------------------

_HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
def refuse(*_): raise OSError(errno.ENOSYS, "none")
fcntl.flock = refuse
from k2quant.checkpoint.files.locks import take
take(Path(sys.argv[1]), folder=Path("."), soft=True)
print("held", flush=True)
time.sleep(60)
"""


def _killed(path: Path) -> None:
    """Leave the soft lock of a run that was killed."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(DestinationInUse, match=f"process {process.pid}"):
            take(path, folder=path.parent, soft=True)
        process.kill()


@pytest.mark.parametrize("soft", [True, False])
def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path, soft: bool) -> None:  # noqa: FBT001
    """On the machine where a run was killed, the next one knows that it is dead and goes on, with or without locks."""
    _killed(tmp_path / "lock")
    assert (tmp_path / f"lock{SOFT}").exists()
    with locked_file(tmp_path / "lock", soft=soft):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def _write(path: Path, **changes: object) -> None:
    """Write a soft lock of this very process, with changes."""
    held = take(path, folder=path.parent, soft=True)
    record = json.loads((path.parent / f"{path.name}{SOFT}").read_bytes())
    held.release()
    (path.parent / f"{path.name}{SOFT}").write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    "changes", [{"host": "another"}, {"machine": "another"}, {"machine": "another", "pid": 1}, {"machine": ""}]
)
@pytest.mark.usefixtures("lustre")
def test_a_lock_of_another_machine_must_be_deleted_by_hand(tmp_path: Path, changes: dict[str, object]) -> None:
    """Nobody can tell whether a process elsewhere, or from before a reboot, is dead; what to delete is said."""
    _write(tmp_path / "lock", **changes)
    for soft in (True, False):
        with pytest.raises(OutputError, match=rf"delete {tmp_path}/lock\.soft$" if soft else "`soft_lock=True`"):
            take(tmp_path / "lock", folder=tmp_path, soft=soft)
    (tmp_path / f"lock{SOFT}").unlink()
    take(tmp_path / "lock", folder=tmp_path, soft=True).release()


@pytest.mark.usefixtures("lustre")
def test_a_number_of_a_process_that_was_given_anew_is_no_life(tmp_path: Path) -> None:
    """A process that has the number but began at another time is not the one that locked."""
    _write(tmp_path / "lock", started=1)
    take(tmp_path / "lock", folder=tmp_path, soft=True).release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"host": "a", "machine": "b", "pid": -1, "started": 0}',
        b'{"host": "a", "machine": "b", "pid": 0, "started": 0}',
        b'{"host": "a", "machine": "b", "pid": 4294967296, "started": 0}',
        b'{"host": "a", "machine": "b", "pid": true, "started": 0}',
        b'{"host": 1, "machine": "b", "pid": 1, "started": 0}',
        b"x" * 5000,
        "link",
        "loop",
        "pipe",
        "folder",
        "socket",
    ],
)
@pytest.mark.usefixtures("lustre")
def test_a_soft_lock_that_is_not_ours_is_neither_read_nor_deleted(tmp_path: Path, content: bytes | str) -> None:
    """Whatever else stands there, a link, a pipe, something huge: the file is named, not followed, and left alone."""
    there, other = tmp_path / f"lock{SOFT}", tmp_path / "other"
    other.write_bytes(b"mine")
    match content:
        case bytes():
            there.write_bytes(content)
        case "link":
            there.symlink_to(other)
        case "loop":
            there.symlink_to(there)
        case "pipe":
            os.mkfifo(there)
        case "folder":
            there.mkdir()
        case _:
            with socket.socket(socket.AF_UNIX) as unix:
                unix.bind(os.path.relpath(there))
    begun = time.monotonic()
    with pytest.raises(
        DestinationInUse, match=r"lock\.soft: a soft lock that does not say whose it is.*delete that file"
    ):
        take(tmp_path / "lock", folder=tmp_path, soft=True)
    assert time.monotonic() - begun < 5
    assert os.path.lexists(there)
    assert other.read_bytes() == b"mine"


@pytest.mark.usefixtures("lustre")
def test_only_one_of_many_takes_over(tmp_path: Path) -> None:
    """Where many runs find the lock of a dead one at once, one gets the folder at a time, and none is lost."""
    _write(tmp_path / "lock", started=1)
    inside, most, got = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, got
        try:
            held = take(tmp_path / "lock", folder=tmp_path, soft=True)
        except DestinationInUse:
            return
        with guard:
            inside, got = inside + 1, got + 1
            most = max(most, inside)
        time.sleep(0.01)
        with guard:
            inside -= 1
        held.release()

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert got >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("lustre")
def test_what_another_took_over_first_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that found a dead one's lock does not remove the lock of the run that was faster to take it over."""
    _write(tmp_path / "lock", started=2)
    theirs = (tmp_path / f"lock{SOFT}").read_bytes()
    _write(tmp_path / "other")

    def is_dead(holder: Any) -> bool:
        """Take the lock for a dead one's, and let another be faster."""
        dead: bool = holder.started == 2
        if dead:
            (tmp_path / f"lock{SOFT}").write_bytes((tmp_path / f"other{SOFT}").read_bytes())
        return dead

    monkeypatch.setattr("k2quant.checkpoint.files.locks.Holder.is_dead", is_dead)
    with pytest.raises(DestinationInUse, match="another k2quant works here"):
        take(tmp_path / "lock", folder=tmp_path, soft=True)
    assert (tmp_path / f"lock{SOFT}").read_bytes() not in {theirs, b""}


@pytest.mark.usefixtures("lustre")
def test_a_take_over_that_was_killed_says_what_to_delete(tmp_path: Path) -> None:
    """A run that was killed while it removed a dead one's lock leaves a file, which the message names."""
    _write(tmp_path / "lock", started=1)
    (tmp_path / f"lock{SOFT}.taking").touch()
    with pytest.raises(DestinationInUse, match=r"delete .*/lock\.soft\.taking"):
        take(tmp_path / "lock", folder=tmp_path, soft=True)


@pytest.mark.usefixtures("lustre")
def test_a_lock_that_was_taken_away_is_not_deleted_under_its_new_holder(tmp_path: Path) -> None:
    """A run whose soft lock was deleted by hand does not delete that of the run that came after it."""
    first = take(tmp_path / "lock", folder=tmp_path, soft=True)
    (tmp_path / f"lock{SOFT}").write_bytes(b"another's")
    first.release()
    assert (tmp_path / f"lock{SOFT}").read_bytes() == b"another's"


@pytest.mark.usefixtures("lustre")
def test_where_nothing_tells_a_machine_no_lock_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc nothing tells the dead from the living, and a lock that was left must be deleted by hand."""
    monkeypatch.setattr(locks, "_MACHINE", tmp_path / "nowhere")
    _write(tmp_path / "lock", pid=2**22 + 1)
    with pytest.raises(DestinationInUse, match="if that process has ended, delete"):
        take(tmp_path / "lock", folder=tmp_path, soft=True)


@pytest.mark.usefixtures("lustre")
def test_a_killed_soft_conversion_resumes(k2_source: Path, tmp_path: Path) -> None:
    """A conversion that was killed under a soft lock resumes with the same switch, and without a trace of the lock."""
    out = tmp_path / "out"
    stopped = RuntimeError("killed")

    def stop(done: int, _total: int) -> None:
        if done:
            raise stopped

    with pytest.raises(RuntimeError, match="killed"):
        k2quant.convert(k2_source, out, to="bf16", soft_lock=True, progress=stop)
    assert (out / ".k2quant").is_dir()
    _write(out / ".k2quant" / "lock", started=1)
    done = k2quant.convert(k2_source, out, to="bf16", soft_lock=True)
    assert not done.already_done
    assert not (out / ".k2quant").exists()
    shutil.rmtree(out)
