"""Whose folder is it, and how far has it come: what lets a conversion start, go on, or be refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.cards import CARD, LIMIT, is_ours, placed
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.remote.address import HUB, Address
from k2quant.checkpoint.writing.opening import room_at, target_at
from k2quant.checkpoint.writing.target import Room, Target
from k2quant.conversion.plan import Plan, options_from
from k2quant.conversion.stream import Record
from k2quant.errors import DestinationStale, OutputError, UsageError
from k2quant.ground.version import __version__

_JOURNAL_VERSION = 1


def refuse_nested(source: Path | Address, destination: Path | Address) -> None:
    """Refuse a destination that is the source, lies in it, or holds it, or that is a hub, which takes whole files only.

    Raises:
        UsageError: it is so, or a path cannot be resolved.
    """
    if isinstance(destination, Address) and destination.scheme == HUB:
        raise UsageError(
            f"{destination} is on a hub, which takes whole models: write to a folder first, then "
            f"`k2quant push` it to {destination}"
        )
    if isinstance(source, Address) or isinstance(destination, Address):
        _refuse_below(source, destination)
        return
    try:
        here, there = source.resolve(), destination.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise UsageError(f"{source} or {destination} cannot be resolved: {error}") from error
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"{source} and {destination} must be two folders, neither inside the other")


def _refuse_below(source: Path | Address, destination: Path | Address) -> None:
    """Refuse one address below another."""
    if not (isinstance(source, Address) and isinstance(destination, Address)) or source.scheme != destination.scheme:
        return
    here, there = (f"{each.path}/" for each in (source, destination))
    if here.startswith(there) or there.startswith(here):
        raise UsageError(f"{source} and {destination} must be two places, neither below the other")


def identity(plan: Plan) -> dict[str, Any]:
    """Return what must be equal for a run to continue another: options, source, and the files beside the weights."""
    return {
        "values": plan.values,
        **({} if plan.method is None else {"method": plan.method}),
        **({} if plan.inputs is None else {"activation_scales": plan.inputs}),
        "options": plan.options.as_json(),
        "source": plan.source.fingerprint() | {"other_files": plan.source.stamps(plan.copies)},
    }


def output_files(plan: Plan) -> list[str]:
    """Return every file of the finished folder; those that make it look finished come first."""
    return [CONFIG, INDEX, REPORT, *plan.companions, *(shard.file for shard in plan.shards), *plan.copies]


def clear(folder: Target) -> None:
    """Delete what an earlier conversion of ours left."""
    journal, report = folder.journal(), folder.finished_report()
    files = journal[0].get("files") if journal else list(_sizes(report)) if report is not None else []
    known = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    victims = [CONFIG, INDEX, REPORT, *known, *placed(known).values(), CARD]
    card = folder.read(CARD, LIMIT)
    folder.clear([name for name in dict.fromkeys(victims) if name != CARD or (card is not None and is_ours(card))])


def _sizes(report: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of the files that a report lists."""
    files = report.get("files")
    return {
        name: facts.get("size") if isinstance(facts, dict) else None
        for name, facts in (files.items() if isinstance(files, dict) else ())
    }


def check_finished(folder: Target, report: dict[str, Any], plan: Plan) -> None:
    """Refuse a finished folder that is not what this call would make, or is not whole any more.

    Raises:
        DestinationStale: so it is.
    """
    wanted = identity(plan)
    changed = _changed(report, wanted)
    if changed:
        raise _stale(folder, "finished", changed)
    last = {name: len(data) for name, data in plan.last.items()}
    sizes = _sizes(report)
    sizes.pop(CARD, None)  # whoever edits it, or throws it away, has done no harm
    for name, size in (sizes | last | sizes).items():
        _check_size(folder, name, size, "was finished, but is not whole any more")
    for name, size in last.items():  # the options are the same: another release says more, or less, of them
        _check_size(folder, name, size, f"was finished by k2quant {report.get('version')}, which wrote another")


def _check_size(folder: Target, name: str, size: object, message: str) -> None:
    found = folder.size(name)
    if found is None or found != size:
        raise DestinationStale(
            message,
            file=folder.named(name),
            expected=f"{size} bytes",
            found="nothing" if found is None else f"{found} bytes",
            remedy="write it anew with `restart=True`",
        )


