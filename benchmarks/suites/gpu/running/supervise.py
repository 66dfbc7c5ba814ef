"""Give every stage a process of its own and its time; whatever becomes of it, the next stage has its turn.

A stage's process watches a pipe: when whoever started it is gone, it ends, and so does all that it started. A process
that crashes is started again and goes on behind what ended it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from suites.gpu.running import record
from suites.gpu.running.stages import Stage, limit

STARTS = 4
"""Processes that a stage gets at most."""

LEAST_SECONDS = 2.0
"""With less, no process is started."""

SOFT = 0.9
"""Of its limit: then a stage begins nothing new; at the limit it is killed."""

NO_TIME = "it had no time"

Command = Callable[[Stage, float, bool], list[str]]
"""Returns the command for a stage, given the `time.time()` after which it begins nothing new, and whether to resume."""


def run(stages: Sequence[Stage], out: Path, command: Command, *, seconds: float, after: Callable[[], None]) -> None:
    """Run stages one after the other.

    Args:
        stages: which, in order.
        out: folder of the results.
        command: what starts a stage.
        seconds: for all of them.
        after: called after each stage.
    """
    end = time.time() + seconds
    for place, stage in enumerate(stages):
        allowed = limit(stage, max(end - time.time(), 0.0), stages[place + 1 :])
        print(f"--- {stage.name}: {stage.asks}; up to {allowed:.0f} s", flush=True)
        _stage(stage, out / f"{stage.name}.json", command, allowed)
        after()


def _stage(stage: Stage, file: Path, command: Command, allowed: float) -> None:
    """Run one stage, in as many processes as it needs, and note how it ended if not by itself."""
    begun = time.time()
    previous = file.with_suffix(".previous")
    if file.exists():
        file.replace(previous)  # what an earlier run left stays until this one has something
    try:
        _processes(stage, file, command, allowed, begun)
    finally:
        if file.exists():
            previous.unlink(missing_ok=True)
        elif previous.exists():
            previous.replace(file)


def _processes(stage: Stage, file: Path, command: Command, allowed: float, begun: float) -> None:
    ended = NO_TIME
    for start in range(STARTS):
        left = begun + allowed - time.time()
        if left < LEAST_SECONDS:
            break
        status = _process(command(stage, begun + SOFT * allowed, start > 0), left)
        if status == 0:
            return
        ended = "stopped: its time was over" if status is None else f"its process ended with {status}"
        if status is None:
            break
    if ended == NO_TIME:
        print(f"{stage.name}: {ended}", flush=True)
        return
    found = record.read(file) or {"stage": stage.name, "entries": [], "seconds": 0.0, "done": False}
    record.write(file, found | {"ended": ended, "allowed_s": round(allowed, 1)})
    print(f"{stage.name}: {ended}", flush=True)


def _process(command: Sequence[str], seconds: float) -> int | None:
    """Run a process to its end, or for so long; return its status, or nothing if it was stopped."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process.pid)


def _stop(session: int) -> None:
    """Kill a process and all that it started."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def end_with_parent() -> None:
    """End this process, and all that it started, when the pipe on its standard input is closed."""
    if os.getpgrp() != os.getpid():
        return  # somebody started it by hand

    def watch() -> None:
        while os.read(0, 1 << 10):
            pass
        _stop(os.getpgrp())

    threading.Thread(target=watch, daemon=True).start()
