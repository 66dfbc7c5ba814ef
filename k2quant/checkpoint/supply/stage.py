"""Whole shards of a source, fetched ahead to a folder while others are worked on, and deleted when nobody needs them.

This is for runs that read a shard more than once. A shard has its name there when it is whole and its sha256 was right,
and the name has a mark of its version; so what an earlier run left is found again, and a part of one is gone on with.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from k2quant.checkpoint.files.paths import open_regular, partials
from k2quant.checkpoint.remote.fetching import marked, partial_path
from k2quant.checkpoint.supply.order import Use
from k2quant.errors import CheckpointError, OutputError, UsageError
from k2quant.ground import pool

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.place import Place

MOST_LOW = 2
"""Shards of the source that lie on the disk at a time, at most, where it is low: one is read, one comes."""

FETCHERS = 2
"""Shards that are fetched at a time, where there is room for them."""

SPARE_BYTES = 2**30
"""Bytes of the disk that are left to others, beside what the output still needs."""

_WHOLE = 16
"""An output shard that reads more than one part in so many of a source shard has it fetched whole; else ranges come."""


def needs(
    todo: Sequence[Use], sizes: Mapping[str, int], most: int | None, proves: Collection[tuple[str, str]] = ()
) -> list[tuple[str, list[str]]]:
    """Return for each output shard the source shards that are fetched whole for it, in order.

    Args:
        todo: what each reads.
        sizes: bytes of the source's shards.
        most: source shards that may lie on the disk at a time; None: any number.
        proves: source shard and output shard, where this one has it fetched whole however little it reads of it, for
            its digest is known and nobody else compares it.

    Raises:
        UsageError: an output shard needs more than that.
    """
    found = []
    for use in todo:
        read: dict[str, int] = {}
        for file, start, stop in use.ranges:
            read[file] = read.get(file, 0) + stop - start
        whole = [file for file, count in read.items() if count * _WHOLE > sizes[file] or (file, use.output) in proves]
        if most is not None and len(whole) > most:
            raise UsageError(
                f"{use.output} is made of {len(whole)} shards of the source, and `low_disk=` has {most} on the disk at "
                "a time; choose a smaller `shard_size=`, or none"
            )
        found.append((use.output, whole))
    return found


class Stage:
    """A folder of shards that come and go; its methods may be called from any thread."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        *,
        most: int | None,
        whole: Callable[[str, Path], None],
        add: Callable[[int], None],
    ) -> None:
        """Take the folder; it is made when something is fetched.

        Args:
            place: where shards come from.
            folder: where they are put.
            most: shards that may lie there at a time; None: as many as the disk has room for.
            whole: is given each shard, by name and path, before it is read.
            add: called with counts of bytes that came.
        """
        self._place, self._folder, self._most, self._whole, self._add = place, folder, most, whole, add
        self._change = threading.Condition()
        self._turns: dict[str, tuple[int, int]] = {}
        """In which order output shards get what they need: those that are begun first, as they were."""
        self._queue: list[str] = []
        self._users: dict[str, set[str]] = {}
        """By source shard, the output shards that it is fetched for and that do not stand yet."""
        self._ready: set[str] = set()
        self._coming: set[str] = set()
        self._opened: set[str] = set()
        self._reserved: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._closed = threading.Event()

    def begin(self, needs: Sequence[tuple[str, Iterable[str]]], output_bytes: Mapping[str, int]) -> None:
        """Start to fetch.

        Args:
            needs: output shards in the order in which they are written, each with the source shards that are fetched
                for it.
            output_bytes: what each of them will take on the same disk; by another name, what all of them take there.

        Raises:
            OutputError: few are to lie there, and beside the output there is no room for so few.
        """
        for turn, (output, files) in enumerate(needs):
            self._turns[output] = 1, turn
            for file in files:
                self._users.setdefault(file, set()).add(output)
        self._queue = list(self._users)
        self._reserved = dict(output_bytes)
        if self._folder.is_symlink():  # what it leads to is not ours to put in order
            self._folder.unlink()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep(set(self._queue if self._most is None else self._queue[: self._most]))
        if self._most is not None:
            self._check_room(self._most)
        for number in range(min(FETCHERS, self._most or FETCHERS)):
            thread = threading.Thread(
                target=pool.handed(self._run, self._closed), name=f"k2quant-fetch-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _check_room(self, most: int) -> None:
        """Refuse a disk on which the run would end midway.

        Raises:
            OutputError: it has no room for so many shards beside the output.
        """
        lying = sum(sorted((self._place.files[file].size for file in self._users), reverse=True)[:most])
        # What an earlier run left goes, or is gone on with: shards here, and parts of output shards in the output.
        left = [part for output in self._reserved for part in partials(self._folder.parent.parent / output)]
        there = sum(map(_allocated, (*self._folder.iterdir(), *left)))
        room = shutil.disk_usage(self._folder).free + there - sum(self._reserved.values())
        if room < lying:
            count = "a shard" if most == 1 or len(self._users) == 1 else f"{most} shards"
            raise OutputError(
                f"the disk is too small for {count} of the source beside the output",
                file=self._folder,
                expected=f"{lying:,} bytes free beside those that the output needs",
                found=f"{max(0, room):,} bytes",
                remedy="free some space, or name a folder on another disk",
            )

    def open(self, output: str) -> None:
        """Hear that an output shard is begun: who asks for its source shards waits for them from now on."""
        with self._change:
            if output not in self._opened:
                self._opened.add(output)
                self._turns[output] = 0, sum(begun == 0 for begun, _ in self._turns.values())
            self._change.notify_all()

    def give(self, file: str, start: int, buffer: memoryview) -> bool:
        """Fill a buffer from a shard that is here, or is due and comes; tell whether it is.

        Raises:
            CheckpointError: it could not be fetched, or is not what it was when it was put here.
            OutputError: the disk is full.
        """
        with self._change:
            while self._is_due(file) and file not in self._ready:
                self._check()
                self._change.wait()
            if file not in self._ready:
                return False
        return self._read(file, start, buffer)

    def prove(self, output: str) -> None:
        """Wait until all source shards that are fetched for an output shard have been.

        Raises:
            CheckpointError: one could not be.
        """
        self.open(output)
        with self._change:
            while any(output in users and file not in self._ready for file, users in self._users.items()):
                self._check()
                self._change.wait()

    def written(self, output: str) -> None:
        """Delete what only an output shard needed, which stands."""
        with self._change:
            self._reserved.pop(output, None)
            self._opened.discard(output)
            gone = [file for file, users in self._users.items() if users == {output}]
            for users in self._users.values():
                users.discard(output)
            for file in gone:
                del self._users[file]
                self._ready.discard(file)
                self._path(file).unlink(missing_ok=True)
            self._queue = [file for file in self._queue if file in self._users]  # one that made room for another
            self._change.notify_all()

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits that nothing will be written any more."""
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def close(self) -> None:
        """End the threads, at the next piece of what they fetch; whoever waits is told."""
        with self._change:
            self._closed.set()
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def clear(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, names: set[str]) -> None:
        """Delete what an earlier run left and nobody will ask for soon."""
        for path in self._folder.iterdir():
            if not any(self._is_of(path, name) for name in names) and not path.is_dir():
                path.unlink()

    def _path(self, file: str) -> Path:
        """Return where a shard lies: never one of the same name and size that another version of the source has."""
        return marked(self._folder / file, self._place.files[file])

    def _is_of(self, path: Path, file: str) -> bool:
        """Tell whether a path is that of a shard, or of a part of it."""
        return path == self._path(file) or path == partial_path(self._folder / file, self._place.files[file])

    def _check(self) -> None:
        """Raise what ended the fetching. The lock is held."""
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise CheckpointError("is not read any more: the run was ended")

    def _run(self) -> None:
        try:
            while (file := self._next()) is not None:
                self._fetch(file)
                with self._change:
                    self._coming.discard(file)
                    if file in self._users:
                        self._ready.add(file)
                    else:  # it had made room for another, and meanwhile its output shard was written
                        self._path(file).unlink(missing_ok=True)
                    self._change.notify_all()
        except BaseException as error:  # noqa: BLE001  raised where somebody waits for the shard
            with self._change:
                self._error = self._error or error
                self._change.notify_all()

    def _next(self) -> str | None:
        """Return the next shard to fetch, when there is room for it; None at the end."""
        with self._change:
            while self._queue and not self._closed.is_set() and self._error is None:
                file = min(self._queue, key=self._turn)
                if self._has_room(file):
                    self._queue.remove(file)
                    self._coming.add(file)
                    return file
                self._change.wait()
        return None

    def _turn(self, file: str) -> tuple[int, int]:
        """Return when a shard is needed first. The lock is held."""
        return min(self._turns[output] for output in self._users[file])

    def _is_due(self, file: str) -> bool:
        """Tell whether an output shard that is begun needs a shard. The lock is held."""
        return not self._opened.isdisjoint(self._users.get(file, ()))

    def _make_room(self, file: str) -> bool:
        """Let the shard go that is needed last, if that is after this one: it comes again. The lock is held.

        It may be one that is being read: then who reads it waits until it is back, or gets the rest by range. So what
        the earliest output shard needs always comes, whatever later ones have taken up.
        """
        last = max(self._ready, key=self._turn, default=file)
        if self._turn(last) <= self._turn(file):
            return False
        self._ready.discard(last)
        self._path(last).unlink(missing_ok=True)
        self._queue.append(last)
        return True

    def _has_room(self, file: str) -> bool:
        """Tell whether a shard may come now. The lock is held.

        Raises:
            OutputError: it never may, for nothing will go that is there.
        """
        wanted = self._is_due(file) and not self._coming  # somebody waits for it, and nothing else will make room
        if self._most is not None:
            full = len(self._ready | self._coming) >= self._most
            return not full or (wanted and self._make_room(file))
        there = len(self._ready | self._coming)
        free, needed = shutil.disk_usage(self._folder).free, self._place.files[file].size
        coming = sum(self._place.files[name].size - self._size(name) for name in self._coming)
        room = free - coming - sum(self._reserved.values()) + self._size(file)
        if needed + (SPARE_BYTES if there else 0) <= room:
            return True
        if wanted and self._make_room(file):
            return self._has_room(file)
        held = all(self._users[name] & self._users[file] for name in self._ready)
        if held and not self._coming and not self._some_output_ends(file):
            raise OutputError(
                "the disk is too small for a shard of the source beside the output",
                file=self._folder,
                expected=f"{needed:,} bytes free beside those that the output needs",
                found=f"{room:,} bytes",
                remedy="free some space, then run the same command again: it resumes",
            )
        return False

    def _some_output_ends(self, file: str) -> bool:
        """Tell whether an output shard that has all it needs, and not this one, is on its way. The lock is held.

        What is reserved for it is on the disk by and by, or waits there to be uploaded: both go when it stands.
        """
        waits = {output for name, users in self._users.items() if name not in self._ready for output in users}
        return bool(self._opened - waits - self._users[file])

    def _size(self, file: str) -> int:
        """Return the bytes of a shard that are on the disk already."""
        return sum(_allocated(path) for path in self._folder.iterdir() if self._is_of(path, file))

    def _fetch(self, file: str) -> None:
        """Have a shard here, whole."""
        path = self._path(file)
        if path.is_file() and not path.is_symlink() and path.stat().st_size == self._place.files[file].size:
            self._whole(file, path)
            return
        path.unlink(missing_ok=True)
        try:
            self._place.fetch(file, path, add=self._add)
        except OSError as error:
            raise self._full(error, self._folder / file) from error
        self._whole(file, path)

    @staticmethod
    def _full(error: OSError, path: Path) -> OutputError:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        return OutputError(
            "the disk is full: a shard of the source does not fit" if full else "cannot be written",
            file=path,
            found=error.strerror or str(error),
            remedy="free some space, then run the same command again: it resumes",
        )

    def _read(self, file: str, start: int, buffer: memoryview) -> bool:
        """Read from the disk; tell whether the shard is there: it may just have gone, where only a part was needed."""
        path = self._path(file)
        try:
            descriptor = open_regular(path)
            try:
                while buffer:
                    count = os.preadv(descriptor, [buffer], start)
                    if count == 0:
                        raise CheckpointError("was cut short while it was read", file=path)
                    buffer, start = buffer[count:], start + count
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CheckpointError("cannot be read", file=path, found=error.strerror or str(error)) from error
        return True


def _allocated(path: Path) -> int:
    """Return the bytes that a file takes; none where it has just got another name."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