def _changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values are not those that this call wants; options are compared by what they come to."""
    return [
        key
        for key, value in wanted.items()
        if found.get(key) != value and not (key == "options" and _in_force(found.get(key)) == _in_force(value))
    ]


def _in_force(options: object) -> object:
    """Return what the options of a journal or report come to; as they are where they are none of this release.

    Options that came later than a report were as their defaults are.
    """
    try:
        found = options_from(options)
    except (UsageError, TypeError, ValueError):
        return options
    return found.in_force, found.activation_scales, found.kv_cache, found.allow_rounding


def _stale(folder: Target, state: str, changed: list[str]) -> DestinationStale:
    what = " and ".join(
        {
            "options": "other options",
            "source": "another source",
            "values": "other values",
            "method": "another method, other statistics or other data",
            "activation_scales": "other activation scales",
        }.get(key, f"another {key}")
        for key in changed
        if key != "method" or "options" not in changed  # which say it
    )
    return DestinationStale(
        f"holds a {state} conversion of {what}",
        file=folder.spot,
        remedy="write it anew with `restart=True`, or name another folder",
    )


def begin(folder: Target, plan: Plan, *, fresh: bool, shared: bool = False) -> dict[str, Record]:
    """Start or continue the journal; return the records of the shards that are finished.

    Args:
        folder: the destination.
        plan: what will be written there.
        fresh: whether the journal is only that of a clearing, which is over.
        shared: whether others may be at work there: what stands in the journal then stays as it is.

    Raises:
        DestinationStale: the journal is of other options, another source or another version.
        OutputError: the disk is too small for what is missing.
    """
    done = {} if fresh else finished_shards(folder, plan)
    _check_room(folder, plan, done)
    if fresh or not shared or not folder.journal():
        folder.begin([{**_head(plan), "files": output_files(plan)}, *done.values()])
    if shared:
        folder.spread()
    if len(done) < len(plan.shards):
        # A run that was stopped at its very end may have left them.
        folder.delete([CONFIG, INDEX, REPORT, *plan.companions])
    return done


def _head(plan: Plan) -> dict[str, Any]:
    return {"journal": _JOURNAL_VERSION, "version": __version__, **identity(plan)}


def finished_shards(folder: Target, plan: Plan) -> dict[str, Record]:
    """Return the journal's records of shards that stand there whole.

    Raises:
        DestinationStale: the journal is of other options, another source or another version, or is damaged.
    """
    journal = folder.journal()
    if not journal:
        return {}
    if "options" not in journal[0]:
        raise DestinationStale(
            "was being emptied by `restart=True`", file=folder.spot, remedy="run that again, or name another folder"
        )
    changed = _changed(journal[0], _head(plan))
    if changed:
        raise _stale(folder, "half-finished", changed)
    planned = {shard.file: (shard.size, {job.output_main.name for job in shard.jobs}) for shard in plan.shards}
    return {record["shard"]: record for record in journal[1:] if _stands(folder, record, planned)}


def to_be_cleared(folder: Target, plan: Plan) -> bool:
    """Tell whether what stands there is not what this call would make or go on with, or is not whole any more."""
    try:
        if (report := folder.finished_report()) is not None:
            check_finished(folder, report, plan)
        else:
            finished_shards(folder, plan)
    except DestinationStale:
        return True
    return False


def standing_shards(plan: Plan, spot: Path | Address, *, restart: bool) -> dict[str, Record]:
    """Return what `begin` would find finished at a place, without touching it.

    Raises:
        OutputError: a conversion to this folder would be refused.
    """
    if isinstance(spot, Path) and not spot.is_dir():
        return {}
    destination = target_at(spot, report=REPORT, incomplete=INCOMPLETE)
    destination.refuse_foreign(restart=restart)
    if restart:
        return {}
    if (report := destination.finished_report()) is not None:
        check_finished(destination, report, plan)
        return {shard.file: {} for shard in plan.shards}
    return finished_shards(destination, plan)


def _stands(folder: Target, record: Record, planned: dict[str, tuple[int, set[str]]]) -> bool:
    """Tell whether a record is that of one of the plan's shards, and the shard stands there whole."""
    name, tensors = record.get("shard"), record.get("tensors")
    if not isinstance(name, str) or name not in planned or not isinstance(tensors, dict):
        return False
    size, names = planned[name]
    if tensors.keys() != names or not all(_sound(facts) for facts in tensors.values()):
        return False
    return folder.size(name, links=False) == record.get("size") == size


def _sound(facts: object) -> bool:
    """Tell whether what a record says of a tensor has the parts that the report needs."""
    more = {"figures", "substituted", "scales", "fold"}
    if not isinstance(facts, dict) or facts.keys() - more != {"from", "to", "shape", "crc32"}:
        return False
    sound = all(isinstance(facts.get(name, {}), dict) for name in ("figures", "scales", "fold"))
    return sound and isinstance(facts["crc32"], dict) and isinstance(facts["shape"], list)


def missing(plan: Plan, done: Mapping[str, object]) -> tuple[dict[str, int], int]:
    """Return the sizes in bytes of the shards that do not stand there yet, by name, and those of all files beside."""
    shards = {shard.file: shard.size for shard in plan.shards if shard.file not in done}
    return shards, plan.bytes_written - sum(shard.size for shard in plan.shards)


def room(plan: Plan, spot: Path | Address, done: Mapping[str, object]) -> Room:
    """Return what a conversion to a place, which need not be there yet, needs on a disk here, and what is free."""
    return room_at(spot, *missing(plan, done))


def _check_room(folder: Target, plan: Plan, done: dict[str, Record]) -> None:
    found = folder.room(*missing(plan, done))
    if found.free < found.needed:
        raise OutputError(
            "the disk is too small",
            file=found.where,
            expected=f"{found.needed} bytes free",
            found=f"{found.free} bytes",
            remedy=found.remedy,
        )
