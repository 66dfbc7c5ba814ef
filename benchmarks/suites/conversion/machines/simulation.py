"""Simulate a conversion over many machines: discrete events, piece by piece through what it passes on its way.

A piece of a shard is read from the source, converted on a core, and written to the target. What it passes are stations,
some of one machine (its line in, cores, line out, disk), some of all (a file system's servers). A station has one or
more servers, each of a rate; pieces wait there in the order in which they come. A machine takes shards as the cluster's
driver gives them: some at a time, and the next ones when those are written. It has so many pieces on their way, and no
more, for memory is bounded.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple


class Station(NamedTuple):
    """What a piece passes: the bytes a second of each of its servers."""

    name: str
    rate: float
    servers: int = 1


class Leg(NamedTuple):
    """A step on a piece's way."""

    station: Station
    shared: bool
    """Whether all machines have one together; else each has its own."""
    share: float = 1.0
    """Bytes at this station for each byte that is read from the source."""


class Work(NamedTuple):
    """A conversion as it is given to machines."""

    shards: Sequence[float]
    """Bytes that each reads."""
    legs: Sequence[Leg]
    """The way of each piece."""
    machines: int
    abreast: int = 8
    """Shards that a machine takes at a time, at most."""
    piece: float = 64e6
    """Bytes."""
    window: int = 64
    """Pieces of a machine that are on their way, at most."""
    pause: float = 0.0
    """Seconds between the last byte of a machine's shards and its next ones: flush, record, answer of the driver."""


class Outcome(NamedTuple):
    """What a simulation came to."""

    seconds: float
    busy: dict[str, float]
    """The share of its servers' time that each station worked, by its name; of all machines together."""

    @property
    def rules(self) -> str:
        """The station that worked most."""
        return max(self.busy, key=lambda name: self.busy[name])


@dataclass
class _Queue:
    """A station at work."""

    station: Station
    free: int
    waiting: deque[_Piece] = field(default_factory=deque)
    worked: float = 0.0


@dataclass
class _Machine:
    queues: list[_Queue]
    """One for each leg."""
    rest: deque[float] = field(default_factory=deque)
    """Pieces of the shards in hand that have not set out."""
    travelling: int = 0


@dataclass
class _Piece:
    machine: _Machine
    size: float
    leg: int = 0


def abreast_of(work: Work, left: int) -> int:
    """Return how many shards a machine takes next: half of its share of what is left, as the driver has it."""
    return max(1, min(work.abreast, left // (2 * work.machines)))


def bound(work: Work) -> dict[str, float]:
    """Return the seconds that each station needs for all bytes, were it never idle; the most of them is a bound."""
    total, seconds = sum(work.shards), dict[str, float]()
    for leg in work.legs:
        servers = leg.station.servers * (1 if leg.shared else work.machines)
        name = leg.station.name
        seconds[name] = seconds.get(name, 0.0) + total * leg.share / (leg.station.rate * servers)
    return seconds


def simulate(work: Work) -> Outcome:
    """Return how long it takes, and how busy each station was."""
    return _Run(work).run()


class _Run:
    def __init__(self, work: Work) -> None:
        self._work = work
        shared = {leg.station.name: _queue(leg.station) for leg in work.legs if leg.shared}
        self._machines = []
        for _ in range(work.machines):
            own: dict[str, _Queue] = {}
            for leg in work.legs:
                own.setdefault(leg.station.name, shared.get(leg.station.name) or _queue(leg.station))
            self._machines.append(_Machine([own[leg.station.name] for leg in work.legs]))
        self._todo = deque(work.shards)
        self._events: list[tuple[float, int, _Piece | _Machine]] = []
        self._numbers = count()
        self._now = 0.0

    def run(self) -> Outcome:
        for machine in self._machines:
            self._take(machine)
        while self._events:
            self._now, _, what = heapq.heappop(self._events)
            if isinstance(what, _Machine):
                self._take(what)
            else:
                self._arrive(what)
        return Outcome(self._now, self._busy())

    def _busy(self) -> dict[str, float]:
        queues = {id(queue): queue for machine in self._machines for queue in machine.queues}
        worked: dict[str, float] = {}
        could: dict[str, float] = {}
        for queue in queues.values():
            name = queue.station.name
            worked[name] = worked.get(name, 0.0) + queue.worked
            could[name] = could.get(name, 0.0) + queue.station.servers * self._now
        return {name: worked[name] / max(could[name], 1e-12) for name in worked}

    def _later(self, seconds: float, what: _Piece | _Machine) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), what))

    def _take(self, machine: _Machine) -> None:
        """Give a machine its next shards; their pieces set out in turns."""
        number = abreast_of(self._work, len(self._todo))
        taken = [self._todo.popleft() for _ in range(min(number, len(self._todo)))]
        pieces = [_pieces(size, self._work.piece) for size in taken]
        machine.rest.extend(piece for row in _turns(pieces) for piece in row)
        self._fill(machine)

    def _fill(self, machine: _Machine) -> None:
        while machine.rest and machine.travelling < self._work.window:
            machine.travelling += 1
            self._enter(_Piece(machine, machine.rest.popleft()))

    def _enter(self, piece: _Piece) -> None:
        queue = piece.machine.queues[piece.leg]
        queue.waiting.append(piece)
        self._serve(queue)

    def _serve(self, queue: _Queue) -> None:
        while queue.free and queue.waiting:
            piece = queue.waiting.popleft()
            seconds = piece.size * self._work.legs[piece.leg].share / queue.station.rate
            queue.free -= 1
            queue.worked += seconds
            self._later(seconds, piece)

    def _arrive(self, piece: _Piece) -> None:
        """Take a piece out of a station, and send it on."""
        machine = piece.machine
        queue = machine.queues[piece.leg]
        queue.free += 1
        piece.leg += 1
        if piece.leg < len(machine.queues):
            self._enter(piece)
        else:
            machine.travelling -= 1
            self._fill(machine)
            if not machine.rest and not machine.travelling and self._todo:
                self._later(self._work.pause, machine)
        self._serve(queue)


def _queue(station: Station) -> _Queue:
    return _Queue(station, station.servers)


def _pieces(size: float, piece: float) -> list[float]:
    """Cut a shard into equal pieces, none larger than `piece`."""
    number = max(1, -int(-size // piece))
    return [size / number] * number


def _turns(rows: list[list[float]]) -> list[list[float]]:
    """Return the first pieces of all shards, then the second ones, and so on."""
    longest = max(map(len, rows), default=0)
    return [[row[turn] for row in rows if turn < len(row)] for turn in range(longest)]
