"""`quantization_config` as compressed-tensors has it: config groups, each with its targets, and what to ignore."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.ground import names

if TYPE_CHECKING:
    from k2quant.formats.format import Format

METHOD = "compressed-tensors"

MIXED = "mixed-precision"
"""The `format` of a block whose groups have one each."""

# The ignore list of Kimi-K2.6, then what tools that take every 2-D weight for a Linear need on top.
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
                "input_activations": None,
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


def scheme(*, group_size: int | None, num_bits: int, symmetric: bool, type: str) -> dict[str, Any]:
    """Return what a config group says of weights in groups of columns; a group size of None: a scale a row."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": num_bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if group_size is None else "group",
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
        own = group.get("format") if packing == MIXED else packing
        _check_packing(own, known)
        yield str(own), weights


def _check_packing(packing: object, known: Mapping[str, str]) -> None:
    if packing not in list(known):  # whatever a file has there
        raise UnsupportedFormat(
            "compressed-tensors format",
            file="config.json",
            expected=" or ".join(f"{name} ({what})" for name, what in known.items()),
            found=repr(packing),
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
