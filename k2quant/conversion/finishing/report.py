"""What a conversion says of itself: the content of k2quant_report.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from k2quant.checkpoint.reader import Checkpoint
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.conversion.resume import identity
from k2quant.conversion.searching.inputs import inputs_of
from k2quant.conversion.stream import Record
from k2quant.formats.format import Format
from k2quant.ground import names
from k2quant.ground.units import counted
from k2quant.ground.version import __version__


def report_of(
    plan: Plan, shards: dict[str, Record], *, seconds: float, resumed: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of k2quant_report.json, the other files aside; `more`: what a rounder says of the whole."""
    records = [shards[shard.file] for shard in plan.shards]
    tensors = {name: facts for record in records for name, facts in record["tensors"].items()}
    return {
        "tool": "k2quant",
        "version": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "resumed_shards": resumed,
        "source_name": _name(plan.source),
        **identity(plan),
        **({} if plan.origin is None else {"origin": dict(plan.origin)}),
        **({} if plan.options.budget is None else {"budget": dict(plan.options.budget)}),
        "recipe": plan.options.in_force.as_json(methods=plan.values is None),
        **({} if (inputs := inputs_of(plan)) is None else {"activation_scales": inputs}),
        **more,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "left_out": list(plan.left_out),
        "remarks": list(plan.remarks),
        **_rounded(plan, tensors),
        "files": {
            record["shard"]: {key: record[key] for key in ("size", "sha256") if key in record} for record in records
        },
        "tensors": {
            name: {"class": names.tensor_class(name), "layer": names.layer(name), **facts}
            for name, facts in tensors.items()
        },
    }


def _name(source: Checkpoint) -> str:
    """Return how a report names a source: its folder's name, or its address."""
    return source.folder.resolve().name if source.supply is None else str(source.place)


def fetched(source: Checkpoint, records: Iterable[Record]) -> dict[str, Any]:
    """Return what a report says of how the bytes of a source came that is no local folder.

    Raises:
        CheckpointError: what was read of a shard for another one's output is not what it holds.
    """
    if source.supply is None:
        return {}
    from k2quant.checkpoint.supply.proofs import unproven  # here: few need it

    missing = unproven(records)
    came = [name for name, header in source.shards.items() if header.supply is not None]
    found = source.supply.facts(came, here=len(came) < len(source.shards))
    return {"fetched": found | ({"unproven_blocks": missing} if missing else {})}


def _rounded(plan: Plan, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report says of codes that were to be carried over and were rounded, for somebody allowed that."""
    if not plan.options.allow_rounding:
        return {}
    carried = [job for job in plan.jobs() if job.target and job.weight.format and _carries(job.target, job)]
    changed = [(tensors[job.output_main.name].get("figures") or {}).get("changed", 0) for job in carried]
    found = {"matrices": sum(map(bool, changed)), "weights": sum(changed), "of": len(carried)}
    matrices = counted(found["matrices"], "matrix", "matrices")
    said = f"{matrices} of {found['of']:,}, {counted(found['weights'], 'weight')}"
    remarks = [*plan.remarks, f"rounded, for their codes cannot be carried over as they are: {said}"]
    return {"rounded": found, "remarks": remarks if found["matrices"] else list(plan.remarks)}


def _carries(target: Format, job: Job) -> bool:
    return job.weight.format is not None and job.weight.format.name in target.carried_from
