"""Run the commands with the package of one checkout, and keep what they wrote and said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from compare.commands import Command, Group

_RECORD = "compared.json"
"""Says what was run in a folder; without it no folder is ours to empty."""
_LIMIT = 900  # seconds of a command; the longest takes one minute
_PACKAGES = ("click", "lm_eval", "matplotlib", "numba", "numpy", "rich", "torch", "transformers")

_WHERE = "import k2quant; print(k2quant.__file__); print(k2quant.__version__)"

_SETTINGS = {
    "COLUMNS": "100",  # rich and click fit their tables to the terminal
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


def run(side: Side, groups: Iterable[Group], tell: Callable[[str], None]) -> None:
    """Empty the folder of a side, run all commands in it and note what was run.

    Raises:
        SystemExit: the folder is not ours, the package is not that of the checkout, or a command does not end.
    """
    _claim(side)
    groups, seconds = tuple(groups), {}
    package = _package(side)
    for group in groups:
        begun = time.monotonic()
        (side.files / group.name).mkdir(exist_ok=True)
        (side.said / group.name).mkdir()
        if group.prepare is not None:
            group.prepare(side.files)
        for command in group.commands:
            seconds[f"{group.name} {command.name}"] = _call(side, group.name, command)
        tell(f"{side.name}: {group.name}, {len(group.commands)} commands in {time.monotonic() - begun:.0f} s")
    record = {"checkout": str(side.checkout), "home": str(side.home), **package, **made_by(groups), "seconds": seconds}
    (side.home / _RECORD).write_text(json.dumps(record, indent=1))


def made_by(groups: Iterable[Group]) -> Record:
    """Return what must be equal for two runs to be comparable."""
    return {
        "python": f"{sys.version} {sys.executable}",
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


def _claim(side: Side) -> None:
    if side.home.exists() and any(side.home.iterdir()) and not (side.home / _RECORD).is_file():
        sys.exit(f"{side.home}: not empty, and nothing of an earlier comparison; name another --work")
    shutil.rmtree(side.home, ignore_errors=True)
    side.files.mkdir(parents=True)
    side.said.mkdir()
    (side.home / _RECORD).write_text("{}")  # a run that is stopped leaves a folder that the next may empty


def _package(side: Side) -> dict[str, str]:
    """Return the version of the package that the commands will run.

    Raises:
        SystemExit: it does not lie in the checkout.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", _WHERE],
        cwd=side.files,
        env=_environment(side),
        capture_output=True,
        text=True,
        check=False,
    )
    place, _, number = done.stdout.strip().partition("\n")
    if done.returncode or not Path(place).resolve().is_relative_to(side.checkout):
        sys.exit(f"{side.checkout}: k2quant would be taken from {place or 'nowhere'}\n{done.stderr}")
    return {"version": number, "commit": _commit(side.checkout)}


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


def _call(side: Side, group: str, command: Command) -> float:
    """Run one command; return how many seconds it took."""
    if command.before is not None:
        command.before(side.files)
    said, begun = side.said / group, time.monotonic()
    with (said / f"{command.name}.stdout").open("wb") as out, (said / f"{command.name}.stderr").open("wb") as err:
        done = subprocess.run(
            [sys.executable, "-P", *command.arguments],
            cwd=side.files,
            env=_environment(side),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            timeout=_LIMIT,
            check=False,
        )
    (said / f"{command.name}.exit").write_text(f"{done.returncode}\n")
    return round(time.monotonic() - begun, 2)
