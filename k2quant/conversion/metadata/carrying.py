"""What a source says beyond its weights, and what of it the output keeps.

Keys of the quantization block that are still true go along, and so do the scales of activations and of the KV cache
that the output's block speaks of. What stays behind is named in a remark, or refused where k2quant cannot tell what it
means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.metadata import relatives
from k2quant.conversion.metadata.config import (
    believed,
    claimed,
    is_stale,
    keys_of,
    meant_by,
    quantization_blocks,
    quantization_of,
    unclaimed,
)
from k2quant.conversion.placing import Job
from k2quant.errors import UnsupportedFormat
from k2quant.formats.activations import Flow, flow
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.configs.keys import FILE, Recast, empty, shown, uncarried
from k2quant.formats.format import Format, listed
from k2quant.formats.known import FORMATS

_NAMED = 5  # keys in a remark


class _Uses(NamedTuple):
    """Which scales a block takes from the checkpoint."""

    cache: bool
    """Those of the KV cache."""
    flows: frozenset[tuple[str, Flow]]
    """Those of inputs or outputs, beside weights of a format."""


class Carried(NamedTuple):
    """What goes along."""

    block: dict[str, Any] | None
    """The output's quantization block."""
    left: frozenset[str]
    """Tensors that the output does not have: scales for which its config has no use."""
    remarks: tuple[str, ...]
    """What stays behind, a sentence each."""


def carried(
    config: dict[str, Any] | None, jobs: Iterable[Job], fresh: dict[str, Any] | None, *, substituted: bool
) -> Carried:
    """Say what of a source goes along with its weights.

    Args:
        config: the source's config, which was checked.
        jobs: every job of the conversion.
        fresh: the block that the output's tensors ask for.
        substituted: whether other values take the place of the source's.

    Raises:
        UnsupportedFormat: the source's block has a key of which k2quant knows nothing, and codes are converted.
    """
    jobs = list(jobs)
    weights = [job.weight for job in jobs]
    source = believed(config, weights)
    scales = [job.weight for job in jobs if _flow(job.weight) is not None]
    recast = Recast(
        copied=fresh is not None and not substituted and not any(map(_requantised, jobs)),
        scaled=not _unscaled(((j.weight.base, j.written) for j in jobs if j.written and j.written.quantised), scales),
    )
    if source is not None and not recast.copied:
        _check_decodable(source)
    block = _block(source, fresh, recast)
    kept = any(job.target and job.weight.format and job.weight.format.relabels(job.target) for job in jobs)
    uses, written = _uses(block, source), {job.weight.base: job.written.name for job in jobs if job.written}
    left = [] if recast.copied else [scale for scale in scales if not _is_used(scale, written, uses)]
    alone = [_only(scale) for scale in left]
    remarks = dict.fromkeys(
        [
            *_overruled(config, weights),
            *(text for each in quantization_blocks(config or {}) for text in _left_behind(each, block, kept=kept)),
            *_newly_quantised(source, block),
            *_left_out([*alone, *_dropped(jobs)]),
        ]
    )
    return Carried(block, frozenset(scale.main.name for scale in left), tuple(remarks))


