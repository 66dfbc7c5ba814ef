"""Convert a checkpoint again and again, killed before its first, second, third ... file operation, then resumed.

Usage: python kill_everywhere.py FORMAT SOURCE DESTINATION REFERENCE [OLD]

REFERENCE is an undisturbed conversion to FORMAT. With OLD, a finished conversion of other options, the destination
starts as a copy of it and each run restarts. Prints the number of kills, or what was wrong after one of them and
exits 1.

A process of its own, without threads, because it forks.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import k2quant
import k2quant.conversion.stream
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT

OPERATIONS = ("open", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "unlink", "mkdir", "rmdir")


def changes(name: str, arguments: Sequence[Any]) -> bool:
    """Tell whether an operation changes anything: files that are read are opened, too."""
    return name != "open" or bool(arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))


def arm(number: int) -> None:
    """Let this process be killed before the file operation of this number; of a write, half is done."""
    count = itertools.count(1)

    def armed(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if changes(name, arguments) and next(count) == number:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    operation(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, armed(name, getattr(os, name)))


def operations(work: Callable[[], object]) -> int:
    """Do something; return how many operations it took that `arm` can kill before."""
    count = itertools.count()

    def counting(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if changes(name, arguments):
                next(count)
            return operation(*arguments, **options)

        return call

    real = {name: getattr(os, name) for name in OPERATIONS}
    try:
        for name, operation in real.items():
            setattr(os, name, counting(name, operation))
        work()
    finally:
        for name, operation in real.items():
            setattr(os, name, operation)
    return next(count)


def in_a_child(work: Callable[[], object]) -> bool:
    """Do something in a child, which must not fail; tell whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  the child must not go on with the parent's work
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        msg = "the child failed, see stderr"
        raise AssertionError(msg)
    return os.WIFSIGNALED(status)


def run(to: Any, source: Path, destination: Path, *, kill_at: int, restart: bool) -> bool:
    """Convert in a child; tell whether it was killed."""

    def work() -> None:
        arm(kill_at)
        k2quant.convert(source, destination, to=to, workers=1, restart=restart)

    try:
        return in_a_child(work)
    except AssertionError:
        sys.exit(f"the run to be killed at {kill_at} failed")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the report."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != REPORT
    }


def fault(found: dict[str, bytes], references: list[dict[str, bytes]]) -> str | None:
    """Say in what a folder that a kill left behind looks finished but is not."""
    model = {name: data for name, data in found.items() if not name.startswith((".k2quant", INCOMPLETE))}
    if model in references or not model:
        return None
    if INCOMPLETE not in found:
        return f"does not say that it is incomplete: {sorted(found)}"
    for name in {CONFIG, INDEX} & found.keys():
        shards = {file: data for file, data in model.items() if file.endswith(".safetensors")}
        if not any(found[name] == whole[name] and shards.items() <= whole.items() for whole in references):
            return f"has a {name} although it is not whole"
    for name, data in model.items():
        if not name.endswith(".partial") and data not in [whole.get(name) for whole in references]:
            return f"has a broken {name}"
    return None


def main(to: Any, source: Path, destination: Path, reference: Path, old: Path | None) -> None:
    """Kill at every operation, one after another, until a run comes through."""
    k2quant.convert(source, destination, to=to, workers=1, restart=True)  # loads the codecs, for all children
    whole = contents(reference)
    references = [whole, *([contents(old)] if old else [])]
    for number in itertools.count(1):
        shutil.rmtree(destination, ignore_errors=True)
        if old:
            shutil.copytree(old, destination)
        killed = run(to, source, destination, kill_at=number, restart=old is not None)
        if killed:
            if why := fault(contents(destination), references):
                sys.exit(f"killed at {number}, the folder {why}")
            run(to, source, destination, kill_at=0, restart=old is not None)
        if contents(destination) != whole or not (destination / REPORT).exists():
            sys.exit(f"killed at {number} and resumed, the output differs: {sorted(contents(destination))}")
        if not killed:
            sys.stdout.write(f"{number - 1}\n")
            return


if __name__ == "__main__":
    given, before, undisturbed, *others = map(Path, sys.argv[2:])
    main(sys.argv[1], given, before, undisturbed, others[0] if others else None)
