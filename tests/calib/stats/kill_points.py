"""Write statistics again and again, killed before the first, second, third ... file operation, then resumed.

Usage: python kill_points.py CONFTEST FOLDER

Prints the number of kills, or what was wrong after one of them and exits 1. A process of its own, because it forks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from importlib import util
from pathlib import Path
from typing import Any

from k2quant.calib.stats.reading import open_stats
from k2quant.errors import CheckpointError
from kill_everywhere import arm


def made_up(conftest: Path, folder: Path) -> Any:
    """Return what the tests' fixture of this name gives."""
    found = util.spec_from_file_location("made_up", conftest)
    assert found is not None
    assert found.loader is not None
    module = util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.MadeUp(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(maker: Any, manifest: Any, kill_at: int) -> bool:
    """Write in a child; tell whether it was killed."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            arm(kill_at)
            maker.write("again", manifest)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"the run to be killed at {kill_at} failed")
    return os.WIFSIGNALED(status)


def fault(found: dict[str, bytes], folder: Path, whole: dict[str, bytes]) -> str | None:
    """Say in what a folder that a kill left behind looks finished but is not."""
    for name, data in found.items():
        if not name.startswith((".k2quant", "INCOMPLETE")) and not name.endswith(".partial") and data != whole[name]:
            return f"has a broken {name}"
    try:
        open_stats(folder)
    except CheckpointError:
        return None
    left = {name: data for name, data in found.items() if not name.startswith(".k2quant")}
    return None if left == whole else f"is taken for finished: {sorted(found)}"


def unflushed(fd: Any) -> None:
    """Flush nothing: a kill loses nothing that was written, and disks are slow."""
    del fd


def main(conftest: Path, folder: Path) -> None:
    """Kill at every operation, one after another, until a run comes through."""
    os.fsync = unflushed
    maker = made_up(conftest, folder)
    manifest = maker.manifest(num_hidden_layers=1)
    whole = contents(maker.write("whole", manifest))
    again = folder / "again"
    for number in itertools.count(1):
        shutil.rmtree(again, ignore_errors=True)
        killed = run(maker, manifest, number)
        if killed:
            if why := fault(contents(again), again, whole):
                sys.exit(f"killed at {number}, the folder {why}")
            maker.write("again", manifest)
        if contents(again) != whole:
            sys.exit(f"killed at {number} and resumed, the folder differs: {sorted(contents(again))}")
        if not killed:
            sys.stdout.write(f"{number - 1}\n")
            return


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
