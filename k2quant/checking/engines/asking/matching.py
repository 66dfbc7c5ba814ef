"""How engines find out from a config whether a module of theirs is quantised: each has rules of its own.

An engine asks for its modules, which are not always those of the checkpoint: it holds gate and up in one, q_a and kv_a
in one, and all experts of a layer. Where it looks for such a name in a list that has other names, it takes weights for
quantised that are not, or the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from k2quant.checking.engines.subject import Subject, last
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import MalformedFile
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.configs.keys import is_texts
from k2quant.ground import engines, names, patterns

_MAPPED = ("language_model.layers.", "language_model.model.layers.")
"""An older spelling of K2.5's names, and what vLLM and SGLang make of it, of tensors and of lists alike."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Module(NamedTuple):
    """A module of an engine, with the weights that it holds."""

    name: str
    """As the engine calls it, such as `model.layers.0.mlp.gate_up_proj`."""
    members: tuple[str, ...]
    """Bases of its weights, as the engine spells them; none of experts, whose names engines make up."""
    weight: StoredWeight
    """The first of its weights."""

    @property
    def experts(self) -> bool:
        """Whether it holds the routed experts of a layer."""
        return names.is_routed_expert(self.weight.base)

    @property
    def fused(self) -> bool:
        """Whether it holds several matrices that are no experts."""
        return len(self.members) > 1 and not self.experts


class Mixed(NamedTuple):
    """A module of which the config says two things."""

    text: str


Said = str | Mixed | None
"""What a config says of a module: the packing of its weights, or two, or that it is not quantised."""

Reading = Callable[[Module, Mapping[str, Any]], Said]
"""Tells what a block means for a module, as one engine reads it."""


def modules(found: Subject, fused_inputs: str, *, head: bool = False) -> Iterator[Module]:
    """Yield the modules of an engine that a config may call quantised.

    Args:
        found: the checkpoint.
        fused_inputs: what the engine calls the module of q_a_proj and kv_a_proj_with_mqa.
        head: whether it asks for lm_head, too.
    """
    first: dict[str, tuple[StoredWeight, dict[str, None]]] = {}
    for weight in found.weights:
        if weight.format is None or not (names.is_projection(weight.base) or (head and last(weight.base) == "lm_head")):
            continue
        name = _module_of(weight.base, fused_inputs)
        held = first.setdefault(name, (weight, {}))[1]
        if not names.is_routed_expert(weight.base):
            held[_as_engines_spell(weight.base)] = None
    for name, (weight, members) in first.items():
        yield Module(name, tuple(members), weight)


def _module_of(base: str, fused_inputs: str) -> str:
    whole = engines.fused(base)
    spelled = _as_engines_spell(base)
    if whole is None:
        return spelled
    own = whole.name.rpartition(".")[2]
    if own == "experts":
        return spelled[: spelled.index(".experts.") + len(".experts")]
    stem = spelled.rpartition(".")[0]
    return f"{stem}.{fused_inputs if last(base) in {'q_a_proj', 'kv_a_proj_with_mqa'} else own}"


def _as_engines_spell(name: str) -> str:
    old, new = _MAPPED
    return new + name.removeprefix(old) if name.startswith(old) else name


