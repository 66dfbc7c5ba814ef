"""The process that speaks with Ray: a worker on each node, shards to whoever is free, all news to whoever started it.

It is a process of its own, for a Ray driver does not survive its cluster: when the head is lost, its calls hang for a
minute, whatever their timeouts, and then the process is ended (Ray 2.60). Started by `cluster.py`, which hears of it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from k2quant.conversion.spreading.meeting import knock, seat_class, silent, words
from k2quant.errors import ClusterError, K2QuantError
from k2quant.ground.units import counted
from k2quant.ground.version import __version__

_STEP = 0.2  # seconds that a worker waits for news to tell
_LOOK = 2.0  # seconds between two looks at the cluster's nodes
_DEATHS = 3  # of workers of one node, without a shard between them
_NOBODY = 45.0  # seconds without a node to work on
_ABREAST = 8  # shards of one worker, at most


class Task(NamedTuple):
    """What the driver is asked for."""

    address: str
    asked: Mapping[str, Any]
    """The order, as JSON."""
    files: tuple[str, ...]
    """The shards to write; none: a look at each node."""
    device: str
    workers: int | None
    """Threads of each machine; None: the cores that Ray has there."""
    patience: float
    """Seconds in which a worker begins where what it asks for is free."""


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    name: str
    cores: int
    gpus: int


class _Share(NamedTuple):
    """What a worker asks for of its node."""

    cores: int
    gpus: int


class Told(NamedTuple):
    """What the driver says to whoever started it."""

    kind: str
    """`read`, `record`, `note`, `warn`, `node`, `failed` or `done`; `read` comes all the time, as a sign of life."""
    what: Any = None


@dataclass(eq=False)
class _Seat:
    """A worker, and what it has in hand."""

    node: Node
    actor: Any
    threads: int
    heard: Callable[[_Seat, Any], None]
    """Who takes its next answer."""
    holds: set[str] = field(default_factory=set)
    read: int = 0
    """Bytes that it has read of what it holds."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked for."""
    late: bool = False
    """Whether it was said that it does not begin."""


def main(descriptor: int) -> None:
    """Do what stands in the connection, and say all of it there."""
    talk = Connection(descriptor)
    task: Task = talk.recv()
    try:
        _Driver(talk, task).run()
    except (EOFError, BrokenPipeError):  # whoever started it is gone
        return
    except K2QuantError as error:
        talk.send(Told("failed", error))
    except Exception as error:  # noqa: BLE001  the words of Ray's own errors
        talk.send(Told("failed", ClusterError("the cluster failed", file=task.address, found=words(error))))


