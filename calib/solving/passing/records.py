"""What a pass notes of a layer that it is through with, so that a later run says the same of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.calib.stats.digests import Digests, shown
from k2quant.calib.stats.manifest import canonical
from k2quant.checkpoint.files.checksum import crc32
from k2quant.checkpoint.files.paths import as_output_error, check_inside, read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile
from k2quant.ground.saying.showing import brief

_LIMIT = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What solving did to a layer."""

    layer: int
    """Its number."""
    solved: int
    """Matrices of it that were solved."""
    relative: float | None
    """|MLP(x) - MLP'(x)|^2 / |MLP(x)|^2 over held-out tokens, shared and routed experts together, under the same input
    and routing; None where none of the layer's matrices was solved, or no token was held out."""
    tokens: int
    """Held-out tokens that it is measured on."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as a report has them."""
        return {"layer": self.layer, "solved": self.solved, "relative": self.relative, "tokens": self.tokens}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def write_record(folder: Path, facts: LayerFacts, digests: Digests) -> None:
    """Note a layer that is through.

    Args:
        folder: of the notes.
        facts: what solving did to it.
        digests: of its matrices in the source that were solved.

    Raises:
        OutputError: the disk is full or fails.
    """
    said = {"facts": facts.as_json(), "digests": digests}
    with as_output_error(folder):
        write_whole(_path(folder, facts.layer), canonical(said | {"crc32": _checked(said)}) + b"\n")


def read_record(folder: Path, layer: int) -> tuple[LayerFacts, Digests]:
    """Read the note of a layer.

    Raises:
        MalformedFile: it is not there, or says what no pass notes.
    """
    path = _path(folder, layer)
    check_inside(folder, path)
    try:
        found = parse_object(read_limited(path, _LIMIT), file=path)
        if found.pop("crc32") != _checked(found):
            raise MalformedFile("not what was noted", file=path, remedy=_REMEDY)
        facts, digests = _facts(found["facts"], layer), _digests(found["digests"])
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror, remedy=_REMEDY) from error
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedFile("says what no pass notes", file=path, remedy=_REMEDY) from error
    return facts, digests


def _checked(said: dict[str, Any]) -> str:
    return shown(crc32(canonical(said)))


_REMEDY = "write the output anew with `restart=True`"


def _facts(found: Any, layer: int) -> LayerFacts:
    facts = LayerFacts(**found)
    counts = (facts.layer, facts.solved, facts.tokens)
    whole = all(type(count) is int and 0 <= count < 2**63 for count in counts) and facts.layer == layer
    if not whole or not (facts.relative is None or (type(facts.relative) in {int, float} and facts.relative >= 0)):
        raise ValueError(found)
    return facts


def _digests(found: Any) -> Digests:
    if not isinstance(found, dict):
        raise TypeError(found)
    for base, parts in found.items():
        if not isinstance(parts, dict) or not all(isinstance(crc, str) for crc in parts.values()):
            raise TypeError(base)
    return found


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.json"
