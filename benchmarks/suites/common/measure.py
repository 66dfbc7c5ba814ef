"""Run a command and say what it cost: wall time, processor seconds, memory. Only the standard library.

The caller must stay small: a child's `ru_maxrss` is never below the memory of the process that started it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.01
TAIL_LINES = 15
CAT = shutil.which("cat") or "cat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process cost."""

    wall_s: float
    """From before the start of the process until after its end."""
    cpu_s: float
    """User and system seconds, of all its threads."""
    peak_rss: int
    """Bytes; `ru_maxrss`, which counts mapped pages of files too."""
    peak_private: int | None
    """Bytes; largest RssAnon + RssShmem seen in samples 10 ms apart, or nothing if not sampled."""

    def record(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return asdict(self)


class Sampler(threading.Thread):
    """Watches how much memory of its own a process holds: mapped files are left out."""

    def __init__(self, pid: int) -> None:
        """Remember whom to watch."""
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.done = threading.Event()
        self.peak = 0

    def run(self) -> None:
        """Read until the process has gone or `done` is set."""
        while not self.done.is_set():
            try:
                lines = self.status.read_text().splitlines()
            except OSError:
                return
            sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
            self.peak = max(self.peak, sum(sizes) * 1024)
            time.sleep(SAMPLE_SECONDS)


def run(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    sample: bool = False,
) -> Run:
    """Run a command to its end, its output going to `log`.

    Args:
        command: program and arguments.
        log: file for standard output and error; overwritten.
        cwd: folder to run in.
        env: variables added to ours.
        sample: also watch the memory that is not mapped from files. It costs the machine a little, so not for timing.

    Raises:
        SystemExit: the command failed; the message ends with the last lines of its output.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env={**os.environ, **(env or {})}
        )
        sampler = Sampler(process.pid)
        if sample:
            sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    sampler.done.set()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    return Run(
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss=usage.ru_maxrss * 1024,
        peak_private=sampler.peak if sample else None,
    )


def flush() -> float:
    """Write all dirty pages to the disk; return the seconds that took."""
    start = time.perf_counter()
    os.sync()
    return time.perf_counter() - start


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    return sorted(folder.rglob("*.safetensors"))


def size(folder: Path) -> int:
    """Return the bytes of a checkpoint's safetensors files."""
    return sum(path.stat().st_size for path in shards(folder))


def warm(folder: Path) -> None:
    """Read a checkpoint, so that its pages are in the cache."""
    subprocess.run([CAT, *map(str, shards(folder))], stdout=subprocess.DEVNULL, check=True)


def cool(folder: Path) -> None:
    """Drop a checkpoint's pages from the cache."""
    os.sync()
    for path in shards(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_bytes(folder: Path, total: int, files: int) -> float:
    """Write random bytes from memory to a few files, flush each; return the seconds that took."""
    chunk = memoryview(os.urandom(1 << 23))
    folder.mkdir(parents=True)
    start = time.perf_counter()
    for number in range(files):
        left = total * (number + 1) // files - total * number // files
        with (folder / f"{number}").open("wb", buffering=0) as file:
            while left:
                left -= file.write(chunk[:left])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    remove(folder)
    return seconds


def remove(folder: Path) -> None:
    """Delete a folder, if there is one, and let the disk settle."""
    if folder.exists():
        shutil.rmtree(folder)
        os.sync()


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
