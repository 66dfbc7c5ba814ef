"""Checkpoints of K2's relatives: which are taken, and what is worth saying of them.

A conversion works on names. So a `model_type` that nobody has tried is taken where its layers have K2's names, with a
remark, and refused where they have not: half of such a model would be quantised and the rest left as it was. Running a
model needs more than names; see `k2quant.model.architecture`. K3's names are known, its architecture is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import UnsupportedFormat, printable
from k2quant.formats.format import listed
from k2quant.ground import engines, names

MODEL_TYPES = ("kimi_k2", "kimi_k25", "deepseek_v3")
"""The values of `model_type` whose tensor names, and whose architecture, k2quant knows."""

K3_TYPES = ("kimi_k3", "kimi_linear")
"""Those of K3 and of its language model, whose tensor names k2quant knows, and whose architecture it does not run.

See moonshotai/Kimi-K3: config.json, and `text_config` in it.
"""

_NAME_SHOWN = 200  # characters; K2's longest has 63

_OF_EACH_LAYER = frozenset({"self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"})
"""What a decoder layer of a relative must have: MLA, by K2's names."""


def shown(name: object) -> str:
    """Return what a file says, for a remark: of bearable length, and nothing that a terminal would obey."""
    return printable(str(name)[:_NAME_SHOWN])


def other_types(config: dict[str, Any]) -> list[object]:
    """Return the values of `model_type` in a config, `text_config` included, that are not among `MODEL_TYPES`."""
    text = config.get("text_config")
    found = [home.get("model_type") for home in (config, text if isinstance(text, dict) else {})]
    return [kind for kind in found if kind is not None and kind not in MODEL_TYPES]


def _untried(config: dict[str, Any]) -> list[object]:
    """Return those of `other_types` whose tensor names nobody has looked at."""
    return [kind for kind in other_types(config) if kind not in K3_TYPES]


def check_model_type(config: dict[str, Any], weights: Iterable[StoredWeight]) -> None:
    """Refuse a config of another model, unless the weights have K2's names.

    Raises:
        UnsupportedFormat: so it is.
    """
    others = _untried(config)
    if others and not (all(isinstance(kind, str) for kind in others) and _has_names_of_k2(weights)):
        raise UnsupportedFormat(
            "not a model of this family",
            file="config.json",
            expected=f"{listed((*MODEL_TYPES, *K3_TYPES))}, or layers with {listed(sorted(_OF_EACH_LAYER))}",
            found=repr(others[0]),
        )


def _has_names_of_k2(weights: Iterable[StoredWeight]) -> bool:
    """Tell whether every decoder layer has MLA, by K2's names."""
    missing: dict[int, set[str]] = {}
    for weight in weights:
        if (place := names.place(weight.base)) is not None:
            missing.setdefault(place[0], set(_OF_EACH_LAYER)).discard(place[1])
    return bool(missing) and not any(missing.values())


def remarks(config: dict[str, Any] | None, weights: list[StoredWeight]) -> list[str]:
    """Return what is worth saying of a checkpoint that can be converted all the same."""
    return [*_of_types(config or {}, weights), *_of_spellings(weights), *_of_matrices(weights)]


def split_remarks(splits: list[engines.Split], whose: str) -> list[str]:
    """Return what is worth saying of fused modules that are stored in several formats.

    Args:
        splits: the modules.
        whose: who has them, such as `the output`.
    """
    more = f"; {len(splits)} such groups" if len(splits) > 1 else ""
    return [f"{whose} splits what engines fuse: {splits[0]}{more}"] if splits else []


def _of_types(config: dict[str, Any], weights: list[StoredWeight]) -> Iterator[str]:
    others = _untried(config)
    for kind in others if others and _has_names_of_k2(weights) else ():
        yield f"model_type '{shown(kind)}' has not been tried; its layers have K2's names, and by these it is read"


def _of_spellings(weights: list[StoredWeight]) -> Iterator[str]:
    first: dict[str, str] = {}
    for weight in weights:
        if (prefix := names.spelling(weight.base)) is not None:
            first.setdefault(prefix, weight.base)
    if len(first) > 1:
        both = " and ".join(f"`{shown(base)}`" for base in first.values())
        yield f"decoder layers are spelled in {len(first)} ways, {both}: all are read alike, engines know one"


def _of_matrices(weights: list[StoredWeight]) -> Iterator[str]:
    found = [
        weight.base
        for weight in weights
        if weight.format is not None and len(weight.shape) > 1 and names.is_unknown_matrix(weight.base)
    ]
    if found:
        yield (
            f"{len(found)} matrices of decoder layers are none that K2 has, such as `{shown(found[0])}`: no scope "
            "takes them, so they stay as they are, or become BF16 where their format is not written"
        )
