"""Whether statistics are of the model that is converted: asked of its options, config, names and shapes, and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.layout import Input, inputs, place_of
from k2quant.calib.stats.model import Model
from k2quant.conversion import relatives
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.conversion.recipes.rules import METHODS
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.format import Method
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats

PLAIN, UNWEIGHTED, WEIGHTED = METHODS

_REMEDY = "calibrate this folder, or convert the one that was calibrated"


def check_method(method: Method, *, stats: bool) -> None:
    """Refuse statistics that nobody would read, and a search that cannot do without.

    Args:
        method: how scales are chosen.
        stats: whether a folder of statistics was named.

    Raises:
        UsageError: so it is.
    """
    if method == WEIGHTED and not stats:
        raise UsageError(
            f"`method=` {method} weighs errors by what a calibration saw, and `stats=` names none: make it with "
            "`k2quant calibrate SOURCE STATS --data FILE`, or take `method=` mse, which needs no data"
        )
    if method == PLAIN and stats:
        raise UsageError(
            f"`stats=` has no meaning with `method=` {method}: rounding to nearest asks no data; take `method=` "
            f"{WEIGHTED}"
        )


def unmeasured(plan: Plan, stats: Stats) -> Iterator[str]:
    """Compare statistics with a source's config, names and shapes, and say which weights they do not know.

    Raises:
        CheckpointError: they are another model's.
    """
    _check_config(plan, stats)
    known = {one.name: one for layer in stats.layers for one in inputs(stats.manifest.model, layer)}
    missing = []
    for job in plan.jobs():
        _check_parts(job, stats)
        if job.target is None or not plan.recipe.searches(job.weight):
            continue
        one = _input_of(job, known)
        if one is None:
            missing.append(job.weight.base)
        elif stats.digest(base_of(job.weight) or "") is None:
            raise CheckpointError(
                "the statistics do not say which bytes of this weight were calibrated",
                tensor=job.weight.main.name,
                file=stats.folder,
                remedy=_REMEDY,
            )
        elif one.width != job.weight.shape[-1]:
            raise CheckpointError(
                "the statistics are another model's",
                tensor=job.weight.main.name,
                file=job.weight.main.file,
                expected=f"{one.width} columns, as they have",
                found=job.weight.shape,
                remedy=_REMEDY,
            )
    if missing:
        such = relatives.shown(missing[0])
        yield (
            f"not measured by the calibration, so searched for the least squared error alone ({UNWEIGHTED}): "
            f"{counted(len(missing), 'weight')}, such as {such}"
        )


def _check_config(plan: Plan, stats: Stats) -> None:
    ours, theirs = Model.of(plan.source.config).config, stats.manifest.model.config
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise CheckpointError(
                f"the statistics are another model's: {key}",
                file=stats.folder,
                expected=f"{ours.get(key)!r:.100}, as config.json of {plan.source.folder.name} has it",
                found=f"{theirs.get(key)!r:.100}",
                remedy=_REMEDY,
            )


def _check_parts(job: Job, stats: Stats) -> None:
    """Refuse a weight that was calibrated in another format: its values may differ."""
    known = stats.digest(base) if (base := base_of(job.weight)) is not None else None
    if known is not None and (new := job.weight.parts.keys() - known.keys()):
        raise CheckpointError(
            "was calibrated in another format",
            tensor=job.weight.parts[min(new)].name,
            file=job.weight.main.file,
            expected=" and ".join(sorted(known)),
            found=" and ".join(sorted(job.weight.parts)),
            remedy=_REMEDY,
        )


def _input_of(job: Job, known: Mapping[str, Input]) -> Input | None:
    base = base_of(job.weight)
    place = place_of(base) if base is not None else None
    one = known.get(place.input) if place is not None else None
    if one is None or place is None or (place.expert or 0) >= (one.experts or 1):
        return None
    return one


def check_bytes(job: Job, read: Mapping[str, str], stats: Stats) -> None:
    """Refuse a weight whose bytes are not those that were calibrated.

    Args:
        job: the weight's.
        read: crc32 of its tensors, or of some, in hexadecimal, by suffix.
        stats: what knows the calibrated ones.

    Raises:
        CheckpointError: one differs.
    """
    base = base_of(job.weight)
    known = (stats.digest(base) if base is not None else None) or {}
    for suffix, crc in read.items():
        if suffix in known and known[suffix] != crc:
            raise CheckpointError(
                "is not the weight that was calibrated",
                tensor=job.weight.parts[suffix].name,
                file=job.weight.parts[suffix].file,
                expected=f"crc32 {known[suffix]}",
                found=crc,
                remedy=_REMEDY,
            )
