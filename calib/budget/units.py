"""What is chosen together: weights that engines hold in one module, in one format, and what they take in each.

Engines ask for the format of a fused module once. So all routed experts of a layer are one unit, q_a with kv_a are one,
gate with up are one; every other matrix is a unit by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.placing import output_specs
from k2quant.conversion.recipes.recipe import Recipe
from k2quant.errors import UsageError
from k2quant.formats.format import Format, Layout
from k2quant.formats.known import FORMATS, LADDER, FormatName
from k2quant.ground import engines, names
from k2quant.ground.saying.showing import brief

LEAST, *DEARER = LADDER
"""What every unit has where nothing is spent on it, and what it may be raised to, the cheapest first."""

_LAYOUT: Layout = "compressed-tensors"  # of FP8 beside INT4: the one that a config can describe there


Formats = Mapping[FormatName, Format]
"""The formats among which a unit chooses, as they are written."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that are stored alike, or not at all otherwise."""

    name: str
    """As engines call the module, such as `layers.3.mlp.experts`; of a matrix alone its own, as `layers.3.` has it."""
    weights: tuple[StoredWeight, ...]
    """In the order of their names."""
    nbytes: dict[FormatName, int]
    """Bytes of all its tensors in each format that it may have; in INT4 alone where it is copied."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def size(self) -> int:
        """Its weights, counted."""
        return sum(prod(weight.shape) for weight in self.weights)

    @property
    def fixed(self) -> bool:
        """Whether a weight of it is INT4 already: such are copied, and any other format would only cost."""
        return self.nbytes.keys() == {LEAST}


def formats_of(weights: Sequence[StoredWeight], least: Format) -> Formats:
    """Return the formats as a mixed output has them.

    Args:
        weights: of the source.
        least: the one that the recipe asks for.

    Raises:
        UnsupportedFormat: the source has FP8 in blocks that no config can describe beside INT4.
    """
    stored = [(weight.format, weight.main) for weight in weights if weight.format]
    layouts = {name: _LAYOUT if _LAYOUT in FORMATS[name].layouts else None for name in DEARER}
    return {LEAST: least} | {name: FORMATS[name].asked_for(stored, layout=layouts[name]) for name in DEARER}


def units_of(weights: Iterable[StoredWeight], recipe: Recipe, formats: Formats) -> list[Unit]:
    """Return the units of what a recipe stores as INT4, in the order of their names.

    Args:
        weights: of the source.
        recipe: that INT4 was asked for by.
        formats: that there are to choose from.

    Raises:
        UsageError: there is nothing to choose.
        ShapeMismatch: a weight cannot be stored as INT4.
    """
    found: dict[str, list[StoredWeight]] = {}
    for weight in sorted(weights, key=lambda weight: weight.base):
        if weight.format is not None and recipe.rule_of(weight) is not None:
            found.setdefault(_module(weight.base), []).append(weight)
    units = [_unit(name, members, formats) for name, members in sorted(found.items(), key=lambda item: _order(item[0]))]
    if all(unit.fixed for unit in units):
        raise UsageError("`budget=`: every weight in scope is INT4 already, and is copied: there is nothing to choose")
    return units


def _module(base: str) -> str:
    """Return what engines call the module of a weight."""
    if (whole := engines.fused(base)) is not None:
        return whole.name
    place = names.place(base)
    return base if place is None else f"layers.{place[0]}.{place[1]}"


def _order(name: str) -> tuple[int, str]:
    """Order names by layers as numbers."""
    layer = names.layer(f"model.{name}.")
    return (-1 if layer is None else layer), name


def _unit(name: str, members: Sequence[StoredWeight], formats: Formats) -> Unit:
    choices: tuple[FormatName, ...] = (LEAST, *DEARER)
    if any(weight.format is not None and weight.format.same(formats[LEAST]) for weight in members):
        choices = (LEAST,)
    return Unit(name, tuple(members), {each: _bytes(members, formats[each]) for each in choices})


def _bytes(members: Iterable[StoredWeight], stored: Format) -> int:
    return sum(spec.nbytes for weight in members for spec in output_specs(weight, stored).values())
