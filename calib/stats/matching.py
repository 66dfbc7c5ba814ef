"""Whether statistics are those of a checkpoint: told by its config, names and shapes, then by its bytes when read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import CheckpointError, MissingTensor, ShapeMismatch

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats

_OWN = "calibrate this checkpoint, or name the statistics that belong to it"


def check_source(stats: Stats, checkpoint: Checkpoint, weights: Iterable[StoredWeight]) -> None:
    """Refuse statistics of another model before anything is read.

    Args:
        stats: of the model that was calibrated.
        checkpoint: what is to be converted.
        weights: its weights, as `group_tensors` found them. Those that the pass did not read, such as layers that
            predict further tokens (MTP), say nothing for or against.

    Raises:
        CheckpointError: what the configs say of the layers differs, or nothing tells which bytes of a matrix were
            calibrated.
        MissingTensor: a weight that was calibrated is not there, or is stored in other tensors.
        ShapeMismatch: a matrix does not take the input that was measured.
    """
    _check_config(stats, checkpoint)
    known = dict(stats.digests())
    found: dict[str, set[str]] = {}
    for weight in weights:
        if (base := base_of(weight)) is not None:
            found.setdefault(base, set()).update(weight.parts)
            _check_input(stats, weight, base, known=base in known)
    for base, parts in known.items():
        if parts.keys() != found.get(base, set()):
            raise MissingTensor(
                "was calibrated in other tensors" if base in found else "was calibrated, but is not there",
                tensor=base,
                file=checkpoint.folder,
                expected=f"{', '.join(sorted(parts))}, as {stats.folder} has it",
                found=", ".join(sorted(found[base])) if base in found else None,
                remedy=_OWN,
            )


def check_bytes(stats: Stats, weight: StoredWeight, read: Mapping[str, str]) -> None:
    """Refuse a weight whose bytes are not those that were calibrated; what the pass did not read may be any.

    Args:
        stats: of the model that was calibrated.
        weight: of the checkpoint that is to be converted.
        read: crc32 of its tensors, or of some, as `digests.shown` has it, by suffix.

    Raises:
        CheckpointError: one differs.
    """
    base = base_of(weight)
    known = (stats.digest(base) if base is not None else None) or {}
    for suffix, crc in read.items():
        if suffix in known and known[suffix] != crc:
            raise CheckpointError(
                "is not the weight that was calibrated",
                tensor=weight.parts[suffix].name,
                file=weight.parts[suffix].file,
                expected=f"crc32 {known[suffix]}",
                found=crc,
                remedy=_OWN,
            )


def _check_input(stats: Stats, weight: StoredWeight, base: str, *, known: bool) -> None:
    """Refuse a matrix that is measured, if another input was, or if nothing tells with which bytes it was."""
    width = stats.width(base)
    if width is None:
        return
    if not known:
        raise CheckpointError(
            "the statistics do not say which bytes of this weight were calibrated",
            tensor=weight.main.name,
            file=stats.folder,
            remedy=_OWN,
        )
    if weight.shape[-1:] != (width,):
        raise ShapeMismatch(
            "not the input that was measured",
            tensor=weight.main.name,
            file=weight.main.file,
            expected=f"{width} columns, as in {stats.folder}",
            found=list(weight.shape),
            remedy=_OWN,
        )


def _check_config(stats: Stats, checkpoint: Checkpoint) -> None:
    calibrated = stats.manifest.model.config
    own = Model.of(checkpoint.config, file=checkpoint.folder / CONFIG).config
    for key in sorted(calibrated.keys() | own.keys()):
        if calibrated.get(key) != own.get(key):
            raise CheckpointError(
                f"of another model: {key}",
                file=stats.folder,
                expected=f"{own.get(key)!r:.100}, as {checkpoint.folder} has it",
                found=f"{calibrated.get(key)!r:.100}",
                remedy=_OWN,
            )
