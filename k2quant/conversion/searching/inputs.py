"""Scales of layers' inputs: 1.0, or by the largest input that a calibration saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.matching import check_source
from k2quant.conversion.metadata import relatives
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats


def scaled(plan: Plan, stats: Stats | None) -> Plan:
    """Return a plan in which each weight with a scale of its input has that of its own input.

    Gate and up of an expert multiply one input, so they share its scale. An expert that no token of the calibration
    reached takes the largest input of all experts of its layer; what is not measured takes 1.0.

    Args:
        plan: of a conversion, in which all of these scales are 1.0.
        stats: of the source, where `Options.activation_scales` asks for them.

    Raises:
        CheckpointError: the statistics are another model's, or damaged.
    """
    asked = plan.options.activation_scales
    if asked is None:
        return plan
    jobs = [job for job in plan.jobs() if _takes(job)]
    said: dict[str, Any] = {"from": asked, "weights": len(jobs)}
    if stats is None:
        return replace(plan, inputs=said)
    check_source(stats, plan.source, [job.weight for job in plan.jobs()])
    found = {job.name: _largest(job, stats) for job in jobs}
    kinds = Counter(kind for _, kind in found.values())
    said |= {"stats": stats.fingerprint, **{kind: kinds[kind] for kind in (LAYER, NONE) if kinds[kind]}}
    shards = tuple(
        shard._replace(jobs=tuple(_with(job, found[job.name][0]) if job.name in found else job for job in shard.jobs))
        for shard in plan.shards
    )
    missing = [job for job in jobs if found[job.name][1] == NONE]
    return replace(plan, shards=shards, inputs=said, remarks=(*plan.remarks, *_remarks(missing)))


def inputs_of(plan: Plan) -> Mapping[str, Any] | None:
    """Return where the scales of inputs of an output come from, as a report says it.

    None where it has no format in which a weight can have one.
    """
    if plan.inputs is not None:
        return plan.inputs
    written = [job.written for job in plan.jobs() if job.written is not None and job.written.takes_inputs]
    scaled_ = sum(each.scales_inputs for each in written)
    return {"from": "source" if scaled_ else "none", "weights": scaled_} if written else None


OWN, LAYER, NONE = "own", "layer_maximum", "not_measured"
"""Where the largest input of a weight comes from, as reports say it."""


def _takes(job: Job) -> bool:
    return job.target is not None and job.target.scales_inputs


def _largest(job: Job, stats: Stats) -> tuple[float | None, str]:
    """Return the largest input of a weight and where that comes from."""
    base = base_of(job.weight)
    found = None if base is None else stats.largest(base)
    if found is None or not found.value:
        return None, NONE
    return found.value, OWN if found.own else LAYER


def _with(job: Job, largest: float | None) -> Job:
    return job if job.target is None else job._replace(target=job.target.with_inputs(largest))


def _remarks(missing: list[Job]) -> Iterator[str]:
    if missing:
        such = relatives.shown(missing[0].name)
        yield (
            f"not measured by the calibration, so the scale of the input is 1.0: {counted(len(missing), 'weight')}, "
            f"such as {such}"
        )
