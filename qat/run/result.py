"""What a training came to, and how one that is done is told without reading model, data and checkpoint again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.version import __version__
from k2quant.qat.job import Job
from k2quant.qat.run import naming
from k2quant.qat.run.folder import DONE, MANIFEST, Run
from k2quant.qat.run.history import HISTORY, Evaluation, read_end

_LIMIT = 2**24  # bytes of the note
_KEPT = (HISTORY, "summary.json", "report.html", MANIFEST)
_SAID = 2**12  # notes

Stamps = dict[str, Any]
"""Sizes and times of files, by name, by what they are of; null where there are none to look at, or nobody may look."""


class Result(NamedTuple):
    """What a training came to."""

    folder: Path
    steps: int
    resumed: int
    """The step of the checkpoint that it went on from; 0 for none."""
    seconds: float
    """Of this call."""
    evaluation: Evaluation | None
    """The last one; None without held-out rows."""
    starved: int
    """Experts that keep post-training rounding."""
    notes: tuple[str, ...]
    """What the user should know of the data."""
    checked: Literal["bytes", "times"] = "bytes"
    """What was compared with what was trained: every byte of model, data and checkpoint, or their sizes and times."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


def stamps(job: Job) -> Stamps:
    """Return names, sizes and times of the files that a training is made of; to be taken before they are read."""
    teacher = job.distill.teacher if job.distill else None
    found: Stamps = {}
    places = [("model", job.model), ("teacher", teacher), ("data", job.data.path)]
    if job.training.fallback_stats is not None:
        places.append(("fallback_stats", job.training.fallback_stats))
    for what, path in places:
        found[what] = None
        if path is not None and os.path.lexists(path):
            with contextlib.suppress(OSError):  # whoever reads it says what is wrong with it
                place = Path(path)
                found[what] = _of(_inside(place) if place.is_dir() else [place])
    return found


def note_done(run: Run, result: Result, made_of: Stamps) -> None:
    """Note that a training is done, and what its files look like.

    Args:
        run: its folder, with the last checkpoint.
        result: what it came to.
        made_of: from `stamps`, taken before the files were read.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "k2quant": __version__,
        "steps": result.steps,
        "files": {**made_of, "run": _of(_own(run))},
        "starved": result.starved,
        "notes": list(result.notes),
    }
    write_whole(run.folder / DONE, json.dumps(content, indent=1).encode(errors="replace"))


def finished(job: Job) -> Result | None:
    """Return what a job came to that is trained to its end; None where that takes reading, or more training.

    The job itself is compared as ever. Of model, teacher, data, checkpoint and report only names, sizes and times are.

    Raises:
        DestinationStale: another job was trained in its output.
    """
    run = Run(Path(job.output))
    if not (run.folder / DONE).is_file() or not (run.folder / MANIFEST).is_file():
        return None
    run.compare(job, {})
    try:
        found = _noted(run)
        made_of = stamps(job)
        same = found["k2quant"] == __version__ and found["files"] == {**made_of, "run": _of(_own(run))}
        if not same or made_of["model"] is None or found["steps"] != job.training.steps:
            return None
        last = read_end(run.history).evaluations[-1:]
        starved, notes = kinds.whole(found["starved"]), tuple(kinds.text(one) for one in found["notes"][:_SAID])
    except (CheckpointError, OSError, ValueError, TypeError, KeyError):
        return None  # nothing that anybody relies on: a damaged note costs no more than the time that it saves
    steps = job.training.steps
    return Result(run.folder, steps, steps, 0.0, last[0] if last else None, starved, notes, "times")


def _noted(run: Run) -> Mapping[str, Any]:
    found = parse_object(read_limited(run.folder / DONE, _LIMIT), file=run.folder / DONE)
    kinds.values(found["notes"])
    return found


def _own(run: Run) -> Iterator[Path]:
    """Yield what the end of a training leaves in its folder: the last checkpoint, history, summary and page."""
    yield from (run.folder / name for name in _KEPT)
    for last in naming.found(run.checkpoints)[-1:]:
        yield last
        yield from _inside(last)


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder; the tokenizer's are no part of what `contents` reads, but of what data means."""
    yield from sorted(path for path in folder.iterdir() if path.is_file())


def _of(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return size and time of each, links followed; the last part of its path names it, for it may be moved."""
    found = {}
    for path in paths:
        status = path.stat()
        found[path.name] = [status.st_size if path.is_file() else 0, status.st_mtime_ns]
    return found
