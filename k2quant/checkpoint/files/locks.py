"""One run in a folder at a time: the kernel's lock on a file, which dies with its process, or a file that is the lock.

The softer kind is for file systems without flock. It stands beside the file that is otherwise locked and says which
process made it, on which machine. Either kind looks for the other, so that runs with and without it keep apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from k2quant.checkpoint.files.json_kinds import text, whole
from k2quant.checkpoint.files.paths import read_limited, write_all
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, DestinationInUse, MalformedFile, OutputError

SOFT = ".soft"
"""Suffix of the file that is a soft lock, after the name of the file that is otherwise locked."""

_TAKING = ".taking"  # suffix, once more, of a file that stands while a dead run's soft lock is removed
_LIMIT = 4096  # bytes of a soft lock
_PIDS = 2**31
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what flock ends with where there is none
_WAIT = "wait for it, or name another folder"
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, descriptor: int, soft: _SoftLock | None, *, shared: bool) -> None:
        """Keep what `take` took."""
        self._path, self._descriptor, self._soft, self._shared = path, descriptor, soft, shared

    def stands(self) -> bool:
        """Tell whether the locked file is still the one at its path, and not one that a finished holder removed."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._descriptor)
        return (status.st_ino, status.st_dev) == (held.st_ino, held.st_dev)

    def is_alone(self) -> bool:
        """Tell whether nobody else shares this lock now; whoever wants to, may again afterwards.

        Where the file system has no locks, nobody can tell, and the answer is yes.

        Raises:
            BlockingIOError: somebody took it for himself between two steps.
            OSError: it cannot be locked.
        """
        if not self._shared:
            return True
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # and the share that was held is gone, see flock(2)
                return False
            else:
                return True
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True

    def release(self) -> None:
        """Let others in."""
        if self._soft is not None:
            self._soft.remove()
        os.close(self._descriptor)


