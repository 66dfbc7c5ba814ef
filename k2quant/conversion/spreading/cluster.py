"""Spread the shards of a conversion over a Ray cluster. Ray itself runs in a process of its own; see `driver`."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, Any

from k2quant.errors import ClusterError, UsageError, printable
from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.conversion.spreading.driver import Task, Told
    from k2quant.conversion.spreading.order import Order
    from k2quant.conversion.stream import Record

_SHAPE = re.compile(r"auto|ray://[^\s/@?#]+:[0-9]{1,5}", re.ASCII)
_DRIVER = "import sys; from k2quant.conversion.spreading.driver import main; main(int(sys.argv[1]))"
_START = 120.0  # seconds that the driver may be silent while it meets the cluster
_SILENCE = 30.0  # seconds that it may be silent later; Ray's own calls give up after 60, and end the process
_END = 10.0  # seconds that it may take to end its workers
_POLL = 0.1  # seconds between two ticks of a bar
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


def write_over(
    cluster: str,
    asked: Order,
    files: Mapping[str, int],
    *,
    workers: int | None,
    record: Callable[[Record], None],
    progress: Callable[[int], None],
    note: Callable[[str], None],
) -> None:
    """Have a cluster write shards, whatever becomes of single machines.

    Args:
        cluster: as `check_cluster` takes it.
        asked: what all make together.
        files: the shards, with the bytes that each reads.
        workers: threads of each machine; None: the cores that the cluster has there.
        record: called with what each shard came to, once it stands at the target.
        progress: called with the bytes of weights read so far.
        note: called with what is worth a line: a machine that works, one that was lost.

    Raises:
        ClusterError: the cluster is not there, was lost, has no node to work on, or a node cannot take part.
        K2QuantError: as a conversion on one machine.
    """
    done, left = 0, dict(files)
    for told in _driven(cluster, asked, tuple(files), workers):
        match told.kind:
            case "read":
                progress(done + told.what)
            case "record" if told.what["shard"] in left:
                done += left.pop(told.what["shard"])
                record(told.what)
            case "note":
                note(told.what)


def look_over(cluster: str, asked: Order, *, workers: int | None) -> list[dict[str, Any]]:
    """Return what each machine of a cluster has and would take for all of the work alone.

    Raises:
        ClusterError: as `write_over`.
    """
    return [told.what for told in _driven(cluster, asked, (), workers) if told.kind == "node"]


def _driven(cluster: str, asked: Order, files: tuple[str, ...], workers: int | None) -> Iterator[Told]:
    """Start a driver, and yield what it tells."""
    from k2quant.conversion.spreading.driver import Task

    task = Task(cluster, asked.as_json(), files, asked.device, workers)
    with _driver(task) as driver:
        yield from driver.told()


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
            except EOFError:
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
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
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
