"""Whether statistics are those of a checkpoint, as far as headers and config tell; the bytes are compared when read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.layout import inputs, place_of
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
        CheckpointError: what the configs say of the layers differs.
        MissingTensor: a weight that was calibrated is not there, or is stored in other tensors.
        ShapeMismatch: a matrix does not take the input that was measured.
    """
    _check_config(stats, checkpoint)
    known = dict(stats.digests())
    widths = {one.name: one.width for layer in stats.layers for one in inputs(stats.manifest.model, layer)}
    found: dict[str, set[str]] = {}
    for weight in weights:
        if (base := base_of(weight)) is None:
            continue
        found.setdefault(base, set()).update(weight.parts)
        place = place_of(base)
        wanted = widths.get(place.input) if place is not None and base in known else None
        if wanted is not None and weight.shape[-1:] != (wanted,):
            raise ShapeMismatch(
                "not the input that was measured",
                tensor=weight.main.name,
                file=weight.main.file,
                expected=f"{wanted} columns, as in {stats.folder}",
                found=list(weight.shape),
                remedy=_OWN,
            )
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
