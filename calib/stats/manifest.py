"""What was calibrated, on what, and how: the file that makes a folder of statistics whole.

There are no times and no paths in it, so that a model may be moved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.calib.stats.model import Model
from k2quant.checkpoint.files.json_kinds import mapping, text, truth, values, whole
from k2quant.errors import CheckpointError, MalformedFile

VERSION = 1
"""Of the folder's layout."""

_HEX = re.compile(r"[0-9a-f]{64}")
_DATA = ("train", "validation", "test")

Setting = str | int | float | bool | None
Files = Mapping[str, tuple[int, str]]
"""Size and sha256 of files, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPart:
    """One part of the data."""

    hashes: tuple[str, ...]
    """sha256 of each document's text, in hex; its white space is made even first."""
    tokens: int
    """Tokens of the rows that a pass takes; those of padding are none."""
    rows: int
    """Rows of tokens."""
    digest: str
    """sha256 of token ids and positions, in hex."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.hashes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What makes one calibration another than the next."""

    model: Model
    """What was calibrated, by its config; the bytes of its weights are told by each layer's digests."""
    data: Mapping[str, DataPart]
    """`train`, `validation` and `test`, disjoint by document. The last is kept for a final figure: it is not read."""
    hessians: bool = False
    """Whether E[x x^T] was collected beside E[x] and E[x^2]."""
    settings: Mapping[str, Setting]
    """What else decides the numbers, such as samples and length."""
    version: str
    """The release that measured."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to continue another, as JSON holds it."""
        return {
            "layout": VERSION,
            "model": dict(self.model.config),
            "data": {
                name: {"tokens": part.tokens, "rows": part.rows, "digest": part.digest, "hashes": list(part.hashes)}
                for name, part in self.data.items()
            },
            "hessians": self.hessians,
            "settings": dict(self.settings),
        }

    def as_json(self, files: Files) -> dict[str, Any]:
        """Return what the file holds.

        Args:
            files: size and sha256 of each JSON beside it; none while they are not there yet.
        """
        known = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()}
        return {"tool": "k2quant", "version": self.version, **self.identity, "files": known}

    def fingerprint(self, files: Files) -> str:
        """Return the sha256 over all that was measured: data, settings, model, and through `files` every layer."""
        return hashlib.sha256(canonical({**self.identity, "files": {n: list(f) for n, f in files.items()}})).hexdigest()


def canonical(value: object) -> bytes:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(content: Mapping[str, Any], *, file: object) -> tuple[Manifest, Files]:
    """Check what a manifest says.

    Returns:
        it, and the sizes and digests of the files that it names.

    Raises:
        CheckpointError: it is of another tool or release.
        MalformedFile: it lies, or lacks something.
    """
    if content.get("tool") != "k2quant" or "layout" not in content:
        raise CheckpointError("not what `k2quant calibrate` writes", file=file, remedy="name a folder of statistics")
    if content["layout"] != VERSION:
        raise CheckpointError(
            "a folder of another release",
            file=file,
            expected=f"layout {VERSION}",
            found=f"{content['layout']!r:.50}, of k2quant {content.get('version')!r:.50}",
            remedy="calibrate again, or take that release",
        )
    try:
        return _manifest(content, file), {
            text(name): (whole(mapping(facts)["size"]), _digest(facts["sha256"]))
            for name, facts in mapping(content["files"]).items()
        }
    except KeyError as error:
        raise MalformedFile("lacks a key", file=file, expected=error.args[0], remedy="calibrate again") from error
    except (TypeError, ValueError) as error:
        raise MalformedFile("does not say what it should", file=file, found=str(error), remedy="calibrate again") from (
            error
        )


def _manifest(content: Mapping[str, Any], file: object) -> Manifest:
    data = mapping(content["data"])
    if data.keys() != set(_DATA):
        msg = f"data of {list(data)!r:.100} where {', '.join(_DATA)} stand"
        raise ValueError(msg)
    parts = {name: _part(mapping(data[name])) for name in _DATA}
    _check_disjoint(parts)
    settings = mapping(content["settings"])
    for key, value in settings.items():
        if not isinstance(value, Setting):
            msg = f"{value!r:.100} where the setting {key!r:.50} stands"
            raise TypeError(msg)
    return Manifest(
        model=Model.of(mapping(content["model"]), file=file),
        data=parts,
        hessians=truth(content["hessians"]),
        settings=settings,
        version=text(content["version"]),
    )


def _part(facts: Mapping[str, Any]) -> DataPart:
    return DataPart(
        hashes=tuple(map(_digest, values(facts["hashes"]))),
        tokens=whole(facts["tokens"]),
        rows=whole(facts["rows"]),
        digest=_digest(facts["digest"]),
    )


def _digest(value: object) -> str:
    if not _HEX.fullmatch(text(value)):
        msg = f"{value!r:.100} where a sha256 stands"
        raise ValueError(msg)
    return text(value)


def _check_disjoint(parts: Mapping[str, DataPart]) -> None:
    """Refuse a document that stands twice: what was held out would judge what it decided."""
    seen: dict[str, str] = {}
    for name, part in parts.items():
        for document in part.hashes:
            if document in seen:
                msg = f"document {document[:16]}... in {seen[document]} and in {name}"
                raise ValueError(msg)
            seen[document] = name
