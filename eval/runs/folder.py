"""The folder of a run: whose it is, what it was asked, and whether it is finished."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.locks import locked_file
from k2quant.checkpoint.files.paths import read_limited, refuse_foreign, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import DestinationForeign, DestinationStale, MalformedFile
from k2quant.eval.runs.identity import digest

MANIFEST = "k2quant_eval.json"
"""The file that says what a finished run is; it is written last."""
REQUEST = "k2quant_eval_request.json"
"""What an unfinished run was asked."""
JOURNAL = "k2quant_eval_journal.jsonl"
"""What an unfinished run was answered."""
LOCK = "k2quant_eval_lock"
"""Held by the process that works in the folder."""
RESULTS = "results.json"
"""lm-eval's own results."""
SCHEMA = 1
"""Of manifest and request."""

_LIMIT = 2**28  # bytes of a manifest or request
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what a write may end with, without a name


@contextmanager
def held(folder: Path, *, soft_lock: bool = False) -> Iterator[None]:
    """Make the folder and keep others out of it while the block runs; leave no empty one behind.

    Args:
        folder: the folder.
        soft_lock: whether a file may be the lock where the file system has no others.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise DestinationForeign("not a folder", file=folder, remedy="name another one")
    refuse_foreign(folder, (MANIFEST, REQUEST, LOCK), "not empty, and no run of k2quant", listed=True)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    try:
        with locked_file(lock, soft=soft_lock):
            try:
                yield
            except OSError as error:
                if error.filename is None and error.errno in _FULL:
                    error.filename = str(folder)
                raise
            finally:
                lock.unlink(missing_ok=True)
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether the folder holds this very run, finished; then take away what only an unfinished run needs.

    Raises:
        DestinationStale: it holds another one.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        found = parse_object(read_limited(path, _LIMIT), file=path).get("identity")
    except MalformedFile:
        found = None
    if found != digest(identity):
        raise DestinationStale(
            "the folder holds another finished run", file=folder, remedy="name another folder, or delete this one"
        )
    tidy(folder)  # a kill may have come between the manifest and this
    return True


def tidy(folder: Path) -> None:
    """Take away what only an unfinished run needs."""
    for name in (JOURNAL, REQUEST):
        (folder / name).unlink(missing_ok=True)


def seal(
    folder: Path, identity: Mapping[str, Any], settings: Mapping[str, Any], begun: float, content: Mapping[str, Any]
) -> Path:
    """Write the manifest, as the last of a run's files, and take away what only an unfinished run needs.

    Args:
        folder: of the run.
        identity: all that the answers depend on.
        settings: what was found out on the way.
        begun: when, in seconds of the epoch.
        content: what the run holds: `tasks`, `groups` and more.

    Returns:
        the manifest's path.
    """
    ended = time.time()
    manifest = {
        "schema": SCHEMA,
        "identity": digest(identity),
        **{key: identity[key] for key in ("k2quant", "model", "model_hash", "tokenizer_hash")},
        "settings": {**identity["settings"], **settings},
        **content,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended)),
        "seconds": round(ended - begun, 3),
    }
    write_whole(folder / MANIFEST, as_json(manifest))
    tidy(folder)
    return folder / MANIFEST


def begin(folder: Path, identity: Mapping[str, Any]) -> float:
    """Note what is being asked, or check that it is the same as before; return when it was begun, in seconds.

    What was noted before anything was answered binds nobody: the model could not be loaded so, or the server not asked.
    """
    path = folder / REQUEST
    if path.exists() and _answered(folder):
        try:
            noted = parse_object(read_limited(path, _LIMIT), file=path)
        except MalformedFile:
            noted = {}
        if noted.get("identity") != digest(identity):
            raise DestinationStale(
                "an unfinished run of other options, another model or other data",
                file=folder,
                found=difference(noted.get("asks"), identity),
                remedy="name another folder, or delete this one",
            )
        begun = noted.get("begun")
        return float(begun) if isinstance(begun, int | float) else time.time()
    begun = time.time()
    write_whole(path, as_json({"schema": SCHEMA, "identity": digest(identity), "begun": begun, "asks": identity}))
    return begun


def _answered(folder: Path) -> bool:
    try:
        return (folder / JOURNAL).stat().st_size > 0
    except FileNotFoundError:
        return False


def difference(before: Any, now: Mapping[str, Any]) -> str | None:
    """Return the names of what differs, or None where nobody knows."""
    if not isinstance(before, Mapping):
        return None
    plain = json.loads(as_json(now))
    changed = [key for key in plain if key not in {"settings", "tasks"} and before.get(key) != plain[key]]
    for part in ("settings", "tasks"):
        old, new = before.get(part), plain.get(part, {})
        old = old if isinstance(old, Mapping) else {}
        changed += [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return f"other {', '.join(changed[:5])}" if changed else None


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return a JSON file's bytes."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str).encode() + b"\n"
