"""Spread the shards of a conversion over a Ray cluster. Ray itself runs in a process of its own; see `driver`."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, Any

from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import ClusterError, UsageError, printable
from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.checkpoint.writing.target import Target
    from k2quant.conversion.plan import Plan
    from k2quant.conversion.spreading.driver import Task, Told
    from k2quant.conversion.spreading.order import Order
    from k2quant.conversion.stream import Progress, Record

_log = logging.getLogger(__name__)

_SHAPE = re.compile(r"auto|ray://[^\s/@?#]+:[0-9]{1,5}", re.ASCII)
_DRIVER = "import sys; from k2quant.conversion.spreading.driver import main; main(int(sys.argv[1]))"
_START = 60.0  # seconds that the driver may be silent while it meets the cluster
_SILENCE = 30.0  # seconds that it may be silent later; Ray's own calls give up after 60, and end the process
_BEGIN = 20.0  # seconds in which a worker begins where its cores are free: Ray starts a Python process for it
_END = 10.0  # seconds that it may take to end its workers
_POLL = 0.1  # seconds between two ticks of a bar
_SIGHT = 70.0  # seconds after which a network's file system shows what another machine wrote: NFS keeps a name for 60
_LEVELS = {"note": logging.INFO, "warn": logging.WARNING}
_AGAIN = "when there is a cluster again, run the same command: it resumes"


def check_cluster(cluster: object) -> str:
    """Return the address of a cluster as it is.

    Raises:
        UsageError: it is none.
        MissingExtra: Ray is not installed.
    """
    if not isinstance(cluster, str) or not _SHAPE.fullmatch(cluster):
        raise UsageError(
            "`cluster=` is "
            + ("no address of a cluster" if isinstance(cluster, str) else f"{cluster!r:.100}")
            + "; expected auto, for the cluster that this machine is part of or that RAY_ADDRESS names, or "
            "ray://HOST:PORT, where HOST is its head and PORT usually 10001"
        )
    need("cluster", f"`cluster=`{cluster}")
    return cluster


class Spread:
    """Who has a cluster write a plan's shards, whatever becomes of single machines."""

    def __init__(self, cluster: str, asked: Order, plan: Plan, *, workers: int | None = None) -> None:
        """Keep what is asked for.

        Args:
            cluster: as `check_cluster` takes it.
            asked: the order by which others make the plan.
            plan: what all make together.
            workers: threads of each machine; None: the cores that the cluster has there.
        """
        self._cluster, self._asked, self._plan, self._workers = cluster, asked, plan, workers

    def write(self, done: Collection[str], folder: Target, progress: Progress | None) -> dict[str, Record]:
        """Have all other shards written; return what a journal notes of each.

        Args:
            done: file names of the shards that are finished already.
            folder: the target, as this machine sees it.
            progress: called with the bytes of weights read so far and in all.

        Raises:
            ClusterError: the cluster is not there, was lost, has no node to work on, or a node cannot take part; what
                stands at the target by then stays.
            K2QuantError: as a conversion on one machine.
        """
        sizes = {shard.file: shard.bytes_read for shard in self._plan.shards if shard.file not in done}
        total = self._plan.bytes_read
        read = total - sum(sizes.values())
        records: dict[str, Record] = {}
        if not sizes:
            return records
        for told in _driven(self._cluster, self._asked, tuple(sizes), self._workers):
            match told.kind:
                case "record" if told.what["shard"] not in records:
                    records[told.what["shard"]] = told.what
                    read += sizes[told.what["shard"]]
                case "read" if progress:
                    progress(min(read + told.what, total), total)
        self._see(records, folder)
        return records

    def _see(self, records: Mapping[str, Record], folder: Target) -> None:
        """Refuse shards that stand elsewhere than at the target that this machine sees.

        Raises:
            ClusterError: there are such.
        """
        until = time.monotonic() + _SIGHT
        for name, record in records.items():
            while folder.size(name) != record["size"]:
                if time.monotonic() > until:
                    raise ClusterError(
                        "was written by another machine and is not seen here",
                        file=f"{self._asked.destination}/{name}",
                        expected=f"{record['size']} bytes",
                        found=folder.size(name),
                        remedy="name a destination that all machines see",
                    )
                time.sleep(_POLL)


def look_over(cluster: str, asked: Order, *, workers: int | None) -> list[dict[str, Any]]:
    """Return what each machine of a cluster has and would take for all of the work alone.

    Raises:
        ClusterError: as `Spread.write`.
    """
    return [told.what for told in _driven(cluster, asked, (), workers) if told.kind == "node"]


def _driven(cluster: str, asked: Order, files: tuple[str, ...], workers: int | None) -> Iterator[Told]:
    """Start a driver, and yield what it tells; log what is for people alone."""
    from k2quant.conversion.spreading.driver import Task

    task = Task(cluster, asked.as_json(), files, asked.device, workers, _BEGIN)
    with _driver(task) as driver:
        for told in driver.told():
            if told.kind in _LEVELS:
                _log.log(_LEVELS[told.kind], "%s", told.what)
            else:
                yield told


class _Driver:
    """The process that speaks with Ray."""

    def __init__(self, process: subprocess.Popen[bytes], talk: Connection, said: IO[bytes], address: str) -> None:
        self._process, self._talk, self._said, self._address = process, talk, said, address
        self.lost = False

    def told(self) -> Iterator[Told]:
        """Yield what it tells, until it is done."""
        heard, patience = time.monotonic(), _START
        while True:
            if not self._talk.poll(_POLL):
                if time.monotonic() - heard > patience:
                    raise self._gone(f"no word from it for {patience:.0f} s")
                continue
            try:
                told: Told = self._talk.recv()
            except (EOFError, ConnectionResetError):  # reset: it ended before it read what it was asked
                raise self._gone(self._last_words()) from None
            heard, patience = time.monotonic(), _SILENCE
            if told.kind == "failed":
                raise told.what
            if told.kind == "done":
                return
            yield told

    def _gone(self, found: str) -> ClusterError:
        self.lost = True
        return ClusterError("the cluster was lost", file=self._address, found=found, remedy=_AGAIN)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line for line in clean(self._said.read().decode(errors="replace")).splitlines() if line.strip()]
        return printable(lines[-1][:300]) if lines else "its driver ended"

    def end(self) -> None:
        """End it, and with it its workers."""
        self._talk.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self.lost else _END)
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def _driver(task: Task) -> Iterator[_Driver]:
    here, there = Pipe()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603  this very Python
            [sys.executable, "-c", _DRIVER, str(there.fileno())],
            pass_fds=(there.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        there.close()
        driver = _Driver(process, here, said, task.address)
        try:
            with contextlib.suppress(BrokenPipeError):  # its last words are read then
                here.send(task)
            yield driver
        finally:
            driver.end()
