"""A copy of the checkout, and runs of its tests in forks of this process, which has imported what is slow to import.

Nothing is written to the checkout: a change goes into the copy, which commands that tests start see as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SLOW_TO_IMPORT = (
    *("click", "compressed_tensors", "hypothesis.strategies", "numba", "numpy.testing", "pytest"),
    *("safetensors.torch", "scipy.stats", "torch", "transformers", "yaml"),
)
_NUMBA = (".nbc", ".nbi")  # compiled loops; they are known by the time of their source, which the copy keeps
_LATER = 1_000  # seconds that a changed file is younger, so that no compiled form of the file as it was is taken


class Answer(NamedTuple):
    """How a run of tests ended."""

    code: int | None
    """pytest's exit code, or a signal's number below 0; None: it was stopped at its limit."""
    seconds: float
    content: Any
    """What the fork handed back."""
    output: str
    """The last lines that it printed."""


def copied(checkout: Path, folder: Path) -> None:
    """Copy what git knows of a checkout, edits included, with what numba has compiled there."""
    listed = subprocess.run(
        [shutil.which("git") or "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = checkout / name
        if source.is_symlink() or source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name, follow_symlinks=False)
    for source in checkout.glob("kernels/**/__pycache__/*"):
        if source.suffix in _NUMBA:
            target = folder / source.relative_to(checkout)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def warm(folder: Path) -> None:
    """Import once what every run needs and no change touches; the package itself is not among it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no fork and no folder is left behind
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # to look for plugins takes longer than most runs
    for name in _SLOW_TO_IMPORT:
        importlib.import_module(name)
    if known := [name for name in sys.modules if name.partition(".")[0] == "k2quant"]:
        raise AssertionError(f"{known} would not be read again")
    gc.freeze()  # else each fork looks through all that was imported, again and again


def tested(
    tests: Sequence[str], plugin: Any, *, limit: float, scratch: Path, result: Callable[[], Any], write: bool
) -> Answer:
    """Run tests in a fork.

    Args:
        tests: files, folders or tests by name.
        plugin: of pytest.
        limit: seconds.
        scratch: folder for what tests write; emptied first.
        result: asked in the fork, at its end, for something that JSON holds.
        write: whether compiled modules are kept for the next run.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    start = time.monotonic()
    child = os.fork()
    if not child:
        _run(tests, plugin, scratch, result, write=write)
    try:
        code = _waited(child, start + limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # itself where this run is stopped, and what it left behind
    content, output = scratch / "result.json", (scratch / "output.txt").read_text(encoding="utf-8", errors="replace")
    found = json.loads(content.read_bytes()) if content.exists() else None
    return Answer(code, time.monotonic() - start, found, "\n".join(output.splitlines()[-15:]))


def _waited(child: int, end: float) -> int | None:
    pause = 0.005
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(tests: Sequence[str], plugin: Any, scratch: Path, result: Callable[[], Any], *, write: bool) -> None:
    """Be the fork: run pytest, hand back, and leave without a word to this process's own files."""
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.environ["TMPDIR"] = str(scratch)
        output = os.open(scratch / "output.txt", os.O_CREAT | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.dont_write_bytecode = not write
        import pytest

        options = [
            "-x",
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "-p",
            "_hypothesis_pytestplugin",
            f"--basetemp={scratch / 'tests'}",
        ]
        code = int(pytest.main([*(options[1:] if write else options), *tests], plugins=[plugin]))
        (scratch / "result.json").write_text(json.dumps(result()), encoding="utf-8")
    except BaseException:  # noqa: BLE001  a fork must not go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def changed(path: Path, code: str) -> Iterator[None]:
    """Hold a file of the copy changed."""
    before, stat = path.read_bytes(), path.stat()
    try:
        path.write_text(code, encoding="utf-8")
        os.utime(path, (stat.st_atime, stat.st_mtime + _LATER))
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
