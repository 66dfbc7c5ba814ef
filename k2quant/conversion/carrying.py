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
from k2quant.conversion.config import is_stale, keys_of, meant_by, quantization_of
from k2quant.conversion.placing import Job
from k2quant.errors import UnsupportedFormat
from k2quant.formats import compressed_tensors
from k2quant.formats.activations import Flow, flow
from k2quant.formats.format import listed
from k2quant.formats.keys import FILE, Recast, empty, shown, uncarried
from k2quant.formats.known import FORMATS


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
    jobs, source = list(jobs), quantization_of(config)
    scales = [job.weight for job in jobs if _flow(job.weight) is not None]
    recast = Recast(
        copied=fresh is not None and not substituted and not any(map(_requantised, jobs)),
        scaled=not _unscaled((job.weight for job in jobs if job.written and job.written.quantised), scales),
    )
    if source is not None and not recast.copied:
        check_decodable({"quantization_config": source})
    stale = is_stale(config, (job.weight for job in jobs))
    block = _block(None if stale else source, fresh, recast)
    used, written = _used(block), {job.weight.base: job.written.name for job in jobs if job.written}
    if block is not None and source is not None and not stale and _same_method(source, block):
        used.add(("", "cache"))  # engines look for them by name, whether or not there is a scheme
    left = [] if recast.copied else [scale for scale in scales if not _is_used(scale, written, used)]
    remarks = [*_stale(config, (job.weight for job in jobs)), *_left_behind(source, block)]
    if not stale:
        remarks += _newly_quantised(source, block)
    remarks += _left_out(left)
    return Carried(block, frozenset(scale.main.name for scale in left), tuple(remarks))


def check_decodable(config: dict[str, Any] | None) -> None:
    """Refuse a block with a key of which k2quant knows nothing: it may say what the codes mean.

    Raises:
        UnsupportedFormat: it has one.
    """
    block = quantization_of(config) or {}
    for key in _unknown(block):
        raise UnsupportedFormat(
            f"quantization_config: {key}",
            file=FILE,
            expected="a key that k2quant knows, for this one may say what the codes mean",
            found=shown(block[key]),
            remedy="if it does not, take it out of the source's config.json; a copy in the same format keeps it",
        )


