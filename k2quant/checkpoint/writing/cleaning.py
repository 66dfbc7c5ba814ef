"""What a stopped run left at a place that nothing will need: named, and removed when that is asked for.

Finished shards, their records and the journal stay: the run can go on from them. What goes is what it would begin
anew: files that are not whole, shards of a source, uploads that were never completed, locks of processes that ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files.locks import SOFT, Holder, take
from k2quant.checkpoint.files.paths import partials, read_limited
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.writing import holding
from k2quant.checkpoint.writing.bucket import Bucket
from k2quant.checkpoint.writing.destination import WORK, Destination, is_below
from k2quant.checkpoint.writing.sharing import LOCK
from k2quant.checkpoint.writing.stores import objects_of
from k2quant.errors import CheckpointError, DestinationForeign, DestinationInUse

_LIMIT = 4096  # bytes of a lock


class Leftover(NamedTuple):
    """One thing that a stopped run left."""

    kind: str
    """`partial`, `source`, `lock` or `upload`."""
    name: str
    """Its path, or the name of the object."""
    size: int | None
    """Bytes, where they are known."""
    said: str = ""
    """Whose it is, or since when."""


class Found(NamedTuple):
    """What lies at a place."""

    left: tuple[Leftover, ...]
    goes_on: bool
    """Whether a run was stopped there, so that the same command goes on."""


def look(spot: Path | Address, *, report: str, incomplete: str, remove: bool = False) -> Found:
    """Find what a stopped run left, and remove it where that is asked for.

    Args:
        spot: a folder, or a prefix of an object store.
        report: name of the report's file, which marks a finished output as ours.
        incomplete: name of the file that marks an unfinished one.
        remove: whether to remove it. Locks that another machine's processes left are removed too: whoever asks says
            that these have ended.

    Raises:
        DestinationForeign: there is nothing of ours.
        DestinationInUse: a run is at work there.
        OutputError: the place cannot be looked at.
    """
    if isinstance(spot, Address):
        return _in_bucket(spot, Bucket(objects_of(spot), report=report, incomplete=incomplete), remove=remove)
    return _in_folder(spot, Destination(spot, report=report, incomplete=incomplete), remove=remove)


def _in_folder(folder: Path, target: Destination, *, remove: bool) -> Found:
    work = folder / WORK
    if not folder.is_dir() or not (work.is_dir() or target.finished_report() is not None):
        raise _foreign(folder)
    soft = [] if work.is_symlink() else list(_soft_locks(work, folder))
    with _held(folder, work, soft, remove=remove):
        journal = target.journal()
        files = journal[0].get("files") if journal else (target.finished_report() or {}).get("files")
        left = [*soft]
        for name in _plain(folder, files):
            left += [Leftover("partial", str(path), path.lstat().st_size) for path in partials(folder / name)]
        sources = sorted(work.glob("source*")) if not work.is_symlink() else []
        left += [Leftover("source", str(path), _bytes_of(path)) for path in sources]
        if remove:
            for each in left:
                _remove(Path(each.name))
    if remove and not journal and work.is_dir() and not work.is_symlink():
        shutil.rmtree(work)
    return Found(tuple(left), bool(journal))


def _soft_locks(work: Path, folder: Path) -> Iterator[Leftover]:
    """Yield the files that are locks of processes which are not at work, as far as this machine can tell.

    Raises:
        DestinationInUse: one is.
    """
    for path in sorted(work.glob(f"*{SOFT}")):
        try:
            holder = Holder.read(read_limited(path, _LIMIT), path)
        except FileNotFoundError:
            continue
        except (CheckpointError, KeyError, TypeError, ValueError):
            yield Leftover("lock", str(path), None, "of nobody that it names")
            continue
        _refuse_alive(holder, folder)
        yield Leftover("lock", str(path), None, f"of {holder}")


@contextlib.contextmanager
def _held(folder: Path, work: Path, soft: list[Leftover], *, remove: bool) -> Iterator[None]:
    """Hold the folder's lock, if there is one to hold; files that are locks are out of the way first."""
    if work.is_symlink() or not (work / LOCK).exists() or (soft and not remove):
        yield
        return
    for each in soft:
        Path(each.name).unlink(missing_ok=True)
    lock = take(work / LOCK, folder=folder, soft=False)
    try:
        yield
    finally:
        lock.release()


def _in_bucket(address: Address, target: Bucket, *, remove: bool) -> Found:
    objects = objects_of(address)
    journal = target.journal()
    locks = list(_lock_objects(address, objects))
    if not (journal or locks or target.finished_report() is not None):
        raise _foreign(address)
    left = [*locks, *(Leftover("upload", each.name, None, f"begun {each.begun}") for each in target.unfinished())]
    if count := _bytes_of(target.work):
        left.append(Leftover("source", str(target.work), count))
    if remove:
        objects.delete([each.name for each in locks])
        with holding.held(objects):
            objects.abort(target.unfinished())
            target.forget()
    return Found(tuple(left), bool(journal))


def _lock_objects(address: Address, objects: Any) -> Iterator[Leftover]:
    """Yield the lock objects of processes that are not at work; see `_soft_locks`."""
    for name in sorted(objects.listed(WORK)):
        if not name.startswith((holding.LOCK.removesuffix(".json"), f"{WORK}/share-", f"{WORK}/gate")):
            continue
        found = holding.lock_at(objects, name)
        if found is None:
            continue
        if found.holder is not None:
            _refuse_alive(found.holder, address)
        yield Leftover("lock", name, None, f"of {found}")


def _refuse_alive(holder: Holder, spot: Path | Address) -> None:
    if holder.is_here() and not holder.is_dead():
        raise DestinationInUse("another k2quant works here", file=spot, found=str(holder), remedy="wait for it")


def _foreign(spot: Path | Address) -> DestinationForeign:
    return DestinationForeign(
        "holds no output of k2quant, finished or not", file=spot, remedy="name the DESTINATION of a conversion"
    )


def _plain(folder: Path, files: object) -> list[str]:
    """Return names of a journal or report that lie below the folder."""
    names = files if isinstance(files, list) else list(files) if isinstance(files, Mapping) else []
    return [name for name in names if isinstance(name, str) and is_below(folder, name)]


def _bytes_of(folder: Path) -> int:
    return sum(os.lstat(os.path.join(home, name)).st_size for home, _, names in os.walk(folder) for name in names)  # noqa: PTH118


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
