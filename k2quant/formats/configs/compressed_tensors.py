"""`quantization_config` as compressed-tensors has it: config groups, each with its targets, and what to ignore."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.formats.configs.keys import (
    FILE,
    ROTATIONS,
    Key,
    Recast,
    carry,
    check_keys,
    empty,
    is_flag,
    is_number,
    is_object,
    is_text,
    is_texts,
    shown,
)
from k2quant.formats.format import listed
from k2quant.ground import names

if TYPE_CHECKING:
    from k2quant.formats.format import Format

METHOD = "compressed-tensors"

MIXED = "mixed-precision"
"""The `format` of a block whose groups have one each."""

KEYS = {
    "quant_method": Key(fate="written", expected=METHOD, fits=lambda value: value == METHOD),
    "config_groups": Key(fate="written", expected="an object", fits=lambda _: True),  # see `schemes`
    "format": Key(fate="written", expected="a packing", fits=lambda _: True),  # likewise
    "ignore": Key(fate="written", expected="a list of names", fits=is_texts),
    "quantization_status": Key(
        fate="written",
        expected="how far quantizing has come",
        fits=lambda value: value in ("initialized", "calibration", "frozen", "compressed"),
    ),
    "kv_cache_scheme": Key(fate="beyond", expected="an object", fits=is_object),
    "global_compression_ratio": Key(fate="codes", expected="a number", fits=is_number),
    "version": Key(fate="codes", expected="the version of a tool", fits=is_text),
    "sparsity_config": Key(
        fate="codes",
        expected="none, or the format dense",
        fits=lambda value: is_object(value) and value.get("format") == "dense",
    ),
    "moe_sparsity_config": Key(fate="meaning", expected="an object", fits=is_object),
    "transform_config": ROTATIONS,
    "dequantize": Key(fate="loading", expected="true or false", fits=is_flag),
    "run_compressed": Key(fate="loading", expected="true or false", fits=is_flag),
    "use_optimized_inference": Key(fate="loading", expected="true or false", fits=is_flag),
}
"""What compressed-tensors' QuantizationConfig and transformers' CompressedTensorsConfig have in the block."""

GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
"""What compressed-tensors' QuantizationScheme has in a config group."""

_FLOWS = ("input_activations", "output_activations")

ARGUMENTS = {
    "num_bits": Key(fate="written", expected="a number", fits=lambda _: True),  # these five: see `Format.claims`,
    "type": Key(fate="written", expected="int or float", fits=lambda _: True),  # and its check against the tensors
    "symmetric": Key(fate="written", expected="true", fits=lambda _: True),
    "group_size": Key(fate="written", expected="a number", fits=lambda _: True),
    "strategy": Key(fate="written", expected="a strategy", fits=lambda _: True),
    "block_structure": Key(fate="written", expected="a block", fits=lambda _: True),
    "dynamic": Key(fate="written", expected="true, false or local", fits=lambda value: value in (True, "local")),
    "actorder": Key(fate="codes", expected="an order", fits=lambda _: True),  # of weights alone, see `_check_weights`
    "scale_dtype": Key(fate="codes", expected="a dtype", fits=is_text),
    "zp_dtype": Key(fate="codes", expected="a dtype", fits=is_text),
    "observer": Key(fate="codes", expected="a name", fits=is_text),
    "observer_kwargs": Key(fate="codes", expected="an object", fits=is_object),
}
"""What compressed-tensors' QuantizationArgs has of weights, of activations and of the KV cache."""

CACHE: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
}
"""`kv_cache_scheme` of an FP8 cache with one scale for each layer, as llm-compressor writes it."""

# The ignore list of Kimi-K2.6, then what tools that take every 2-D weight for a Linear need on top; the last three are
# K3's, whose own list leaves them out.
_K26_IGNORE = (
    r"re:.*self_attn.*",
    r"re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*lm_head.*",
    r"re:vision_tower.*",
    r"re:mm_projector.*",
    r"re:.*mlp\.gate$",
    r"re:.*eh_proj$",
    r"re:.*shared_head\.head$",
    r"re:.*block_sparse_moe\.gate$",
    r"re:.*routed_expert_(down|up)_proj$",
    r"re:.*_res_proj$",
)


