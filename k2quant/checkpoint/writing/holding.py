"""One run at a prefix of an object store at a time: an object that is written only where none stands is the lock.

It says which process wrote it, on which machine, and when. A process of this machine that has died is found out, as
with a soft lock in a folder; of another machine nobody can tell, and whoever knows that it has ended deletes it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import NamedTuple

from k2quant.checkpoint.files.locks import Holder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.remote.retrying import TRIES, pause
from k2quant.checkpoint.writing.destination import WORK
from k2quant.checkpoint.writing.objects import Objects
from k2quant.checkpoint.writing.sharing import PATIENCE
from k2quant.errors import CheckpointError, DestinationInUse, OutputError

LOCK = f"{WORK}/lock.json"
_GATE = f"{WORK}/gate.json"
_SHARE = f"{WORK}/share-"  # and the name of a share: the lock of one of several processes
_TAKING = ".taking"
"""Marks the object that stands while a dead run's lock is removed, so that two that find it do not both."""
_LIMIT = 4096  # bytes of a lock
_PAUSE = 0.2  # seconds between two looks at a gate


class Held(NamedTuple):
    """A lock that stands there."""

    content: bytes
    holder: Holder | None
    """None where it does not say whose it is."""
    taken: str
    """When it was taken, in UTC."""

    @property
    def is_dead(self) -> bool:
        """Whether it is certain that its process has ended."""
        return self.holder is not None and self.holder.is_dead()

    def __str__(self) -> str:
        """Return whose it is, for messages."""
        return f"{self.holder or 'nobody it names'}, since {self.taken or 'nobody knows when'}"


def lock_at(objects: Objects, name: str = LOCK) -> Held | None:
    """Return the lock that stands at a prefix, if any."""
    data = objects.read(name, _LIMIT)
    if data is None:
        return None
    try:
        taken = parse_object(data, file=objects.named(name)).get("taken")
        return Held(data, Holder.read(data, objects.named(name)), taken if isinstance(taken, str) else "")
    except (CheckpointError, KeyError, TypeError, ValueError):
        return Held(data, None, "")


@contextlib.contextmanager
def held(objects: Objects, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a prefix as long as the block runs; that of all of it keeps out who has a share, too.

    Raises:
        DestinationInUse: another process holds it, or may hold it.
        OutputError: the store cannot be written to.
    """
    mine = _content()
    _take(objects, name, mine)
    try:
        if name == LOCK:
            for share in shares_at(objects):
                refuse(objects, share)
        yield
    finally:
        with contextlib.suppress(OutputError):  # where it stays, it is a dead process's soon
            if objects.read(name, _LIMIT) == mine:
                objects.delete([name])


def shares_at(objects: Objects) -> list[str]:
    """Return the locks of processes that write shares."""
    return [name for name in sorted(objects.listed(WORK)) if name.startswith(_SHARE) and _TAKING not in name]


def refuse(objects: Objects, name: str) -> None:
    """Refuse to go on beside a lock, unless its process is dead; then it goes.

    Raises:
        DestinationInUse: its process is at work, or nobody can tell.
    """
    found = lock_at(objects, name)
    if found is None:
        return
    if not found.is_dead:
        raise _in_use(objects, name, found)
    _remove(objects, name, found)


class Sharing:
    """The locks of one of several processes that write shares of one output; see `sharing.Sharing`."""

    def __init__(self, objects: Objects, *, share: str, check: Callable[[], None]) -> None:
        """Prepare, without a lock.

        Args:
            objects: where all write.
            share: name of the share, such as `2-of-8`.
            check: is called when the locks are taken, and may refuse.
        """
        self._objects, self._share, self._check = objects, f"{_SHARE}{share}.json", check
        self._stack = contextlib.ExitStack()
        self._taken = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the others at the gate as long as the block runs; the first time, the share's lock is taken there.

        Raises:
            DestinationInUse: another writes this share, has all for itself, or stays too long behind the gate.
        """
        with contextlib.ExitStack() as stack:
            self._pass(stack)
            if not self._taken:
                self._stack.enter_context(held(self._objects, self._share))
                refuse(self._objects, LOCK)
                self._check()
                self._taken = True
            yield

    def _pass(self, stack: contextlib.ExitStack) -> None:
        begun = time.monotonic()
        while True:
            try:
                stack.enter_context(held(self._objects, _GATE))
            except DestinationInUse:
                if time.monotonic() - begun > PATIENCE:
                    raise
                time.sleep(_PAUSE)
            else:
                return

    def is_last(self) -> bool:
        """Tell whether no other process writes a share."""
        for share in shares_at(self._objects):
            if share != self._share:
                try:
                    refuse(self._objects, share)
                except DestinationInUse:
                    return False
        return True

    def release(self) -> None:
        """Let others have this share, and the rest."""
        self._stack.close()


def _content() -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({**asdict(Holder.me()), "taken": now, "once": secrets.token_hex(16)}).encode() + b"\n"


def _take(objects: Objects, name: str, mine: bytes) -> None:
    for _ in range(TRIES):
        objects.create(name, mine)
        found = lock_at(objects, name)  # an answer may have been lost, and not every store knows conditions
        if found is None:  # released since
            pause(_PAUSE)
            continue
        if found.content == mine:
            return
        if not found.is_dead:
            raise _in_use(objects, name, found)
        _remove(objects, name, found)
    raise OutputError(
        "a lock that was written is not there",
        file=objects.named(name),
        remedy="whoever writes must be allowed to read, and see at once what was written",
    )


def _remove(objects: Objects, name: str, dead: Held) -> None:
    """Remove a dead run's lock, unless another has done so."""
    taking = name.replace(".json", f"{_TAKING}.json")
    if not objects.create(taking, b"{}\n"):
        raise DestinationInUse(
            "another k2quant takes over what a killed one left",
            file=objects.address,
            remedy=f"if none does, delete {objects.named(taking)}",
        )
    try:
        found = lock_at(objects, name)
        if found is not None and found.content == dead.content:
            objects.delete([name])
    finally:
        objects.delete([taking])


def _in_use(objects: Objects, name: str, found: Held) -> DestinationInUse:
    if found.holder is not None and found.holder.is_here():
        remedy = "wait for it, or name another place"
        return DestinationInUse("another k2quant works here", file=objects.address, found=str(found), remedy=remedy)
    return DestinationInUse(
        "locked from another machine, or from before this one was started",
        file=objects.address,
        found=str(found),
        remedy=f"if that process has ended, delete {objects.named(name)}",
    )
