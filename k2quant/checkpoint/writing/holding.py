"""One run at a prefix of an object store at a time: an object that is written only where none stands is the lock.

It says which process wrote it, on which machine, and when. A process of this machine that has died is found out, as
with a soft lock in a folder; of another machine nobody can tell, and whoever knows that it has ended deletes it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import NamedTuple

from k2quant.checkpoint.files.locks import Holder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.writing.destination import WORK
from k2quant.checkpoint.writing.objects import Objects
from k2quant.errors import CheckpointError, DestinationInUse, OutputError

LOCK = f"{WORK}/lock.json"
_TAKING = f"{WORK}/lock.taking.json"
"""Stands while a dead run's lock is removed, so that two that find it do not both."""
_LIMIT = 4096  # bytes of a lock


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


def lock_at(objects: Objects) -> Held | None:
    """Return the lock that stands at a prefix, if any."""
    data = objects.read(LOCK, _LIMIT)
    if data is None:
        return None
    try:
        taken = parse_object(data, file=objects.named(LOCK)).get("taken")
        return Held(data, Holder.read(data, objects.named(LOCK)), taken if isinstance(taken, str) else "")
    except (CheckpointError, KeyError, TypeError, ValueError):
        return Held(data, None, "")


@contextlib.contextmanager
def held(objects: Objects) -> Iterator[None]:
    """Hold the lock of a prefix as long as the block runs.

    Raises:
        DestinationInUse: another process holds it, or may hold it.
        OutputError: the store cannot be written to.
    """
    mine = _content()
    _take(objects, mine)
    try:
        yield
    finally:
        with contextlib.suppress(OutputError):  # where it stays, it is a dead process's soon
            if objects.read(LOCK, _LIMIT) == mine:
                objects.delete([LOCK])


def _content() -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({**asdict(Holder.me()), "taken": now, "once": secrets.token_hex(16)}).encode() + b"\n"


def _take(objects: Objects, mine: bytes) -> None:
    while True:
        objects.create(LOCK, mine)
        found = lock_at(objects)  # an answer may have been lost, and not every store knows conditions
        if found is None:  # released since
            continue
        if found.content == mine:
            return
        if not found.is_dead:
            raise _in_use(objects, found)
        _remove(objects, found)


def _remove(objects: Objects, dead: Held) -> None:
    """Remove a dead run's lock, unless another has done so."""
    if not objects.create(_TAKING, b"{}\n"):
        raise DestinationInUse(
            "another k2quant takes over what a killed one left",
            file=objects.address,
            remedy=f"if none does, delete {objects.named(_TAKING)}",
        )
    try:
        found = lock_at(objects)
        if found is not None and found.content == dead.content:
            objects.delete([LOCK])
    finally:
        objects.delete([_TAKING])


def _in_use(objects: Objects, found: Held) -> DestinationInUse:
    if found.holder is not None and found.holder.is_here():
        remedy = "wait for it, or name another place"
        return DestinationInUse("another k2quant works here", file=objects.address, found=str(found), remedy=remedy)
    return DestinationInUse(
        "locked from another machine, or from before this one was started",
        file=objects.address,
        found=str(found),
        remedy=f"if that process has ended, delete {objects.named(LOCK)}",
    )