def block(groups: list[tuple[Format, list[str]]], kept: list[str]) -> dict[str, Any]:
    """Return a quantization block.

    The largest group is meant by every Linear that is not ignored; the others name their modules, which count for more.

    Args:
        groups: formats that have a config group, each with the bases of its weights.
        kept: the bases of all other matrices.
    """
    largest = max(range(len(groups)), key=lambda number: len(groups[number][1]))
    packings = {stored.packing for stored, _ in groups}
    return {
        "config_groups": {
            f"group_{number}": {
                **({"format": stored.packing} if len(packings) > 1 else {}),
                "input_activations": stored.input_activations(),
                "output_activations": None,
                "targets": ["Linear"] if number == largest else sorted(bases),
                "weights": stored.config_group(),
            }
            for number, (stored, bases) in enumerate(groups)
        },
        "format": packings.pop() if len(packings) == 1 else MIXED,
        "ignore": ignore_list({base for _, bases in groups for base in bases}, kept),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def scheme(
    *, num_bits: int, symmetric: bool, type: str, group_size: int | None = None, block: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return what a config group says of weights in groups of columns, or in blocks; if in neither: a scale a row."""
    return {
        "actorder": None,
        "block_structure": None if block is None else list(block),
        "dynamic": False,
        "group_size": group_size,
        "num_bits": num_bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "block" if block is not None else "channel" if group_size is None else "group",
        "symmetric": symmetric,
        "type": type,
    }


def schemes(block: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, of each config group of a block, how its codes are packed and what it says of the weights.

    Args:
        block: the block.
        known: the packings that are read, each with what it is called in messages.

    Raises:
        UnsupportedFormat: codes that are packed otherwise.
        MalformedFile: there are no groups, or one says nothing.
    """
    groups, packing = block.get("config_groups"), block.get("format", "pack-quantized")
    if packing != MIXED:
        _check_packing(packing, known)
    if not isinstance(groups, dict) or not groups:
        raise MalformedFile("quantization_config has no config_groups", file="config.json")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise MalformedFile("a config group has no weights", file="config.json")
        _check_group(group, weights)
        own = group.get("format")
        _check_packing(own if own is not None or packing == MIXED else packing, known)
        if own is not None and packing not in (own, MIXED):
            raise UnsupportedFormat("the format of a config group", file=FILE, expected=packing, found=shown(own))
        yield packing_of(group, block), weights


def packing_of(group: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """Return how the codes of a group are packed, in a block that was checked."""
    return str(group.get("format") or block.get("format", "pack-quantized"))


def _check_group(group: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Refuse what a config group says and k2quant does not understand. compressed-tensors takes no other keys either.

    Raises:
        UnsupportedFormat: there is such a thing.
    """
    strange = [name for name, value in group.items() if name not in GROUP_KEYS and not empty(value)]
    if strange:
        raise UnsupportedFormat("a config group", file=FILE, expected=listed(sorted(GROUP_KEYS)), found=shown(strange))
    if not is_texts(group.get("targets", [])):
        raise MalformedFile("the targets of a config group are no list of names", file=FILE)
    for name in ("weights", *_FLOWS):
        check_arguments(group.get(name), name)
    if not empty(weights.get("dynamic")):
        raise UnsupportedFormat("weights: dynamic", file=FILE, expected="false", found=shown(weights["dynamic"]))
    order = weights.get("actorder")
    if order is not None and order is not False and order not in ("static", "weight"):
        raise UnsupportedFormat(
            "actorder",
            file=FILE,
            expected="static or weight, which leave the columns in their order, or none",
            found=shown(order),
            remedy="columns in groups of another order are not read",
        )


def check_arguments(scheme: object, name: str) -> None:
    """Refuse what a scheme of weights, activations or the KV cache says and k2quant does not understand.

    Raises:
        MalformedFile: it is no object.
        UnsupportedFormat: it has a key or a value of which k2quant knows nothing.
    """
    if scheme is None:
        return
    if not isinstance(scheme, dict):
        raise MalformedFile(f"{name} is not an object", file=FILE, found=shown(scheme))
    strange = [key for key, value in scheme.items() if key not in ARGUMENTS and not empty(value)]
    if strange:
        raise UnsupportedFormat(name, file=FILE, expected=listed(sorted(ARGUMENTS)), found=shown(strange))
    check_keys(scheme, ARGUMENTS, inside=f"{name}: ")


def carried(
    fresh: dict[str, Any],
    source: Mapping[str, Any],
    recast: Recast,
    means: Callable[[Mapping[str, Any], Mapping[str, Any]], type[Format]],
) -> dict[str, Any]:
    """Return a new block with whatever of the source's is still true of it.

    Args:
        fresh: from `block`.
        source: the source's block.
        recast: what becomes of the weights.
        means: tells what format a group of a block means.
    """
    block = carry(fresh, source, KEYS, recast)
    block["kv_cache_scheme"] = source.get("kv_cache_scheme")
    groups: dict[str, Any] = {}
    for name, group in fresh["config_groups"].items():
        found = [other for other in source["config_groups"].values() if means(other, source) is means(group, fresh)]
        if recast.copied and any(said(other) != said(found[0]) for other in found):
            return block | {"config_groups": source["config_groups"]}  # whose targets tell them apart
        own = means(group, fresh).takes_inputs and not recast.copied
        groups[name] = dict(group) if own else _continued(group, found, recast)  # whose inputs the tensors tell
    return block | {"config_groups": groups}


def _continued(group: Mapping[str, Any], found: list[dict[str, Any]], recast: Recast) -> dict[str, Any]:
    """Return a group with what the source's groups of the same format, if they agree, say beyond the codes.

    Activations that the source does not quantise stay so: nobody who made it has seen what becomes of them.
    """
    if not found or any(said(other) != said(found[0]) for other in found):
        return dict(group)
    flows = {
        name: found[0].get(name)
        for name in _FLOWS
        if recast.copied or not is_static(found[0].get(name)) or (recast.scaled and name == "input_activations")
    }
    return {**group, **flows, "weights": found[0]["weights"] if recast.copied else group["weights"]}


def said(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says besides its targets."""
    return {name: value for name, value in group.items() if name != "targets" and not empty(value)}


def is_static(scheme: object) -> bool:
    """Tell whether a scheme takes scales from the checkpoint."""
    return isinstance(scheme, dict) and bool(scheme) and empty(scheme.get("dynamic"))


def flows(group: Mapping[str, Any]) -> list[str]:
    """Return what a group says of activations, in words.

    FP8 weights by dynamic FP8 inputs go without saying; so do FP4 ones by inputs whose scales' tensors tell of them.
    """
    usual = _is_float8(group["weights"]) and _is_float8(group.get("input_activations"))
    told = isinstance(group.get("input_activations"), dict) and group["input_activations"].get("dynamic") == "local"
    return [
        name
        for name in _FLOWS
        if group.get(name) and not (name == "input_activations" and (told or (usual and not is_static(group[name]))))
    ]


def _is_float8(scheme: object) -> bool:
    """Tell whether a scheme has 8-bit floats; where it does not count the bits, compressed-tensors takes 8."""
    return isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits", 8) == 8


def _check_packing(packing: object, known: Mapping[str, str]) -> None:
    if packing not in list(known):  # whatever a file has there
        raise UnsupportedFormat(
            "compressed-tensors format",
            file="config.json",
            expected=" or ".join(f"{name} ({what})" for name, what in known.items()),
            found=shown(packing),
        )


def ignore_list(quantised: Iterable[str], kept: list[str]) -> list[str]:
    """Return an ignore list that covers every matrix kept and no matrix quantised.

    It is made of K2.6's own patterns, as far as they are right for these names; a matrix that no such pattern covers
    stands by its full name. Patterns match from the beginning of the module's name, as compressed-tensors reads them.
    """
    chosen: list[str] = []
    open_names = [base for base in kept if names.tensor_class(f"{base}.weight") != "embedding"]
    for pattern in _K26_IGNORE:
        regex = re.compile(pattern.removeprefix("re:"))
        rest = [base for base in open_names if not regex.match(base)]
        if len(rest) < len(open_names) and not any(regex.match(base) for base in quantised):
            chosen.append(pattern)
            open_names = rest
    return chosen + open_names
