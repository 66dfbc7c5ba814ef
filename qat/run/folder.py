"""The folder of a training run: whose it is, and where its parts lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.locks import locked_file
from k2quant.checkpoint.files.paths import read_limited, refuse_foreign, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, DestinationForeign, DestinationStale, MalformedFile, OutputError, UsageError
from k2quant.formats.known import FORMATS
from k2quant.ground.version import __version__
from k2quant.qat.job import Job, job_from

MANIFEST = "k2quant_qat.json"
"""Says what is trained here; written before anything else."""
DONE = "finished.json"
"""Says that the training is done, and sizes and times of the files that it was made of; `result` reads it."""
FACTS = ("data", "held_out", "model", "teacher")
"""Keys of the manifest: digests of what a training is made of."""
TARGETS = "targets"
"""Key of the manifest: a digest of what is fake-quantised, for what a scope takes is no more than a word."""
STATS = "fallback_stats"
"""Key of the manifest: what tells the statistics from others by which experts fall back; only where there are any."""
_BEGUN = "begun_as"
"""Key of the manifest: the identity that checkpoints were written under, where it would be written otherwise now."""
_LOCK = "k2quant_qat.lock"
_LIMIT = 2**24
_OWN = (
    DONE,
    "checkpoints",
    "tensorboard",
    "teacher.safetensors",
    "teacher.json",
    "history.jsonl",
    "summary.json",
    "report.html",
)


class Run:
    """A run's folder."""

    def __init__(self, folder: Path) -> None:
        """Name it; nothing is touched."""
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.history = folder / "history.jsonl"
        self.teacher = folder / "teacher.safetensors"
        self.board = folder / "tensorboard"

    def check_folder(self) -> None:
        """Refuse a folder that is not there for this.

        Raises:
            DestinationForeign: it holds something that no run of ours wrote, or cannot become a folder.
            OutputError: it, or what it would lie in, cannot be written.
        """
        places = (self.folder, *self.folder.absolute().parents)
        there = next(place for place in places if os.path.lexists(place))
        if not there.is_dir():
            raise DestinationForeign("not a folder", file=there, remedy="name a new folder as `output`")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError("cannot be written", file=there, remedy="name a folder of yours as `output`")
        refuse_foreign(
            self.folder,
            (MANIFEST, _LOCK),
            "not empty, and no training of ours",
            remedy="name a new folder as `output`",
        )

    @contextlib.contextmanager
    def held(self, *, soft_lock: bool = False) -> Iterator[None]:
        """Make the folder if need be and hold its lock.

        Args:
            soft_lock: whether a file may be the lock where the file system has no others.

        Raises:
            DestinationForeign: it holds something that no run of ours wrote.
            DestinationInUse: another process trains here.
        """
        self.check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked_file(self.folder / _LOCK, soft=soft_lock):
            yield

    def _clear(self) -> None:
        """Delete all but the manifest: as long as it stands, no other job goes on from half of what was here."""
        for path in (self.folder / name for name in _OWN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin(self, job: Job, facts: Mapping[str, Any], *, restart: bool = False) -> None:
        """Note what is trained here, or check that it is what was begun.

        Args:
            job: the job; whatever can be checked of it has been.
            facts: digests of model and data.
            restart: throw away what an earlier run left.

        Raises:
            DestinationStale: another job, model or data was begun here.
        """
        manifest = {"k2quant": __version__, "identity": job.identity(), **facts, "job": _plain(job)}
        if restart:
            self._clear()
        elif (self.folder / MANIFEST).exists():
            self.compare(job, facts)
            found = self._manifest()
            if found.get("job") == manifest["job"] and TARGETS in found:
                return  # else the same files at other places, or begun by an earlier version
            begun = found.get(_BEGUN, found.get("identity"))
            if begun != manifest["identity"]:
                manifest[_BEGUN] = begun
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def compare(self, job: Job, facts: Mapping[str, Any]) -> None:
        """Refuse a folder in which another training was begun; one without a training is fine.

        Args:
            job: the job.
            facts: digests of what it needs, or of some of it.

        Raises:
            DestinationStale: another job, model or data was begun here, or other weights were fake-quantised.
        """
        if not (self.folder / MANIFEST).exists():
            return
        wanted, found = {"identity": job.identity(), **facts}, self._manifest()
        if TARGETS not in found:
            wanted.pop(TARGETS, None)
            found = {**found, "identity": self._meant(found.get("identity"), wanted["identity"])}
        changed = [key for key, value in wanted.items() if found.get(key) != value]
        if changed:
            raise DestinationStale(
                f"holds a training of another {_said(changed, found, wanted)}",
                file=self.folder,
                remedy="train anew with `restart=True`, or name another `output`",
            )

    def _meant(self, theirs: object, ours: Mapping[str, Any]) -> object:
        """Return an identity of a version that noted no targets as it would be written now.

        The scope `linear` took every projection then, which is `projections` now.

        Raises:
            DestinationStale: this version would take less.
        """
        quantize = theirs.get("quantize") if isinstance(theirs, dict) else None
        if not isinstance(theirs, dict) or not isinstance(quantize, dict):
            return theirs
        form = FORMATS.get(str(quantize.get("to")))
        if form is None or not form.unfit or quantize.get("scope") != "linear":
            return theirs
        if theirs == ours:
            raise DestinationStale(
                f"was begun by a version whose `scope: linear` took {', '.join(form.unfit)} too",
                file=self.folder,
                remedy="say `scope: projections` in its job and train on, to the end if it is not there; "
                "or train anew with `restart=True`",
            )
        return {**theirs, "quantize": {**quantize, "scope": "projections"}}

    def digest(self) -> str:
        """Return what tells this training from another: a sha256 of job, data and model.

        Raises:
            CheckpointError: there is none.
        """
        manifest = self._manifest()
        decisive = {key: manifest.get(key) for key in ("identity", *FACTS)}
        decisive |= {STATS: manifest[STATS]} if STATS in manifest else {}
        decisive["identity"] = manifest.get(_BEGUN, decisive["identity"])
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def check_model(self, files: Mapping[str, str]) -> None:
        """Refuse a base that is not the one that was trained.

        Args:
            files: what `contents` says of it.

        Raises:
            DestinationStale: it holds other bytes.
        """
        known = self._manifest().get("model")
        if known != files:
            before = known if isinstance(known, dict) else {}
            other = sorted(name for name in files.keys() | before.keys() if files.get(name) != before.get(name))
            raise DestinationStale(
                f"was trained from another checkpoint than now lies at `model`: {', '.join(other[:3])} differ",
                file=self.folder,
                remedy="put the checkpoint back as it was, or name a copy of it with `model=`",
            )

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                "no training of k2quant's",
                file=self.folder,
                expected=MANIFEST,
                remedy="name the `output` folder of a job that was trained",
            )
        return parse_object(read_limited(path, _LIMIT), file=path)

    def job(self) -> Job:
        """Return the job that was trained here.

        Raises:
            CheckpointError: there is none.
            MalformedFile: the manifest is damaged.
        """
        path = self.folder / MANIFEST
        content = self._manifest().get("job")
        if not isinstance(content, dict):
            raise MalformedFile("lacks the job", file=path)
        for switch in ("follow_links", "trust_remote_code"):  # asked for anew each time
            content.pop(switch, None)
        try:
            return job_from(content)
        except UsageError as error:
            raise MalformedFile(f"holds a damaged job: {error}", file=path) from error


def _plain(job: Job) -> dict[str, Any]:
    """Return a job as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    return found


def _said(changed: list[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name what differs, of the job its keys."""
    theirs = found.get("identity")
    if "identity" not in changed or not isinstance(theirs, dict):
        return " and ".join("choice of weights" if key == TARGETS else key for key in changed)
    return f"job ({', '.join(_keys(wanted['identity'], theirs))})"


def _keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the keys in which two jobs differ, `training.steps` and the like."""
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _keys(mine, other, f"{above}{key}.")
        elif mine != other:
            yield f"{above}{key}"
