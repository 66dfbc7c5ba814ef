"""A source's pieces, fetched ahead into memory while others are worked on, and hashed in the order of their file.

Nothing of the source lies on the disk. Some threads fetch the pieces of the output shards that are being written, in
the order of need; whoever needs one that nobody fetches yet fetches it himself, so nobody waits for what waits for him.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from k2quant.checkpoint.remote.fetching import wrong_digest
from k2quant.checkpoint.supply.order import AHEAD_BYTES, PIECE_BYTES, TINY, Step
from k2quant.errors import CheckpointError
from k2quant.ground import pool

FETCHERS = 8
"""Threads that fetch. One request is answered by one machine, which seldom fills a line."""


class Fetch(Protocol):
    """Who gets whole blocks of a file."""

    def __call__(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer from `start` on."""


@dataclass(slots=True, eq=False)
class _Track:
    """A source shard whose hash is being taken."""

    file: str
    count: int
    """Pieces of it."""
    position: int = 0
    """The piece whose turn it is."""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    waiting: dict[int, _Piece] = field(default_factory=dict)
    """Pieces that are here, and whose turn will come."""
    busy: bool = False
    """Whether a thread hashes."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Bytes of a source shard on their way."""

    file: str
    number: int
    size: int
    left: int
    """Bytes that somebody will still read."""
    lane: _Lane
    track: _Track | None
    """Where it has its turn to be hashed, until that is done."""
    taken: bool = False
    """Whether somebody fetches it, or has."""
    data: memoryview | None = None
    readers: int = 0
    """How many copy from it."""


@dataclass(slots=True, eq=False)
class _Lane:
    """An output shard that is being written, or will be next."""

    output: str
    tracks: dict[str, _Track]
    pieces: deque[_Piece] = field(default_factory=deque)
    """Those that nobody has taken yet, and perhaps some that were taken out of turn; once all was `read`, those alone
    that are still to be hashed."""
    held: int = 0
    """Bytes of its pieces that are here or under way."""
    flying: int = 0
    """Pieces that are under way."""
    read: bool = False
    """Whether all that is needed of it was read, and what is left is only hashed."""


