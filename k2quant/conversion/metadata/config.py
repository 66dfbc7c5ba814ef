"""`quantization_config`: what a source's config claims, and what the output's config must say.

config.json is edited as JSON: unknown keys and the order of keys are kept. Engines look for the block at the top level,
in `text_config` (K2.5 and later) and under the older name `compression_config`; the output has it in one place only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.metadata import relatives
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.formats.activations import check_scale, flow
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.configs.keys import Key, check_keys, empty, shown
from k2quant.formats.format import Format, Layout, contradiction, listed
from k2quant.formats.known import FORMATS

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where engines look for the quantization block: at the top level, in `text_config`, and under an older name."""

_BY_NAME = frozenset({"ignore", "modules_to_not_convert", "ignored_layers"})
"""Lists of modules. They may differ from home to home, as names do; an output's list is made of its tensors."""


def _homes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a config in which engines look for the block."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def quantization_blocks(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every quantization block of a config.

    Raises:
        MalformedFile: one is not an object.
    """
    blocks = [home[key] for home in _homes(config) for key in QUANTIZATION_KEYS if home.get(key) is not None]
    if any(not isinstance(block, dict) for block in blocks):
        raise MalformedFile("quantization_config is not an object", file="config.json")
    return [modelopt.flattened(block) for block in blocks]


def quantization_of(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a config says of its quantization, in all homes together; None if it says nothing.

    Raises:
        MalformedFile: a block is not an object.
        CheckpointError: two blocks contradict each other: engines read one or the other.
    """
    found: dict[str, Any] = {}
    blocks = quantization_blocks(config or {})
    for block in blocks:
        for key, value in block.items():
            if key in found and key not in _BY_NAME and found[key] != value:
                raise CheckpointError(
                    f"two quantization blocks contradict each other in {relatives.shown(key)}",
                    file="config.json",
                    expected=shown(found[key]),
                    found=shown(value),
                    remedy="take the config that belongs to these files",
                )
        found |= {key: value for key, value in block.items() if key not in found}
    return found if blocks else None