def take(path: Path, *, folder: Path, soft: bool, shared: bool = False, what: str = "") -> Lock:
    """Lock a file, which is made if need be.

    Args:
        path: of the file.
        folder: what the lock is for, as messages name it.
        soft: whether a file may be the lock where the file system has no others.
        shared: whether others may share it. Nobody shares a soft lock: who shares has one by another name too.
        what: what of the folder the lock is for, as messages name it; empty for all of it.

    Raises:
        DestinationInUse: another process holds the lock, or may hold it.
        OutputError: the file system has no locks, and `soft` is not asked for.
        OSError: the file cannot be made or locked.
    """
    made = not os.path.lexists(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        _lock(descriptor, folder, soft=soft, shared=shared, what=what)
        beside = _SoftLock(path.with_name(path.name + SOFT), folder)
        if soft and not shared:
            beside.take()
        else:
            beside.clear()
    except BaseException as error:
        os.close(descriptor)
        if made and isinstance(error, OutputError) and not isinstance(error, DestinationInUse):
            path.unlink(missing_ok=True)  # nobody can hold it
        raise
    return Lock(path, descriptor, beside if soft and not shared else None, shared=shared)


def refuse_soft(path: Path, *, folder: Path) -> None:
    """Refuse to go on beside the soft lock of a file, unless its process is dead; then it goes.

    Raises:
        DestinationInUse: its process is at work, or nobody can tell.
    """
    _SoftLock(path.with_name(path.name + SOFT), folder).clear()


@contextlib.contextmanager
def locked_file(path: Path, *, soft: bool = False) -> Iterator[None]:
    """Hold a lock on a file of a folder as long as the block runs; see `take`."""
    lock = take(path, folder=path.parent, soft=soft)
    try:
        yield
    finally:
        lock.release()


def _lock(descriptor: int, folder: Path, *, soft: bool, shared: bool, what: str) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"another k2quant writes {what} here" if what else "another k2quant works here"
        raise DestinationInUse(message, file=folder, remedy="wait for it" if what else _WAIT) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not soft:
            raise OutputError(
                "lies on a file system without locks, which keep two runs out of one folder",
                file=folder,
                found=f"flock: {error.strerror}",
                remedy="name a folder on another one, or say `soft_lock=True`: then a file is the lock, "
                "and if a run is killed, you may have to delete it by hand",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that a soft lock, or an object that is a lock, speaks of."""

    host: str
    machine: str
    """Its kernel since it was booted, and its numbering of processes: where both are equal, `pid` means the same."""
    pid: int
    started: int
    """When it began, in ticks since boot: numbers of processes are given anew."""

    @classmethod
    def me(cls) -> Holder:
        """Return this process."""
        now = _state(os.getpid())
        return cls(host=platform.node(), machine=_machine(), pid=os.getpid(), started=now[1] if now is not None else 0)

    @classmethod
    def read(cls, data: bytes, file: object) -> Holder:
        """Return the process that a lock's content names.

        Args:
            data: JSON.
            file: where it stands, for messages.

        Raises:
            CheckpointError, KeyError, TypeError, ValueError: it names none.
        """
        found = parse_object(data, file=file)
        return cls(
            host=text(found["host"]),
            machine=text(found["machine"]),
            pid=whole(found["pid"], 1, _PIDS),
            started=whole(found["started"]),
        )

    def is_here(self) -> bool:
        """Tell whether the process ran on this machine, since it was booted."""
        return bool(self.machine) and (self.host, self.machine) == (platform.node(), _machine())

    def is_dead(self) -> bool:
        """Tell whether it is certain that the process has ended; only on the machine that it ran on can it be."""
        if not self.is_here():
            return False
        try:
            with contextlib.suppress(PermissionError):  # another user's, and alive
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        now = _state(self.pid)
        return now is not None and (now[0] in "ZX" or now[1] != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class _SoftLock:
    """A file that is a lock as long as it is there."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        self._content = b""

    def take(self) -> None:
        """Make the file, unless another process made it and may still be at work.

        Raises:
            DestinationInUse: so it is.
        """
        content = json.dumps(asdict(Holder.me())).encode() + b"\n"
        while True:
            self.clear()
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:  # made since: look whose it is
                continue
            try:
                self._content = content
                write_all(descriptor, content, 0)
                os.fsync(descriptor)
            except BaseException:
                self._path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
            return

    def remove(self) -> None:
        """Delete the file, if it is still ours."""
        with contextlib.suppress(OSError, CheckpointError):
            if _read(self._path) == self._content:
                self._path.unlink()

    def clear(self) -> None:
        """Delete the file if its process is dead; return where there is none.

        Raises:
            DestinationInUse: its process is at work, or nobody can tell.
        """
        holder = self._holder()
        if holder is None:
            return
        if not holder.is_dead():
            raise self._in_use(holder)
        guard = self._path.with_name(self._path.name + _TAKING)
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            message = "another k2quant takes over what a killed one left"
            raise DestinationInUse(message, file=self._folder, remedy=f"if none does, delete {guard}") from None
        try:  # the lock may be another's by now; as long as the guard stands, nobody else removes it
            if self._holder() == holder:
                self._path.unlink()
        finally:
            guard.unlink(missing_ok=True)

    def _holder(self) -> Holder | None:
        """Return whose the file is; None where there is none.

        Raises:
            DestinationInUse: it does not say.
        """
        if not os.path.lexists(self._path):
            return None
        try:
            return Holder.read(_read(self._path), self._path)
        except FileNotFoundError:  # released since
            return None
        except (CheckpointError, OSError, KeyError, TypeError, ValueError) as error:
            raise DestinationInUse(
                "a soft lock that does not say whose it is",
                file=self._path,
                remedy="if no k2quant works in this folder, delete that file",
            ) from error

    def _in_use(self, holder: Holder) -> DestinationInUse:
        if holder.is_here():
            return DestinationInUse("another k2quant works here", file=self._folder, found=str(holder), remedy=_WAIT)
        return DestinationInUse(
            "a soft lock of another machine, or from before this one was started",
            file=self._folder,
            found=str(holder),
            remedy=f"if that process has ended, delete {self._path}",
        )


def _read(path: Path) -> bytes:
    """Return the bytes of a small file that is no link."""
    if path.is_symlink():
        raise MalformedFile("a link", file=path)
    return read_limited(path, _LIMIT)


def _machine() -> str:
    """Return what tells this machine, since it was booted, and this container's processes; empty where nothing does."""
    try:
        return f"{_MACHINE.read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116  no link to follow
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int] | None:
    """Return a process's state, as a letter, and when it began, in ticks since boot; None where that is not shown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