class Ahead:
    """Pieces in memory; its methods may be called from any thread."""

    def __init__(
        self,
        fetch: Fetch,
        sizes: Mapping[str, int],
        sha256: Mapping[str, str],
        shown: Callable[[str], str],
    ) -> None:
        """Do nothing yet.

        Args:
            fetch: gets bytes.
            sizes: bytes of each source shard.
            sha256: digests of those of which they are known.
            shown: what messages call a file.
        """
        self._fetch, self._sizes, self._sha256, self._shown = fetch, sizes, sha256, shown
        self._change = threading.Condition()
        self._plan: Iterator[tuple[str, Iterable[Step]]] = iter(())
        self._lanes: dict[str, _Lane] = {}
        self._pieces: dict[tuple[str, int], _Piece] = {}
        self._spare: list[bytearray] = []
        self._threads: list[threading.Thread] = []
        self._abreast, self._room = 1, AHEAD_BYTES
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self.peak = 0
        """Most bytes of pieces that were in memory at a time."""

    def begin(self, plan: Iterable[tuple[str, Iterable[Step]]], abreast: int) -> None:
        """Start to fetch.

        Args:
            plan: output shards in the order in which they are written, each with its pieces in theirs.
            abreast: how many output shards are written at a time.
        """
        self._plan, self._abreast = iter(plan), abreast
        self._room = AHEAD_BYTES // (abreast + 1)
        for _ in range(abreast + 1):
            self._widen()
        for number in range(FETCHERS):
            thread = threading.Thread(
                target=pool.handed(self._run, self._closed), name=f"k2quant-fetch-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def open(self, output: str) -> None:
        """Hear that an output shard is begun: its pieces are asked for from now on."""
        with self._change:
            while output not in self._lanes and self._widen():
                pass
            self._change.notify_all()

    def give(self, file: str, start: int, buffer: memoryview) -> bool:
        """Fill a buffer from one piece, waiting until it is here; tell whether there is one.

        Raises:
            CheckpointError: it could not be fetched.
        """
        with self._change:
            piece = self._pieces.get((file, start // PIECE_BYTES))
            if piece is None:
                return False
            piece.readers += 1
        while (mine := self._mine(piece)) is not None:
            self._get(mine)
        with self._change:
            while piece.data is None:
                self._wait()
        offset = start - piece.number * PIECE_BYTES
        buffer[:] = piece.data[offset : offset + len(buffer)]
        with self._change:
            piece.readers -= 1
            piece.left -= len(buffer) if len(buffer) > TINY else 0
            self._drop(piece)
        return True

    def prove(self, output: str) -> None:
        """Wait until every source shard of an output shard's own was hashed, and let its pieces go.

        Raises:
            CheckpointError: one has another sha256 than it is said to have, or could not be fetched.
        """
        with self._change:
            lane = self._lanes[output]
            for key, piece in [(key, piece) for key, piece in self._pieces.items() if piece.lane is lane]:
                del self._pieces[key]
                piece.left = 0
                self._drop(piece)
            lane.read = True
            lane.pieces = deque(piece for piece in lane.pieces if piece.track is not None)
            self._change.notify_all()
            while any(track.position < track.count for track in lane.tracks.values()):
                self._wait()
            lane.pieces.clear()
            del self._lanes[output]
            self._change.notify_all()

    def close(self) -> None:
        """End the threads, when what they fetch is here or fails; whoever waits is told."""
        with self._change:
            self._closed.set()
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._pieces.clear()
        self._spare.clear()

    def _wait(self) -> None:
        """Wait for a change; the lock is held."""
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise CheckpointError("is not read any more: the run was ended")
        self._change.wait()

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                self._get(piece)
        except BaseException as error:  # noqa: BLE001  raised where somebody waits for a piece
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def _next(self) -> _Piece | None:
        """Return a piece to fetch, when there is room for one; None at the end."""
        with self._change:
            while not (self._closed.is_set() or self._error):
                busy = sum(bool(lane.pieces) for lane in self._lanes.values())
                while busy <= self._abreast and self._widen():
                    busy += 1
                if (piece := self._choice()) is not None:
                    self._take(piece)
                    return piece
                if not busy:
                    return None
                self._change.wait()
        return None

    def _widen(self) -> bool:
        """Take up the next output shard; tell whether there is one. The lock is held."""
        found = next(self._plan, None)
        if found is None:
            return False
        output, steps = found
        lane = _Lane(output, {})
        for step in steps:
            if step.hashed and step.file not in lane.tracks:
                lane.tracks[step.file] = _Track(step.file, -(-self._sizes[step.file] // PIECE_BYTES))
            size = min(PIECE_BYTES, self._sizes[step.file] - step.number * PIECE_BYTES)
            track = lane.tracks[step.file] if step.hashed else None
            piece = _Piece(step.file, step.number, size, step.needed, lane, track)
            lane.pieces.append(piece)
            if step.needed:
                self._pieces[step.file, step.number] = piece
        self._lanes[output] = lane
        return True

    def _choice(self) -> _Piece | None:
        """Return the next piece of the lane that has least ahead, if there is room. The lock is held."""
        heads = [head for lane in self._lanes.values() if (head := _head(lane)) is not None and self._may(head)]
        return min(heads, key=lambda piece: piece.lane.held, default=None)

    def _may(self, piece: _Piece) -> bool:
        """Tell whether there is room for a piece, or it will be hashed at once and need none. The lock is held."""
        turn = piece.track is not None and piece.track.position == piece.number
        return (turn and (piece.left == 0 or piece.lane.read)) or self._fits(piece)

    def _fits(self, piece: _Piece) -> bool:
        lane, total = piece.lane, sum(each.held for each in self._lanes.values())
        return lane.held + piece.size <= self._room and total + piece.size <= AHEAD_BYTES

    def _mine(self, piece: _Piece) -> _Piece | None:
        """Return what whoever needs a piece is to fetch for it, or None when somebody fetches that or has.

        What is needed before goes first: whoever is to read that may be slow, and what comes out of its turn stays.
        """
        with self._change:
            while not piece.taken and self._comes(piece):
                self._wait()
            if piece.taken:
                return None
            first = _head(piece.lane) or piece
            self._take(first)
            return first

    def _comes(self, piece: _Piece) -> bool:
        """Tell whether to wait for room rather than to fetch a piece at once. The lock is held.

        There will be some without anybody's help, as long as a piece of its lane is under way or being hashed, or the
        threads have some to fetch that are hashed and go. Whoever fetched it now would have it wait for its turn.
        """
        if self._fits(piece):
            return False
        lane, head = piece.lane, _head(piece.lane)
        busy = lane.flying > 0 or any(track.busy for track in lane.tracks.values())
        return busy or (head is not None and head.left == 0)

    def _take(self, piece: _Piece) -> None:
        """Note that somebody fetches a piece. The lock is held."""
        piece.taken = True
        piece.lane.flying += 1
        piece.lane.held += piece.size
        self.peak = max(self.peak, sum(lane.held for lane in self._lanes.values()))

    def _get(self, piece: _Piece) -> None:
        with self._change:
            memory = self._spare.pop() if self._spare else None
        data = memoryview(bytearray(PIECE_BYTES) if memory is None else memory)[: piece.size]
        try:
            self._fetch(piece.file, piece.number * PIECE_BYTES, data)
        except BaseException as error:
            self._fail(error)
            raise
        with self._change:
            piece.data = data
            piece.lane.flying -= 1
            track = piece.track
            if track is not None:
                track.waiting[piece.number] = piece
            self._drop(piece)
            self._change.notify_all()
        if track is not None:
            self._hash(track)

    def _hash(self, track: _Track) -> None:
        """Hash what is here and has its turn, unless another thread is at it."""
        with self._change:
            if track.busy:
                return
            track.busy = True
        while True:
            with self._change:
                piece = track.waiting.pop(track.position, None)
                if piece is None or piece.data is None:
                    track.busy = False
                    return
            track.digest.update(piece.data)
            if track.position + 1 == track.count:
                self._check(track)
            with self._change:
                track.position += 1
                piece.track = None
                self._drop(piece)
                self._change.notify_all()

    def _check(self, track: _Track) -> None:
        expected, found = self._sha256[track.file], track.digest.hexdigest()
        if expected != found:
            error = wrong_digest(self._shown(track.file), expected, found)
            self._fail(error)
            raise error

    def _drop(self, piece: _Piece) -> None:
        """Let a piece go that nobody needs any more. The lock is held."""
        if piece.data is None or piece.left > 0 or piece.readers or piece.track is not None:
            return
        if self._pieces.get((piece.file, piece.number)) is piece:
            del self._pieces[piece.file, piece.number]
        memory = piece.data.obj
        piece.data = None
        piece.lane.held -= piece.size
        if isinstance(memory, bytearray):
            self._spare.append(memory)
        self._change.notify_all()


def _head(lane: _Lane) -> _Piece | None:
    """Return the first piece of a lane that nobody has taken."""
    while lane.pieces and lane.pieces[0].taken:
        lane.pieces.popleft()
    return lane.pieces[0] if lane.pieces else None