def entries(block: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the list of names under the first of some keys that has one.

    Raises:
        MalformedFile: it is no list of names, or has an expression that might take for ever.
    """
    listed: object = next((block[key] for key in keys if block.get(key)), [])
    if not isinstance(listed, list) or not is_texts(listed):
        raise MalformedFile(f"{keys[0]} is no list of names", file="config.json")
    for entry in listed:
        if entry.startswith("re:") and not _readable(entry[3:]):
            raise MalformedFile(f"{keys[0]} has an expression that is not tried", file="config.json", found=entry[:200])
    return [_as_engines_spell(entry) for entry in listed]


def _readable(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return not patterns.may_take_for_ever(pattern)


def _equal(name: str, entry: str) -> bool:
    """Tell whether an entry of compressed-tensors means a name: by its beginning where it is an expression."""
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def _any(name: str, listed: Iterable[str], match: Callable[[str, str], bool]) -> bool:
    return any(match(name, entry) for entry in listed)


def _all_or_none(module: Module, flags: Sequence[bool]) -> bool | Mixed:
    if len(set(flags)) > 1:
        inside = [name for name, flag in zip(module.members, flags, strict=True) if flag]
        return Mixed(f"its list has `{inside[0]}` and not the rest of `{module.name}`")
    return all(flags)


# --- compressed-tensors ---


def vllm_groups(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of compressed-tensors as vLLM does: the module's own name first, then those of all that it holds."""
    ignore = entries(block, "ignore")
    if module.experts:
        return _of_experts(module, block, lambda name: _any(name, ignore, _equal))
    left = _any(module.name, ignore, _equal) or _all_or_none(
        module, [_any(name, ignore, _equal) for name in module.members]
    )
    if isinstance(left, Mixed):
        return left
    return None if left else _target(module, block, ("name", "members", "class"))


def sglang_groups(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of compressed-tensors as SGLang does.

    It knows what fused q_a and kv_a hold and not what gate_up_proj does, and stops at a module that is in no list.
    """
    ignore = entries(block, "ignore")
    unsaid = _NO_TARGET if _targets(block) else None
    if module.experts:
        said = _of_experts(module, block, lambda name: _any(name, ignore, _equal_or_end), unsaid=unsaid)
        return Mixed(_NO_TARGET) if said == _NO_TARGET else said
    knows = module.fused and last(module.name) != "gate_up_proj" and module.name not in ignore
    asked = module.members if knows else (module.name,)
    left = _all_or_none(module._replace(members=asked), [_any(name, ignore, _equal_or_end) for name in asked])
    if isinstance(left, Mixed):
        return left
    said = None if left else _target(module, block, ("name", "class", "members")) or unsaid
    return Mixed(_NO_TARGET) if said == _NO_TARGET else said


_NO_TARGET = "a module that is neither left as it is nor a target of a group: SGLang stops there"


def _equal_or_end(name: str, entry: str) -> bool:
    return _equal(name, entry) or (not entry.startswith("re:") and name.endswith(f".{entry}"))


def _of_experts(
    module: Module, block: Mapping[str, Any], ignored: Callable[[str], bool], *, unsaid: str | None = None
) -> Said:
    """Read what is said of the first expert's three matrices; engines ask for no other.

    Args:
        module: the experts.
        block: the block.
        ignored: tells whether a name is left as it is.
        unsaid: what one comes to that is neither ignored nor a target.
    """
    found = _targets(block)
    said = {
        None if ignored(name) else _packing_for(name, found) or unsaid
        for name in (f"{module.name}.0.{projection}" for projection in _PROJECTIONS)
    }
    if len(said) > 1:
        return Mixed(f"it says two things of the matrices of `{module.name}.0`")
    return said.pop()


def _target(module: Module, block: Mapping[str, Any], order: Sequence[str]) -> str | None:
    found = _targets(block)
    ways: dict[str, Callable[[], str | None]] = {
        "name": lambda: next((entry for entry in found if _equal(module.name, entry)), None),
        "members": lambda: _first_of_all(module, found),
        "class": lambda: next((entry for entry in found if entry.lower() in "columnparallellinear"), None),
    }
    target = next(filter(None, (ways[way]() for way in order)), None)
    return None if target is None else found[target]


def _first_of_all(module: Module, found: Mapping[str, str]) -> str | None:
    if not module.fused:
        return None
    matched = [next((entry for entry in found if _equal(name, entry)), None) for name in module.members]
    return matched[0] if all(matched) else None


def _packing_for(name: str, found: Mapping[str, str]) -> str | None:
    target = next((entry for entry in found if _equal(name, entry)), None) or ("Linear" if "Linear" in found else None)
    return None if target is None else found[target]


def _targets(block: Mapping[str, Any]) -> dict[str, str]:
    """Return the packing of each target of the block's groups.

    Raises:
        MalformedFile: a group is no object, or its targets are no list of names.
    """
    groups = block.get("config_groups")
    if not isinstance(groups, dict):
        raise MalformedFile("quantization_config has no config_groups", file="config.json")
    found: dict[str, str] = {}
    for group in groups.values():
        if not isinstance(group, dict):
            raise MalformedFile("a config group is not an object", file="config.json")
        packing = compressed_tensors.packing_of(group, block)
        found |= dict.fromkeys(entries(group, "targets"), packing)
    return found


# --- block FP8, as DeepSeek has it ---


def vllm_blocks(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of quant_method fp8 as vLLM does: whole names alone count, of experts a part of an entry."""
    ignored = entries(block, "ignored_layers", "modules_to_not_convert")
    if module.fused:
        left = module.name in ignored or _all_or_none(module, [name in ignored for name in module.members])
    elif "experts" in module.name:
        left = any(module.name in entry for entry in ignored if "experts" in entry)
    else:
        left = module.name in ignored
    return left if isinstance(left, Mixed) else None if left else ""


def sglang_blocks(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of quant_method fp8 as SGLang does: entries are paths of modules, from any dot to any dot."""
    ignored = [
        each
        for entry in entries(block, "ignored_layers", "modules_to_not_convert")
        for bare in (entry.removeprefix("model."),)
        for each in (bare, f"model.{bare}")
    ]
    if module.fused:
        left = _all_or_none(module, [_any(name, ignored, _within) for name in module.members])
    else:
        left = _any(module.name, ignored, _within)
        left = left or (
            "experts" in module.name and any(module.name in entry for entry in ignored if "experts" in entry)
        )
    return left if isinstance(left, Mixed) else None if left else ""


def _within(name: str, entry: str) -> bool:
    return f".{entry.rstrip('.')}." in f".{name}."


# --- ModelOpt ---


def vllm_algorithm(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of ModelOpt as vLLM does: whole names, then parts of names, then patterns with `*`."""
    excluded = _expanded(entries(block, "ignore", "exclude_modules"))
    exact = vllm_blocks(module, {"ignored_layers": excluded})
    if exact != "":
        return exact
    bare = module.name.removeprefix("language_model.")
    parts = any(entry != module.name and (entry in module.name or entry in bare) for entry in excluded)
    return None if parts or _any(module.name, excluded, fnmatchcase) else ""


def _expanded(excluded: Iterable[str]) -> list[str]:
    """Return a list with `module*` taken for the module and all that is below it, as vLLM's mapper has it."""
    return [
        each
        for entry in excluded
        for each in (
            (entry[:-1], f"{entry[:-1]}.*") if len(entry) > 1 and entry[-1] == "*" and entry[-2] != "." else (entry,)
        )
    ]


_PARTS_OF_FUSED = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})


def sglang_algorithm(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of ModelOpt as SGLang does: patterns with `*` for a name or one part of it."""
    excluded = entries(block, "ignore", "modules_to_not_convert", "exclude_modules")
    excluded += [entry.removeprefix("language_model.") for entry in excluded]
    if not module.experts:
        exact = sglang_blocks(module, {"ignored_layers": excluded})
        if exact != "":
            return exact
    spelled = (module.name, module.name.removeprefix("language_model."))
    for entry in excluded:
        tail = last(entry)
        if tail in _PARTS_OF_FUSED and tail in last(module.name):
            return None
        if any(fnmatchcase(name, entry) or _any(entry, name.split("."), _matches) for name in spelled):
            return None
    return ""


def _matches(entry: str, part: str) -> bool:
    return fnmatchcase(part, entry)


def tensorrt_algorithm(module: Module, block: Mapping[str, Any]) -> Said:
    """Read a block of ModelOpt as TensorRT-LLM does: patterns with `*` for whole names without `language_model.`."""
    excluded = [_language(entry) for entry in entries(block, "ignore", "exclude_modules")]
    return None if _any(_language(module.name), excluded, fnmatchcase) else ""


def _language(name: str) -> str:
    rest = name.removeprefix("language_model.")
    return f"model.{rest}" if rest != name and rest.startswith("layers.") else rest