class _Driver:
    def __init__(self, talk: Connection, task: Task) -> None:
        self._talk, self._task = talk, task
        self._todo = deque(task.files)
        self._left = set(task.files)
        self._seats: dict[Any, _Seat] = {}
        """By what each is asked at the moment; it is asked one thing at a time."""
        self._resting: list[_Seat] = []
        self._deaths: dict[str, int] = {}
        self._met: set[str] = set()
        self._facts: dict[str, Mapping[str, Any]] = {}
        """What each node said of itself, where there is nothing to write."""
        self._last_words = ""
        self._seen = self._looked = time.monotonic()

    def run(self) -> None:
        """Write the shards, or look at each node."""
        import ray

        knock(self._task.address)
        try:
            ray.init(address=self._task.address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise silent(self._task.address, error) from error
        try:
            self._write() if self._task.files else self._show()
            self._talk.send(Told("done"))
        finally:
            for seat in (*self._seats.values(), *self._resting):
                ray.kill(seat.actor)
            ray.shutdown()

    def _show(self) -> None:
        """Say what each node has."""
        nodes = self._nodes()
        if not nodes:
            raise self._nobody("no node has a core")
        for node in nodes:
            self._sit(node)
        while self._seats:
            self._turn()
        if not self._facts:
            raise self._nobody("no node is left to work on")
        for node in (node for node in nodes if node.id in self._facts):
            said = {"name": node.name, "cores": node.cores, "gpus": node.gpus, **self._facts[node.id]}
            self._talk.send(Told("node", said))

    def _write(self) -> None:
        self._seat_all()
        while self._left:
            if time.monotonic() - self._looked > _LOOK:
                self._seat_all()
            self._turn()

    def _turn(self) -> None:
        """Hear who has something to say, for a while; say who does not begin."""
        import ray

        if self._seats:
            ready, waiting = ray.wait(list(self._seats), timeout=_STEP)
            for ref in (*ready, *ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]) if waiting else ready:
                self._hear(ref, self._seats.pop(ref))
        else:
            time.sleep(_STEP)
        for seat in self._seats.values():
            if seat.heard == self._meet and not seat.late and time.monotonic() - seat.since > self._task.patience:
                self._say_late(seat)
        self._listen()

    def _say_late(self, seat: _Seat) -> None:
        """Say what a worker that has not begun asks for, and what is free."""
        import ray

        seat.late = True
        untyped: Any = ray
        free, has, asked = untyped.available_resources(), untyped.cluster_resources(), self._share(seat.node)
        kinds = [("core", "CPU", asked.cores), *([("GPU", "GPU", asked.gpus)] if asked.gpus else [])]
        wanted = " and ".join(counted(number, kind) for kind, _, number in kinds)
        left = " and ".join(f"{free.get(key, 0):g} of {counted(int(has.get(key, 0)), kind)}" for kind, key, _ in kinds)
        what = (
            f"the worker on {seat.node.name} has not begun for {self._task.patience:g} s: it asks for {wanted} there, "
            f"free in the whole cluster: {left}; another job may hold the rest (`ray status` says how much), "
            "and the worker begins when that lets go"
        )
        self._talk.send(Told("warn", what))

    def _listen(self) -> None:
        """Give a sign of life, and end when nobody listens."""
        self._talk.send(Told("read", sum(seat.read for seat in self._seats.values())))
        if self._talk.poll():
            self._talk.recv()  # ends in EOFError: nothing is ever said but the end

    # Nodes

    def _nodes(self) -> list[Node]:
        """Return the nodes that live and have what is asked for."""
        import ray

        found = []
        nodes: Any = ray.nodes  # it has no types
        for each in nodes():
            has = each["Resources"]
            node = Node(
                each["NodeID"],
                f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']})",
                int(has.get("CPU", 0)),
                int(has.get("GPU", 0)),
            )
            if each["Alive"] and node.cores and (node.gpus or not self._on_gpus):
                found.append(node)
        return found

    @property
    def _on_gpus(self) -> bool:
        return self._task.device != "cpu"

    def _workers(self, node: Node) -> int:
        """Return how many workers a node has: one for each GPU, where they are used."""
        return min(node.gpus, node.cores) if self._on_gpus else 1

    def _share(self, node: Node) -> _Share:
        return _Share(node.cores // self._workers(node), 1 if self._on_gpus else 0)

    def _threads(self, node: Node) -> int:
        return self._task.workers or self._share(node).cores

    def _place(self, node: Node) -> dict[str, Any]:
        """Return where and with what an actor runs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cores, gpus = self._share(node)
        return {
            "num_cpus": cores,
            "num_gpus": gpus,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }

    def _seat_all(self) -> None:
        """Have a worker on every node that has none, new ones too."""
        self._looked = time.monotonic()
        nodes = [node for node in self._nodes() if self._deaths.get(node.id, 0) < _DEATHS]
        seated = [seat.node.id for seat in (*self._seats.values(), *self._resting)]
        for node in nodes:
            for _ in range(self._workers(node) - seated.count(node.id)):
                self._sit(node)
        if nodes:
            self._seen = time.monotonic()
        elif self._deaths and not self._seats:
            raise self._nobody("no node is left to work on")
        elif time.monotonic() - self._seen > _NOBODY:
            raise self._nobody("no node has a core" + (" and a GPU" if self._on_gpus else ""))

    def _nobody(self, what: str) -> ClusterError:
        return ClusterError(
            what,
            file=self._task.address,
            found=self._last_words or None,
            remedy="give the cluster nodes, and run the same command again: it resumes",
        )

    def _sit(self, node: Node) -> None:
        actor = seat_class().options(**self._place(node)).remote()
        ref = actor.meet.remote()
        self._seats[ref] = _Seat(node, actor, self._threads(node), self._meet)

    # What workers say

    def _hear(self, ref: Any, seat: _Seat) -> None:
        import ray

        try:
            answer = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # not of the work, whose errors come as values
            raise ClusterError("a worker failed", file=seat.node.name, found=words(error)) from error
        except ray.exceptions.RayError as error:
            self._lost(seat, error)
            return
        seat.heard(seat, answer)

    def _ask(self, seat: _Seat, ref: Any, heard: Callable[[_Seat, Any], None]) -> None:
        seat.heard = heard
        self._seats[ref] = seat

    def _lost(self, seat: _Seat, error: Exception) -> None:
        """Give what a lost worker had in hand to others."""
        self._last_words = words(error)
        self._deaths[seat.node.id] = self._deaths.get(seat.node.id, 0) + 1
        again = [file for file in self._task.files if file in seat.holds]
        self._todo.extendleft(reversed(again))
        what = f"; {counted(len(again), 'shard')} will be written again" if again else ""
        self._talk.send(Told("warn", f"a worker on {seat.node.name} was lost{what}"))
        resting, self._resting = self._resting, []
        for each in resting:
            self._next(each)
        self._looked = 0.0

    def _meet(self, seat: _Seat, facts: Mapping[str, Any]) -> None:
        """Begin the work, where the node has this release."""
        if facts["version"] != __version__:
            has = f"k2quant {facts['version']}" if facts["version"] else "no k2quant"
            raise ClusterError(
                "expected the same release on all machines",
                file=seat.node.name,
                expected=f"k2quant {__version__}",
                found=has,
                remedy=f"install it there, for the Python of its Ray, {facts['python']}",
            )
        if not self._task.files:
            self._ask(seat, seat.actor.look.remote(dict(self._task.asked), seat.threads), self._looked_over)
            return
        attempt = secrets.token_hex(4)
        self._ask(seat, seat.actor.begin.remote(dict(self._task.asked), attempt, seat.threads), self._begun)

    def _looked_over(self, seat: _Seat, answer: tuple[BaseException | None, Any]) -> None:
        import ray

        error, facts = answer
        if error is not None:
            raise self._at(seat.node, error)
        self._facts[seat.node.id] = facts
        ray.kill(seat.actor)  # others may wait for its cores while this one waits for another node's

    def _begun(self, seat: _Seat, error: BaseException | None) -> None:
        if error is not None:
            raise self._at(seat.node, error)
        if seat.node.id not in self._met:
            self._met.add(seat.node.id)
            self._talk.send(Told("note", f"{seat.node.name} works with {counted(seat.threads, 'thread')}"))
        self._next(seat)

    def _next(self, seat: _Seat) -> None:
        """Give a worker shards, or let it rest."""
        workers = len(self._seats) + len(self._resting) + 1
        fair = len(self._todo) // (2 * workers)  # half of its share, so that at the end nobody waits long for another
        number = max(1, min(_ABREAST, seat.threads, fair))
        files = [self._todo.popleft() for _ in range(min(number, len(self._todo)))]
        seat.holds.update(files)
        if files:
            self._ask(seat, seat.actor.step.remote(files, _STEP), self._news)
        else:
            self._resting.append(seat)

    def _news(self, seat: _Seat, answer: tuple[int, list[Any], bool, BaseException | None]) -> None:
        read, records, idle, error = answer
        if error is not None:
            raise error
        seat.read = read
        for record in records:
            file = record["shard"]
            seat.holds.discard(file)
            self._deaths.pop(seat.node.id, None)
            if file in self._left:
                self._left.discard(file)
                self._talk.send(Told("record", record))
        if idle:
            self._next(seat)
        else:
            self._ask(seat, seat.actor.step.remote([], _STEP), self._news)

    def _at(self, node: Node, error: BaseException) -> BaseException:
        """Return an error of one machine alone with the machine's name."""
        if isinstance(error, K2QuantError):
            return ClusterError("cannot take part", file=node.name, found=str(error))
        return error
