"""Where a weight of K2 goes in what an engine reads: by which name, and as which part of a stack of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from k2quant.exports.shapes import BIAS
from k2quant.ground import names

_FREQUENCIES = "rotary_emb.inv_freq"
"""Made from config.json by every engine."""


class Place(NamedTuple):
    """Where a weight goes."""

    tensor: str
    """The tensor's name without its last part, such as `blk.3.ffn_gate_exps`."""
    suffix: str
    """Its last part, such as `weight`; empty: the name has none."""
    layer: int | None
    expert: int | None
    """Which part of a stack it is; None: it is all of the tensor."""
    part: str
    """The weight's name within its layer, such as `mlp.experts.gate_proj`, or outside of the layers."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return f"{self.tensor}.{self.suffix}" if self.suffix else self.tensor


class Names(NamedTuple):
    """What an engine calls things."""

    layer: str
    """What its names of a layer begin with, before the number."""
    outside: Mapping[str, str]
    """Its names of what is in no layer, by K2's."""
    inside: Mapping[str, str]
    """Its names within a layer, by K2's, experts without their numbers."""
    bias: str
    """The last part of the name of the router's correction; empty: it has none."""


def place_of(called: Names, base: str, suffix: str, *, weight: bool) -> Place | None:
    """Return where a weight of the language model goes; None for a name that the engine does not have.

    Args:
        called: the engine's names.
        base: its name without the suffix, as `names.in_language_model` has it.
        suffix: of its main tensor.
        weight: whether it is one; other tensors are known by their whole name.
    """
    full = base if weight else f"{base}.{suffix}"
    last = "weight" if weight else called.bias
    if full in called.outside:
        return Place(called.outside[full], last, None, None, full)
    found = names.place(full)
    if found is None:
        return None
    layer, part = found
    expert = names.expert(full)
    if expert is not None:
        part = f"mlp.experts.{names.projection(full)}"
    inside = called.inside.get(part)
    if inside is None or weight == (part == BIAS) or names.is_of_k3(full):
        return None
    return Place(f"{called.layer}.{layer}.{inside}", last, layer, expert, part)


def is_made_anew(name: str) -> bool:
    """Tell whether a tensor is one that engines make themselves."""
    return name.endswith(_FREQUENCIES)