def believed(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> dict[str, Any] | None:
    """Return what a config says of its quantization; None if it says nothing, or no weight is quantised."""
    return None if is_stale(config, weights) else quantization_of(config)


def keys_of(block: Mapping[str, Any]) -> Mapping[str, Key] | None:
    """Return what is known of the keys of a block; None if its format looks at them by itself."""
    method = block.get("quant_method")
    if method == compressed_tensors.METHOD:
        return compressed_tensors.KEYS
    return next((kind.keys for kind in FORMATS.values() if kind.method == method), None)


def check_source(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> None:
    """Refuse a config that belongs to another model, or that contradicts the tensors.

    A block that stands there although no weight is quantised, as scripts leave it that make BF16 of a checkpoint,
    contradicts nothing: see `is_stale`.

    Raises:
        UnsupportedFormat: another model type, or a quantization that k2quant does not read.
        CheckpointError: the config claims a format, block or group size that the tensors do not have.
    """
    weights = list(weights)
    for weight in weights:
        if weight.format is None and flow(suffix := next(iter(weight.parts))) is not None:
            check_scale(suffix, weight.main)
    _check(config, weights, stale=is_stale(config, weights))


def is_stale(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> bool:
    """Tell whether a config has a quantization block although no weight is quantised."""
    return bool(quantization_blocks(config or {})) and not any(w.format and w.format.quantised for w in weights)


def _check(config: dict[str, Any] | None, weights: list[StoredWeight], *, stale: bool) -> None:
    if config is None:
        return
    relatives.check_model_type(config, weights)
    stored: dict[str, list[tuple[Format, tuple[int, ...]]]] = {name: [] for name in FORMATS}
    for weight in weights:
        if weight.format is not None:
            stored[weight.format.name].append((weight.format, weight.shape))
    for block in quantization_blocks(config):
        _check_block(block, None if stale else stored)
    if not stale:
        quantization_of(config)


def _check_block(block: dict[str, Any], stored: dict[str, list[tuple[Format, tuple[int, ...]]]] | None) -> None:
    """Compare a block with the weights that are there, by the name of their format; None: with no weights."""
    method = block.get("quant_method")
    known = {kind.method: kind for kind in FORMATS.values() if kind.method is not None}
    meant = next((kind for name, kind in known.items() if name == method), None)
    if meant is None:
        expected = " or ".join(name for name in known if name)
        raise UnsupportedFormat("quant_method", file="config.json", expected=expected, found=shown(method))
    check_keys(block, keys_of(block) or {})
    if not empty(block.get("kv_cache_scheme")):
        compressed_tensors.check_arguments(block["kv_cache_scheme"], "kv_cache_scheme")
    if method != compressed_tensors.METHOD:
        if stored is not None:
            meant.check_config(block, stored[meant.name])
        return
    packings = {kind.packing: kind.name.upper() for kind in FORMATS.values() if kind.packing}
    claimed = [(_kind_of(packing, scheme), scheme) for packing, scheme in compressed_tensors.schemes(block, packings)]
    if stored is None:
        return
    for kind, scheme in claimed:
        kind.check_config(scheme, stored[kind.name])
    for kind, _ in claimed:
        if not stored[kind.name]:
            raise contradiction(kind.stands_for, "none")


def claimed(block: Mapping[str, Any]) -> set[str]:
    """Return the names of the formats of which a block speaks that was checked."""
    if block.get("quant_method") == compressed_tensors.METHOD:
        return {meant_by(group, block).name for group in block["config_groups"].values()}
    return {kind.name for kind in FORMATS.values() if kind.method == block.get("quant_method")}


def unclaimed(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> dict[str, list[str]]:
    """Return the quantised formats of which a config does not speak, each with the names of its weights.

    Only for a config that was checked. One without a block speaks of nothing, and nothing is returned.
    """
    blocks = quantization_blocks(config or {})
    spoken = {name for block in blocks for name in claimed(block)}
    found: dict[str, list[str]] = {}
    for weight in weights if blocks else ():
        if weight.format is not None and weight.format.quantised and weight.format.name not in spoken:
            found.setdefault(weight.format.name, []).append(weight.main.name)
    return found


def meant_by(group: Mapping[str, Any], block: Mapping[str, Any]) -> type[Format]:
    """Return the format that a config group of compressed-tensors means, in a block that was checked."""
    return _kind_of(compressed_tensors.packing_of(group, block), group["weights"])


def _kind_of(packing: str, scheme: dict[str, Any]) -> type[Format]:
    """Return the format that a config group means."""
    kinds = [kind for kind in FORMATS.values() if kind.packing == packing]
    found = next((kind for kind in kinds if kind.claims(scheme)), None)
    if found is None:
        words = {key: scheme.get(key) for key in ("num_bits", "type", "symmetric")}
        raise UnsupportedFormat(
            "the scheme of the weights",
            file="config.json",
            expected=" or ".join(kind.scheme_words for kind in kinds),
            found=listed(f"{key} {shown(value)}" for key, value in words.items()),
        )
    return found


def check_output(config: dict[str, Any] | None, weights: Iterable[StoredWeight]) -> None:
    """Refuse a config with which an engine would load these weights wrongly, or not at all.

    Raises:
        CheckpointError: it contradicts the tensors, or there is none although weights are quantised.
    """
    weights = list(weights)
    _check(config, weights, stale=False)
    quantised = {weight.format.name for weight in weights if weight.format and weight.format.quantised}
    if quantised and not quantization_blocks(config or {}):
        raise CheckpointError(
            "no quantization_config", file="config.json", expected=f"one for {listed(sorted(quantised))} weights"
        )
    for name, others in unclaimed(config, weights).items():
        raise contradiction(
            f"weights of {listed(sorted(quantised - {name}))}", f"{len(others):,} of {name}, such as {others[0]}"
        )


def edited(config: dict[str, Any], block: dict[str, Any] | None, *, rounded_to_bf16: bool) -> dict[str, Any]:
    """Return a copy of a config with `block` as its only quantization block, or with none.

    Args:
        config: the source's config.
        block: the new block. It stands in `text_config` where there is one, as K2.5 has it, else at the top level.
        rounded_to_bf16: whether float weights of another dtype became BF16, so that the dtype must say so.
    """
    copy: dict[str, Any] = json.loads(json.dumps(config))
    homes = list(_homes(copy))
    for home in homes:
        if home is homes[-1] and block is not None:
            home["quantization_config"] = block  # an existing key keeps its place
        else:
            home.pop("quantization_config", None)
        home.pop("compression_config", None)
        for key in ("torch_dtype", "dtype"):
            if rounded_to_bf16 and key in home:
                home[key] = "bfloat16"
    return copy


def quantization_block(quantised: Mapping[Format, list[str]], kept: list[str]) -> dict[str, Any] | None:
    """Return the quantization block of an output, or None where nothing is quantised.

    Args:
        quantised: for each format, the bases of the weights stored in it.
        kept: the bases of all other matrices.

    Raises:
        UnsupportedFormat: several formats, and no config can describe one of them beside the others.
    """
    if len(quantised) == 1:
        ((only, bases),) = quantised.items()
        return only.config(bases, kept)
    alone = next((each for each in quantised if each.config_group() is None), None)
    if alone is not None:
        raise UnsupportedFormat(
            "no config describes this format beside others",
            file="config.json",
            expected=f"{alone.label} alone",
            found=listed(each.label for each in quantised),
            remedy=f"write it in another layout: {listed(beside)}" if (beside := _beside(alone)) else None,
        )
    return compressed_tensors.block(list(quantised.items()), kept) if quantised else None


def _beside(alone: Format) -> list[str]:
    """Return the layouts of a format in which a config can describe it beside others."""
    named = ((name, type(alone).asked_for(layout=cast("Layout", name))) for name in alone.layouts)
    return [name for name, each in named if each.config_group() is not None]