def remarks(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> Iterator[str]:
    """Say what of a checkpoint is no weight and yet changes what engines compute, a sentence each.

    Only for a config that was checked.
    """
    weights, block = list(weights), quantization_of(config)
    yield from _stale(config, weights)
    scales = [weight for weight in weights if _flow(weight) is not None]
    if scales:
        yield f"{_counted(scales)}: scales of activations or of the KV cache, which engines use and k2quant does not"
    if block is None:
        return
    if claims := sorted(_facts(block)):
        yield f"config.json asks engines for {listed(claims)}; k2quant runs models without, in their own dtype"
    static = {name for name, found in _used(block) if found == "input"}
    missing = _unscaled((w for w in weights if w.format is not None and w.format.name in static), scales)
    if missing:
        yield f"activations are static, but {len(missing):,} weights have no input_scale, such as {missing[0]}"
    if unknown := _unknown(block):
        yield f"config.json: quantization_config has {listed(unknown)}, of which k2quant knows nothing"


def spoken_of(config: dict[str, Any] | None, suffix: str) -> bool:
    """Tell whether a config, which was checked, takes scales of this suffix from the checkpoint."""
    found = flow(suffix)
    return any(each == found for _, each in _used(quantization_of(config)))


def _unknown(block: Mapping[str, Any]) -> list[str]:
    """Return the keys of a block that may say what its codes mean."""
    keys = keys_of(block)
    return [] if keys is None else uncarried(block, keys)


def _stale(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> Iterator[str]:
    if is_stale(config, weights):
        method = (quantization_of(config) or {}).get("quant_method")
        yield f"config.json speaks of {method}, but no weight is quantised: the tensors are believed, not the config"


def _flow(weight: StoredWeight) -> Flow | None:
    return flow(next(iter(weight.parts))) if weight.format is None else None


def _requantised(job: Job) -> bool:
    """Tell whether codes are decoded or made; those whose scales are only widened are as they were.

    A config group may name the dtype of the scales, so that a weight with one counts as made.
    """
    stored, target = job.weight.format, job.target
    if stored is not None and target is not None and stored.relabels(target):
        return stored.config_group() is not None or target.config_group() is not None
    return target is not None and any(each is not None and each.quantised for each in (stored, target))


def _unscaled(weights: Iterable[StoredWeight], scales: Iterable[StoredWeight]) -> list[str]:
    """Return the bases of the quantised weights that have no scale of their input."""
    scaled = {scale.base for scale in scales if _flow(scale) == "input"}
    return [weight.base for weight in weights if weight.base not in scaled]


def _same_method(source: Mapping[str, Any], block: Mapping[str, Any]) -> bool:
    return source.get("quant_method") == block.get("quant_method")


def _block(source: dict[str, Any] | None, fresh: dict[str, Any] | None, recast: Recast) -> dict[str, Any] | None:
    """Return the output's block."""
    if source is None:
        return fresh
    if fresh is None:
        return None
    if not _same_method(source, fresh):
        scheme = source.get("kv_cache_scheme")
        return fresh | {"kv_cache_scheme": scheme} if "kv_cache_scheme" in fresh and not empty(scheme) else fresh
    if fresh["quant_method"] == compressed_tensors.METHOD:
        return compressed_tensors.carried(fresh, source, recast, meant_by)
    kind = next(kind for kind in FORMATS.values() if kind.method == fresh["quant_method"])
    return kind.carried(fresh, source, recast)


def _used(block: Mapping[str, Any] | None) -> set[tuple[str, Flow]]:
    """Return for which formats a block takes which scales from the checkpoint."""
    if block is None:
        return set()
    found: set[tuple[str, Flow]] = set() if empty(block.get("kv_cache_scheme")) else {("", "cache")}
    if block.get("quant_method") != compressed_tensors.METHOD:
        return found | {
            (kind.name, "input")
            for kind in FORMATS.values()
            if kind.method == block.get("quant_method") and kind.static_inputs(block)
        }
    for group in block["config_groups"].values():
        name = meant_by(group, block).name
        flows: dict[str, Flow] = {"input_activations": "input", "output_activations": "output"}
        found |= {(name, each) for key, each in flows.items() if compressed_tensors.is_static(group.get(key))}
    return found


def _is_used(scale: StoredWeight, written: Mapping[str, str], used: set[tuple[str, Flow]]) -> bool:
    """Tell whether a scale is one that a block takes, by the formats in which weights are written."""
    found = _flow(scale)
    return any(each == found and (each == "cache" or written.get(scale.base) == name) for name, each in used)


def _facts(block: Mapping[str, Any] | None) -> list[str]:
    """Return what a block says of activations and of the KV cache, in words."""
    if block is None:
        return []
    facts = [] if empty(block.get("kv_cache_scheme")) else ["kv_cache_scheme"]
    if block.get("quant_method") == compressed_tensors.METHOD:
        return list(
            dict.fromkeys([*facts, *(f for g in block["config_groups"].values() for f in compressed_tensors.flows(g))])
        )
    static = any(kind.static_inputs(block) for kind in FORMATS.values() if kind.method == block.get("quant_method"))
    return [*facts, "static activations"] if static else facts


def _left_behind(source: Mapping[str, Any] | None, block: Mapping[str, Any] | None) -> Iterator[str]:
    """Say which keys of the source's block are not in the output's."""
    if source is None:
        return
    if lost := [fact for fact in _facts(source) if fact not in _facts(block)]:
        yield f"left out, for the output's config does not say it: {listed(lost)}"
    keys = keys_of(source) or {}
    if block is not None and _same_method(source, block):
        told = [name for name, key in keys.items() if key.fate in {"codes", "loading"} and not empty(source.get(name))]
        if lost := [name for name in told if name not in block]:
            yield f"left out, for it tells of the codes as they were: {listed(lost)}"


def _newly_quantised(source: Mapping[str, Any] | None, block: Mapping[str, Any] | None) -> Iterator[str]:
    """Say that the output's block has inputs quantised which the source's leaves as they are."""
    if alone := [name for name, before in _inputs(source).items() if False in before - _inputs(block).get(name, before)]:
        yield f"engines will quantise the inputs of {listed(alone)} weights, which by the source's config stay as they are"


def _inputs(block: Mapping[str, Any] | None) -> dict[str, set[bool]]:
    """Return, for each format of which a block speaks, whether inputs are quantised; both where its groups differ."""
    if block is None:
        return {}
    if block.get("quant_method") != compressed_tensors.METHOD:  # a method of its own says how, not whether
        return {kind.name: {True} for kind in FORMATS.values() if kind.method == block.get("quant_method")}
    found: dict[str, set[bool]] = {}
    for group in block["config_groups"].values():
        found.setdefault(meant_by(group, block).name, set()).add(not empty(group.get("input_activations")))
    return found


def _left_out(scales: list[StoredWeight]) -> Iterator[str]:
    if scales:
        yield f"left out, for the output's config has no use for them: {_counted(scales)}"


def _counted(scales: list[StoredWeight]) -> str:
    """Return how many scales there are of each name, and one of them."""
    counts = Counter(next(iter(scale.parts)) for scale in scales)
    return f"{listed(f'{count:,} {name}' for name, count in counts.items())}, such as {scales[0].main.name}"