def check_decodable(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> None:
    """Refuse a block with a key of which k2quant knows nothing, unless there are no codes.

    Raises:
        UnsupportedFormat: it has one.
    """
    _check_decodable(believed(config, weights) or {})


def _check_decodable(block: Mapping[str, Any]) -> None:
    """Refuse a block with a key of which k2quant knows nothing: it may say what the codes mean."""
    for key in _unknown(block):
        raise UnsupportedFormat(
            f"quantization_config: {relatives.shown(key)}",
            file=FILE,
            expected="a key that k2quant knows, for this one may say what the codes mean",
            found=shown(block[key]),
            remedy="if it does not, take it out of the source's config.json; a copy in the same format keeps it",
        )


def remarks(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> Iterator[str]:
    """Say what of a checkpoint is no weight and yet changes what engines compute, a sentence each.

    Only for a config that was checked.
    """
    weights = list(weights)
    block = believed(config, weights)
    yield from _overruled(config, weights)
    scales = [weight for weight in weights if _flow(weight) is not None]
    if every := [*map(_only, scales), *(scale for weight in weights for scale in _beside(weight))]:
        yield f"{_counted(every)}: scales of activations or of the KV cache, which engines use and k2quant does not"
    if block is None:
        return
    if claims := sorted(_facts(block)):
        yield f"config.json asks engines for {listed(claims)}; k2quant runs models without, in their own dtype"
    static = {name for name, found in _uses(block).flows if found == "input"}
    held = ((w.base, w.format) for w in weights if w.format is not None and w.format.name in static)
    missing = _unscaled(held, scales)
    if missing:
        such = relatives.shown(missing[0])
        yield f"activations are static, but {len(missing):,} weights have no input_scale, such as {such}"
    if unknown := _unknown(block):
        more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
        few = listed(map(relatives.shown, unknown[:_NAMED]))
        yield f"config.json: quantization_config has {few}{more}, of which k2quant knows nothing"


def unscaled(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> list[str]:
    """Return the weights that have no scale of their inputs, though the config has inputs quantised by one.

    Engines read whatever stands in memory in its place. Only of formats that have it beside each weight.

    Args:
        config: of an output, which was checked.
        weights: all that there are.
    """
    block = quantization_of(config)
    said = {name for name, found in _inputs(block).items() if True in found and FORMATS[name].takes_inputs}
    if block is not None and block.get("quant_method") != compressed_tensors.METHOD:
        said = {name for name in said if FORMATS[name].static_inputs(block)}
    return [w.main.name for w in weights if w.format and w.format.name in said and not w.format.scales_inputs]


def spoken_of(config: dict[str, Any] | None, source: Mapping[str, Any] | None, suffix: str) -> bool:
    """Tell whether engines take scales of this suffix from an output.

    Args:
        config: the output's config, which was checked.
        source: the quantization block of the source, if it is believed.
        suffix: that of the scales.
    """
    found, uses = flow(suffix), _uses(quantization_of(config), source)
    return uses.cache if found == "cache" else any(each == found for _, each in uses.flows)


def _unknown(block: Mapping[str, Any]) -> list[str]:
    """Return the keys of a block that may say what its codes mean."""
    keys = keys_of(block)
    return [] if keys is None else uncarried(block, keys)


def _overruled(config: dict[str, Any] | None, weights: list[StoredWeight]) -> Iterator[str]:
    """Say in what the tensors are believed, and not the config."""
    blocks = quantization_blocks(config or {})
    if is_stale(config, weights):
        method = blocks[0].get("quant_method")
        yield f"config.json speaks of {method}, but no weight is quantised: the tensors are believed, not the config"
    for name, others in unclaimed(config, weights).items():
        spoken = listed(sorted({each for block in blocks for each in claimed(block)}))
        yield (
            f"config.json speaks of {spoken} alone, but {len(others):,} weights are {name}, such as "
            f"{relatives.shown(others[0])}: the tensors are believed, engines would take the codes for values"
        )


def _flow(weight: StoredWeight) -> Flow | None:
    return flow(next(iter(weight.parts))) if weight.format is None else None


def _requantised(job: Job) -> bool:
    """Tell whether codes are decoded or made; those whose scales are only widened are as they were.

    A config group may name the dtype of the scales, so that a weight with one counts as made; and so does one whose
    inputs the config speaks of.
    """
    stored, target = job.weight.format, job.target
    if stored is not None and target is not None and stored.relabels(target):
        return stored.config_group() is not None or target.config_group() is not None or target.takes_inputs
    return target is not None and any(each is not None and each.quantised for each in (stored, target))


def _unscaled(weights: Iterable[tuple[str, Format]], scales: Iterable[StoredWeight]) -> list[str]:
    """Return the bases of the quantised weights that have no scale of their input."""
    scaled = {scale.base for scale in scales if _flow(scale) == "input"}
    return [base for base, stored in weights if base not in scaled and not stored.scales_inputs]


class _Scale(NamedTuple):
    """A scale that is no weight's, alone or beside one."""

    suffix: str
    name: str


def _only(weight: StoredWeight) -> _Scale:
    """Return the one tensor of what is no weight."""
    ((suffix, entry),) = weight.parts.items()
    return _Scale(suffix, entry.name)


def _beside(weight: StoredWeight) -> Iterator[_Scale]:
    """Yield the scales of activations that go along with a weight."""
    if weight.format is not None:
        yield from (_Scale(suffix, entry.name) for suffix, entry in weight.parts.items() if flow(suffix) is not None)


def _dropped(jobs: Iterable[Job]) -> Iterator[_Scale]:
    """Yield those that go along with a weight as it was, and that it has no more."""
    for job in jobs:
        if job.target is not None and not job.target.scales_inputs:
            yield from _beside(job.weight)


def _same_method(source: Mapping[str, Any], block: Mapping[str, Any]) -> bool:
    return source.get("quant_method") == block.get("quant_method")


def _block(source: dict[str, Any] | None, fresh: dict[str, Any] | None, recast: Recast) -> dict[str, Any] | None:
    """Return the output's block."""
    if source is None:
        return fresh
    if fresh is None:
        return None
    if not _same_method(source, fresh):
        return fresh | _cache(source.get("kv_cache_scheme"), fresh)
    if fresh["quant_method"] == compressed_tensors.METHOD:
        return compressed_tensors.carried(fresh, source, recast, meant_by)
    kind = next(kind for kind in FORMATS.values() if kind.method == fresh["quant_method"])
    return kind.carried(fresh, source, recast)


def _cache(scheme: object, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a block of another method says of the cache of which a source says this."""
    if empty(scheme):
        return {}
    if fresh["quant_method"] == modelopt.METHOD:
        return {"kv_cache_scheme": dict(modelopt.CACHE)} if modelopt.is_fp8_cache(scheme) else {}
    return {"kv_cache_scheme": scheme} if "kv_cache_scheme" in fresh else {}


def _uses(block: Mapping[str, Any] | None, source: Mapping[str, Any] | None = None) -> _Uses:
    """Return which scales engines take from the checkpoint by a block.

    Args:
        block: the block.
        source: that of the source. Scales of the cache stay with its method, for engines look for them by name, whether
            or not there is a scheme.
    """
    if block is None:
        return _Uses(cache=False, flows=frozenset())
    same = source is not None and _same_method(source, block)
    return _Uses(cache=same or not empty(block.get("kv_cache_scheme")), flows=frozenset(_static_flows(block)))


def _static_flows(block: Mapping[str, Any]) -> Iterator[tuple[str, Flow]]:
    if block.get("quant_method") != compressed_tensors.METHOD:
        yield from (
            (kind.name, "input")
            for kind in FORMATS.values()
            if kind.method == block.get("quant_method") and kind.static_inputs(block)
        )
        return
    flows: dict[str, Flow] = {"input_activations": "input", "output_activations": "output"}
    for group in block["config_groups"].values():
        name = meant_by(group, block).name
        yield from ((name, each) for key, each in flows.items() if compressed_tensors.is_static(group.get(key)))


def _is_used(scale: StoredWeight, written: Mapping[str, str], uses: _Uses) -> bool:
    """Tell whether a scale is one that a block takes, by the formats in which weights are written."""
    found = _flow(scale)
    return uses.cache if found == "cache" else (written.get(scale.base), found) in uses.flows


def _facts(block: Mapping[str, Any] | None) -> list[str]:
    """Return what a block says of activations and of the KV cache, in words."""
    if block is None:
        return []
    facts = [] if empty(block.get("kv_cache_scheme")) else ["kv_cache_scheme"]
    if block.get("quant_method") == compressed_tensors.METHOD:
        return list(
            dict.fromkeys([*facts, *(f for g in block["config_groups"].values() for f in compressed_tensors.flows(g))])
        )
    kinds = [kind for kind in FORMATS.values() if kind.method == block.get("quant_method") and not kind.takes_inputs]
    static = any(kind.static_inputs(block) for kind in kinds)
    return [*facts, "static activations"] if static else facts


def _left_behind(source: Mapping[str, Any], block: Mapping[str, Any] | None, *, kept: bool) -> Iterator[str]:
    """Say which keys of a block of the source are not in the output's; `kept`: codes go along under another method."""
    if lost := [fact for fact in _facts(source) if fact not in _facts(block)]:
        yield f"left out, for the output's config does not say it: {listed(lost)}"
    keys = keys_of(source) or {}
    renamed = kept and source.get("quant_method") != compressed_tensors.METHOD
    if block is not None and (renamed or _same_method(source, block)):
        told = [name for name, key in keys.items() if key.fate in {"codes", "loading"} and not empty(source.get(name))]
        if lost := [name for name in told if name not in block]:
            yield f"left out, for it tells of the codes as they were: {listed(lost)}"


def _newly_quantised(source: Mapping[str, Any] | None, block: Mapping[str, Any] | None) -> Iterator[str]:
    """Say that the output's block has inputs quantised which the source's leaves as they are."""
    after = _inputs(block)
    alone = [name for name, before in _inputs(source).items() if False in before - after.get(name, before)]
    if alone:
        whose = f"the inputs of {listed(alone)} weights"
        yield f"engines will quantise {whose}, which by the source's config stay as they are"


def _inputs(block: Mapping[str, Any] | None) -> dict[str, set[bool]]:
    """Return, for each format of which a block speaks, whether inputs are quantised; both where its groups differ."""
    if block is None:
        return {}
    if block.get("quant_method") != compressed_tensors.METHOD:
        kinds = [kind for kind in FORMATS.values() if kind.method == block.get("quant_method")]
        return {kind.name: {kind.quantises_inputs(block)} for kind in kinds}
    found: dict[str, set[bool]] = {}
    for group in block["config_groups"].values():
        kind = meant_by(group, block)
        found.setdefault(kind.name, set()).add(kind.quantises_inputs(group))
    return found


def _left_out(scales: list[_Scale]) -> Iterator[str]:
    if scales:
        yield f"left out, for the output's config has no use for them: {_counted(scales)}"


def _counted(scales: list[_Scale]) -> str:
    """Return how many scales there are of each name, and one of them."""
    counts = Counter(scale.suffix for scale in scales)
    such = relatives.shown(scales[0].name)
    return f"{listed(f'{count:,} {name}' for name, count in counts.items())}, such as {such}"
