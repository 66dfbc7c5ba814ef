"""What a config says of quantization: whether an engine finds it, understands it, and reads from it what is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from k2quant.checking.engines.asking.matching import Mixed, Module, Reading, modules
from k2quant.checking.engines.rule import Outcome, Test, failed, passed, unknown
from k2quant.checking.engines.subject import PLAIN, Subject, packed
from k2quant.conversion.metadata.config import QUANTIZATION_KEYS
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.configs.keys import empty, shown
from k2quant.formats.format import listed
from k2quant.ground.units import counted

TOP, OLDER = QUANTIZATION_KEYS
"""Where a block stands at the top level, and what it was called there before."""

TEXT, OLDER_TEXT = (f"text_config.{key}" for key in QUANTIZATION_KEYS)
"""The same, in `text_config`."""


def homed(homes: Collection[str]) -> Test:
    """Return a test of where the block stands.

    Args:
        homes: where the engine looks, of `TOP`, `OLDER`, `TEXT` and `OLDER_TEXT`.
    """

    def test(found: Subject) -> Outcome:
        there = _homes_of(found)
        if not any(found.quantised):
            if not there:
                return passed("nothing is quantised, and the config does not say so")
            return failed(
                "says that weights are quantised, and none is",
                file="config.json",
                found=listed(there),
                remedy="take the block out of config.json",
            )
        if not set(there) & set(homes):
            return failed(
                "weights are quantised, and nothing that the engine looks at says how",
                file="config.json",
                expected=listed(homes),
                found=listed(there) or "no such key",
                remedy="move the block there" if there else "take the config that belongs to these tensors",
            )
        return passed(f"{listed(there)} is where the engine looks")

    return test


def _homes_of(found: Subject) -> list[str]:
    config, text = found.config, found.config.get("text_config")
    places = [(TOP, config), (OLDER, config)]
    if isinstance(text, dict):
        places += [(TEXT, text), (OLDER_TEXT, text)]
    return [place for place, home in places if not empty(home.get(place.rpartition(".")[2]))]


def method(known: Collection[str], *, algorithms: Collection[str] = (), exact: bool = False) -> Test:
    """Return a test of `quant_method`, and of ModelOpt's `quant_algo`.

    Args:
        known: methods that the engine has.
        algorithms: algorithms of ModelOpt that it has.
        exact: whether upper and lower case make a difference in them.
    """

    def test(found: Subject) -> Outcome:
        block = found.block
        if block is None:
            return passed("nothing is quantised")
        said = block.get("quant_method")
        if said not in known:
            return _unlike("quant_method", known, said)
        algorithm = block.get("quant_algo")
        if said == modelopt.METHOD:
            words = str(algorithm) if exact else str(algorithm).upper()
            if words not in algorithms:
                return _unlike("quant_algo", algorithms, algorithm)
            return passed(f"{said} {algorithm}")
        return passed(str(said))

    return test


def _unlike(key: str, known: Collection[str], said: object) -> Outcome:
    return failed(
        f"quantization_config: {key}",
        file="config.json",
        expected=listed(sorted(known)),
        found=shown(said),
        remedy="k2quant convert writes another layout: --layout, or another format",
    )


def blocked(found: Subject) -> Outcome:
    """Look whether a block of quant_method fp8 has what loaders read of it: two numbers, and dynamic activations."""
    block = found.block
    if block is None or block.get("quant_method") in (None, compressed_tensors.METHOD, modelopt.METHOD):
        return passed("no block of quant_method fp8")
    size, scheme = block.get("weight_block_size"), block.get("activation_scheme")
    if not (isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)):
        return failed("weight_block_size", file="config.json", expected="[128, 128]", found=shown(size))
    if scheme != "dynamic":
        return failed(
            "activation_scheme",
            file="config.json",
            expected="dynamic, the only one that goes with blocks",
            found=shown(scheme),
            remedy="k2quant convert --to fp8 writes it so",
        )
    return passed(f"blocks of {size[0]} x {size[1]}, activations as they come")


def cached(found: Subject) -> Outcome:
    """Look whether `kv_cache_scheme` is one that loaders take: FP8, one scale for each layer or head, symmetric."""
    scheme = (found.block or {}).get("kv_cache_scheme")
    if empty(scheme):
        return passed("nothing is said of the KV cache")
    fits = (
        isinstance(scheme, dict)
        and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        and scheme.get("strategy") in ("tensor", "attn_head", None)
        and scheme.get("symmetric") is not False
    )
    if fits:
        return passed("an FP8 cache of keys and values")
    return failed(
        "kv_cache_scheme",
        file="config.json",
        expected="num_bits 8, type float, strategy tensor, symmetric",
        found=shown(scheme),
        remedy="k2quant convert --kv-cache fp8 writes it so",
    )


def ordered(found: Subject) -> Outcome:
    """Look whether columns lie in their order: other orders are no longer taken."""
    for name, group in _groups(found):
        weights = group.get("weights")
        order = weights.get("actorder") if isinstance(weights, dict) else None
        if order in ("group", "dynamic"):
            return failed(
                f"config group {name}: actorder",
                file="config.json",
                expected="static, weight or none",
                found=order,
                remedy="make the checkpoint anew, with columns in their order",
            )
    return passed("columns lie in their order")


def _groups(found: Subject) -> list[tuple[str, Mapping[str, Any]]]:
    groups = (found.block or {}).get("config_groups")
    return [(name, group) for name, group in (groups or {}).items() if isinstance(group, dict)]


def alone(packing: str) -> Test:
    """Return a test that the `format` of a block is the packing itself, where experts are packed so."""

    def test(found: Subject) -> Outcome:
        said = (found.block or {}).get("format")
        for kind in found.quantised:
            if kind.packed == packing and kind.name == "routed experts" and said != packing:
                return failed(
                    "quantization_config: format, beside experts that are packed so",
                    file="config.json",
                    expected=packing,
                    found=shown(said),
                    remedy="k2quant convert --scope experts leaves all else in BF16",
                )
        return passed("experts are packed as `format` says")

    return test


def single(found: Subject) -> Outcome:
    """Look whether there is one config group: several are not taken."""
    groups = _groups(found)
    packings = {compressed_tensors.packing_of(group, found.block or {}) for _, group in groups}
    if len(groups) > 1 and packings != {_NVFP4}:
        return failed(
            "config_groups",
            file="config.json",
            expected="one group",
            found=listed(name for name, _ in groups),
            remedy="convert to one format; k2quant export gguf takes several",
        )
    return passed("one config group at most")


_NVFP4 = "nvfp4-pack-quantized"


def agreeing(fused_inputs: str, readings: Mapping[str, Reading], *, head: Collection[str] = ()) -> Test:
    """Return a test that the engine reads from the config what the tensors are, module by module.

    Args:
        fused_inputs: what the engine calls the module of q_a_proj and kv_a_proj_with_mqa.
        readings: for each quant_method how it reads a block.
        head: methods by which it asks for lm_head, too.
    """

    def test(found: Subject) -> Outcome:
        block = found.block
        if block is None:
            return passed("nothing is quantised")
        said = block.get("quant_method")
        reading = readings.get(str(said))
        if reading is None:
            return unknown(f"how lists of quant_method {said!r} are read is not known here")
        count = 0
        for module in modules(found, fused_inputs, head=said in head):
            count += 1
            if (wrong := _disagreement(module, block, reading)) is not None:
                return wrong
        return passed(f"{counted(count, 'module')}: the config says of each what it is")

    return test


def _disagreement(module: Module, block: Mapping[str, Any], reading: Reading) -> Outcome | None:
    said, stored = reading(module, block), packed(module.weight.format)
    tensor = module.weight.main.name
    label = module.weight.format.label if module.weight.format and stored != PLAIN else "not quantised"
    if isinstance(said, Mixed):
        return failed(said.text, file="config.json", remedy="list all of it, or none")
    if said is None and stored != PLAIN:
        return failed(
            f"the engine takes `{module.name}` for unquantised, for the config lists it so",
            tensor=tensor, found=label, remedy="take it out of the list of modules that are left as they are",
        )  # fmt: skip
    if said is not None and stored == PLAIN:
        return failed(
            f"the engine takes `{module.name}` for quantised, for no entry of the config leaves it out under that name",
            tensor=tensor, found=label, remedy=f"add {module.name!r} to the list of modules that are left as they are",
        )  # fmt: skip
    if said and stored.partition(" ")[0] != said:
        return failed(
            f"the config says of `{module.name}` another packing",
            tensor=tensor, expected=said, found=f"{stored} ({label})",
            remedy="take the config that belongs to these tensors",
        )  # fmt: skip
    return None
