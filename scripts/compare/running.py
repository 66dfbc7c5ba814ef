"""Run the commands with the package of one checkout, and keep what they wrote and said."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from compare.commands import Command, Group, Prepare

_RECORD = "compared.json"
"""Says what was run in a folder; without it no folder is ours to empty."""
_LIMIT = 900  # seconds of a command; the longest takes one minute
_PACKAGES = ("click", "lm_eval", "matplotlib", "numba", "numpy", "torch", "transformers")

_WHERE = "import k2quant; print(k2quant.__file__); print(k2quant.__version__)"

_SETTINGS = {
    "COLUMNS": "100",  # tables fit the terminal
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LC_ALL": "C.UTF-8",
    "MKL_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",  # the order of torch's sums is that of its threads
    "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written to a checkout
    "PYTHONHASHSEED": "0",
    "TERM": "dumb",
    "TOKENIZERS_PARALLELISM": "false",
    "TZ": "UTC",
}
_FOREIGN = ("CUDA", "GITHUB", "HF_", "K2QUANT", "NUMBA", "OMP", "OPENAI", "PYTHON", "TORCH", "TRITON", "XDG")
"""Beginnings of variables that might change what a command does, and are not passed on."""

Record = dict[str, Any]
"""What a run notes of itself at its end: checkout, version, commands."""
Times = dict[str, float]
"""Seconds of each command of a group."""


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    """`old` or `new`."""
    checkout: Path
    home: Path
    """Holds all below."""

    @property
    def files(self) -> Path:
        """Where the commands run."""
        return self.home / "files"

    @property
    def said(self) -> Path:
        """What they said: `GROUP/NAME.stdout`, `.stderr` and `.exit`."""
        return self.home / "said"

    def record(self) -> Record:
        """Return what was noted at the end of a run; nothing where there was none."""
        path = self.home / _RECORD
        found: Record = json.loads(path.read_text()) if path.is_file() else {}
        return found


@contextlib.contextmanager
def held(work: Path) -> Iterator[None]:
    """Make the folder of both sides if need be, and keep a second comparison out of it.

    Raises:
        SystemExit: one is under way there.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{work}: another comparison is under way here; name another --work")
        yield


def run(sides: Iterable[Side], groups: Iterable[Group], *, jobs: int, tell: Callable[[str], None]) -> None:
    """Empty the folders of sides, run all commands in them, and note what was run.

    Args:
        sides: one or both.
        groups: each behind what it needs.
        jobs: commands at a time.
        tell: is told of each group that is done.

    Raises:
        SystemExit: a folder is not ours, the package is not that of the checkout, or a command does not end.
    """
    sides, groups = tuple(sides), tuple(groups)
    heads = {side: _begin(side) for side in sides}
    running: dict[tuple[Side, str], Future[Times]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for group, side in product(groups, sides):
            needed = [running[side, name] for name in group.needs]
            running[side, group.name] = pool.submit(_run_group, side, group, needed, tell)
    for side in sides:
        seconds = {group.name: running[side, group.name].result() for group in groups}
        record = {**heads[side], **made_by(groups), "seconds": seconds}
        (side.home / _RECORD).write_text(json.dumps(record, indent=1))


def _run_group(side: Side, group: Group, needed: Iterable[Future[Times]], tell: Callable[[str], None]) -> Times:
    """Run the commands of a group, one after the other; return the seconds that each took."""
    for other in needed:
        other.result()
    begun, seconds = time.monotonic(), {}
    (side.files / group.name).mkdir()
    (side.said / group.name).mkdir()
    _prepare(group.prepare, side, side.said / group.name / "all")
    for command in group.commands:
        seconds[command.name] = _call(side, group.name, command)
    tell(f"{side.name}: {group.name}, {len(group.commands)} commands in {time.monotonic() - begun:.0f} s")
    return seconds


def made_by(groups: Iterable[Group]) -> Record:
    """Return what must be equal for two runs to be comparable."""
    return {
        "python": sys.version,
        "packages": {name: version(name) for name in _PACKAGES},
        "settings": _SETTINGS,
        "groups": {group.name: {c.name: list(c.arguments) for c in group.commands} for group in groups},
    }


def reusable(side: Side, groups: Iterable[Group]) -> str | None:
    """Return why what an earlier run left cannot stand for one of now, or None if it can."""
    record, wanted = side.record(), made_by(groups)
    if not record:
        return "no finished run is there"
    if record["checkout"] != str(side.checkout):
        return f"it is of {record['checkout']}"
    for key in ("python", "packages", "settings"):
        if record[key] != wanted[key]:
            return f"it was made with another {key}"
    other = [name for name, commands in wanted["groups"].items() if record["groups"].get(name) != commands]
    return f"other commands were run: {', '.join(other)}" if other else None


def _begin(side: Side) -> Record:
    """Make the folder of a side, empty, and return what a run notes of where it is and what it runs."""
    if side.home.exists() and any(side.home.iterdir()) and not (side.home / _RECORD).is_file():
        sys.exit(f"{side.home}: not empty, and nothing of an earlier comparison; name another --work")
    if side.home.exists():
        shutil.rmtree(side.home)
    side.files.mkdir(parents=True)
    side.said.mkdir()
    (side.home / _RECORD).write_text("{}")  # a run that is stopped leaves a folder that the next may empty
    return {
        "checkout": str(side.checkout),
        "commit": _commit(side.checkout),
        "version": _version(side),
        "home": str(side.home),
        "prefix": sys.prefix,
    }


def _version(side: Side) -> str:
    """Return the version of the package that the commands will run.

    Raises:
        SystemExit: it does not lie in the checkout.
    """
    words = [sys.executable, "-P", "-c", _WHERE]
    done = subprocess.run(words, cwd=side.files, env=_environment(side), capture_output=True, text=True, check=False)
    place, _, number = done.stdout.strip().partition("\n")
    if done.returncode or not Path(place).resolve().is_relative_to(side.checkout):
        sys.exit(f"{side.checkout}: k2quant would be taken from {place or 'nowhere'}\n{done.stderr}")
    return number


def _commit(checkout: Path) -> str:
    git = shutil.which("git") or "git"
    words = [git, "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _environment(side: Side) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    cache = side.home / "cache"
    places = {
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "NUMBA_CACHE_DIR": "numba",
        "XDG_CACHE_HOME": "xdg",
    }
    return (
        kept
        | _SETTINGS
        | {name: str(cache / folder) for name, folder in places.items()}
        | {"PYTHONPATH": str(side.checkout)}
    )


def _prepare(step: Prepare | None, side: Side, said: Path) -> None:
    """Take a step before a command; note it where that fails, as it does when the package has not written a file."""
    try:
        if step is not None:
            step(side.files)
    except OSError as error:
        said.with_name(f"{said.name}.unprepared").write_text(f"{error}\n")


def _call(side: Side, group: str, command: Command) -> float:
    """Run one command; return how many seconds it took.

    Raises:
        SystemExit: it does not end.
    """
    said, begun = side.said / group, time.monotonic()
    _prepare(command.before, side, said / command.name)
    words = [sys.executable, "-P", *command.arguments]
    with (said / f"{command.name}.stdout").open("wb") as out, (said / f"{command.name}.stderr").open("wb") as err:
        try:
            done = subprocess.run(
                words,
                cwd=side.files,
                env=_environment(side),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            sys.exit(f"{side.name}: `{' '.join(words)}` did not end within {_LIMIT} seconds")
    (said / f"{command.name}.exit").write_text(f"{done.returncode}\n")
    return round(time.monotonic() - begun, 2)
