"""What a stage found, on the disk after every step, so that a stop at any moment keeps all that was done.

A file holds entries. Each has `what` was tried and an `outcome`: `passed`, `missed` (it ran, and is not as it must
be), `failed` (it did not run to its end) or `left out`; then `said`, for people, and whatever numbers there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suites.common import machine

Entry = dict[str, Any]
Work = Callable[[], Entry]

PASSED, MISSED, FAILED, LEFT_OUT = "passed", "missed", "failed", "left out"
OUTCOMES = (PASSED, MISSED, FAILED, LEFT_OUT)


class Record:
    """The file of one stage."""

    def __init__(self, file: Path, *, until: float, resume: bool = False) -> None:
        """Begin anew, or go on where a process ended: what it was at is then a failure.

        Args:
            file: where it is kept; its name is the stage's.
            until: `time.time()` after which nothing new is begun.
            resume: keep what the file has.
        """
        self.file, self.until, self.resumed = file, until, resume
        found = read(file) if resume else None
        self.data: dict[str, Any] = found or {"stage": file.stem, "entries": [], "seconds": 0.0, "done": False}
        self._begun, self._before = time.time(), self.data["seconds"]
        crashed = self.data.pop("running", None)
        if crashed:
            self.add({"what": crashed, "outcome": FAILED, "said": "the process ended while it was at this"})

    @property
    def done(self) -> set[str]:
        """What entries there are of."""
        return {entry["what"] for entry in self.data["entries"]}

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.time() >= self.until

    def attempt(self, what: str, work: Work, *, fatal: Callable[[], str] = lambda: "") -> None:
        """Do one step and keep what comes of it, an error too; what was done before, or has no time left, is not done.

        Args:
            what: names the step.
            work: does it; returns an entry without `what`.
            fatal: asked after an error: why this process can do no more, if so.

        Raises:
            SystemExit: it can do no more.
        """
        if what in self.done:
            return
        if self.over:
            self.add({"what": what, "outcome": LEFT_OUT, "said": "the time was over"})
            return
        self.data["running"] = what
        self.save()
        begun, lost = time.perf_counter(), ""
        try:
            entry = work()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is a result
            entry, lost = {"outcome": FAILED, "said": machine.reason(error)}, fatal()
        del self.data["running"]
        self.add({"what": what, "took_s": round(time.perf_counter() - begun, 3)} | entry)
        if lost:
            raise SystemExit(lost)

    def add(self, entry: Entry) -> None:
        """Keep an entry and say it in a line."""
        self.data["entries"].append(entry)
        self.save()
        said = entry.get("said", "")
        print(f"{self.file.stem}: {entry['what']}: {entry['outcome']}{': ' if said else ''}{said}", flush=True)

    def finish(self) -> None:
        """Note that the stage came to its end."""
        self.save(done=True)

    def save(self, **more: Any) -> None:
        """Write everything, whole."""
        self.data |= more
        self.data["seconds"] = round(self._before + time.time() - self._begun, 1)
        write(self.file, self.data)


def read(file: Path) -> dict[str, Any] | None:
    """Return what a stage's file has; nothing if there is none."""
    return json.loads(file.read_text()) if file.exists() else None


def write(file: Path, data: dict[str, Any]) -> None:
    """Put a file in its place in one move."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(file)
