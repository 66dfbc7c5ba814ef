"""Several processes that write one folder, each a share of its own: who keeps whom out, and who is alone for a moment.

Each holds a lock of its own share, so that nobody else writes that, and shares the folder's lock, which keeps out who
wants the folder for itself. What one alone may do (begin, find out that it is the last, complete) is done behind a
gate, where the others wait. The locks work between machines where those of the file system do, as of NFS 4.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from k2quant.checkpoint.files.locks import SOFT, Lock, refuse_soft, take
from k2quant.errors import DestinationInUse

LOCK = "lock"
"""Name of the file that is locked in a folder where a run keeps its journal."""
_SHARE = "share-"  # and the name of a share: the file that is locked for it
_GATE = "gate"

PATIENCE = 300.0
"""Seconds that a process waits at the gate: another may copy files there, or delete those of an old run."""
_PAUSE = 0.05  # seconds between two looks


def refuse_shares(work: Path, *, folder: Path) -> None:
    """Refuse a folder in which processes with soft locks write shares, to whoever wants it for itself.

    Raises:
        DestinationInUse: so it is, or nobody can tell.
    """
    for path in work.glob(f"{_SHARE}*{SOFT}"):
        refuse_soft(path.with_name(path.name.removesuffix(SOFT)), folder=folder)


class Sharing:
    """The locks of one of several processes."""

    def __init__(self, work: Path, *, folder: Path, name: str, soft: bool, check: Callable[[], None]) -> None:
        """Prepare, without a lock.

        Args:
            work: where the locks lie.
            folder: what they are for, as messages name it.
            name: of the share, as names of files have it, such as `2-of-8`.
            soft: whether a file may be the lock where the file system has no others.
            check: is called when the locks are taken, and may refuse.
        """
        self._work, self._folder, self._name, self._soft, self._check = work, folder, name, soft, check
        self._held: list[Lock] = []

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the others at the gate as long as the block runs; the first time, the locks are taken there.

        Raises:
            DestinationInUse: another writes this share, has the folder for itself, or stays too long behind the gate.
            OutputError: the file system has no locks, and soft ones are not asked for.
        """
        first = not self._held
        with contextlib.ExitStack() as stack:
            while True:
                gate = self._gate()
                stack.callback(gate.release)
                if first:
                    self._take()
                if gate.stands() and all(lock.stands() for lock in self._held if first):
                    break
                stack.close()  # the last of others went home meanwhile, and took the locks along
                if first:
                    self.release()
            if first:
                self._check()
            yield

    @property
    def held(self) -> bool:
        """Whether the locks are taken."""
        return bool(self._held)

    def is_last(self) -> bool:
        """Tell whether no other process writes a share; none begins to as long as this one is behind the gate."""
        others = (path for path in self._work.glob(f"{_SHARE}*{SOFT}") if path.name != f"{_SHARE}{self._name}{SOFT}")
        for path in others:
            try:
                refuse_soft(path.with_name(path.name.removesuffix(SOFT)), folder=self._folder)
            except DestinationInUse:
                return False
        return all(lock.is_alone() for lock in self._held)

    def release(self) -> None:
        """Let others have this share, and the folder."""
        while self._held:
            self._held.pop().release()

    def _take(self) -> None:
        path = self._work / f"{_SHARE}{self._name}"
        what = f"part {self._name.replace('-', ' ')}"
        try:
            self._held.append(take(path, folder=self._folder, soft=self._soft, what=what))
            self._held.append(take(self._work / LOCK, folder=self._folder, soft=self._soft, shared=True))
        except BaseException:
            self.release()
            raise

    def _gate(self) -> Lock:
        begun = time.monotonic()
        while True:
            try:
                self._work.mkdir(exist_ok=True)
                return take(self._work / _GATE, folder=self._folder, soft=self._soft)
            except (FileNotFoundError, FileExistsError):  # the last of others goes home
                if self._work.exists() and not self._work.is_dir():
                    raise
            except DestinationInUse:
                if time.monotonic() - begun > PATIENCE:
                    raise
            time.sleep(_PAUSE)
