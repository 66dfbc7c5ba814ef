"""A choice as a recipe: rules whose patterns name units one by one, as a person could write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from k2quant.calib.budget.units import DEARER, LEAST, Unit
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.recipes.recipe import Recipe
from k2quant.conversion.recipes.rules import WrittenRule
from k2quant.formats.format import Scope
from k2quant.formats.known import FormatName, quantised_names
from k2quant.ground import names

_QUANTISED = frozenset(quantised_names())

_LAYERS = 60  # in one pattern, so that none is long enough to be refused


def rules_of(
    asked: WrittenRule,
    chosen: Mapping[str, FormatName],
    units: Sequence[Unit],
    weights: Sequence[StoredWeight],
    recipe: Recipe,
) -> tuple[WrittenRule, ...]:
    """Return the rules by which each unit gets its format, and all other weights what they would have got without.

    Args:
        asked: the rule for INT4.
        chosen: the format of each unit, by name.
        units: all of them.
        weights: of the source.
        recipe: what `asked` alone comes to.
    """
    if all(found == DEARER[-1] for found in chosen.values()):  # and so does all that nobody asked for
        return (WrittenRule(to=DEARER[-1]),)
    raised = {
        name: match for name in DEARER if (match := patterns(unit for unit in units if chosen[unit.name] == name))
    }
    rules = [WrittenRule(to=name, scope=_scope(name), match=match) for name, match in raised.items()]
    if any(chosen[unit.name] == LEAST for unit in units):  # first, for an output is called by its first rule
        spared = tuple(pattern for match in raised.values() for pattern in match)
        rules.insert(0, replace(asked, ignore=(*asked.ignore, *spared)))
    others = [weight for weight in weights if weight.format is not None and recipe.rule_of(weight) is None]
    # What is quantised and nobody asked for becomes BF16; beside a rule for its format it would stay.
    left = [weight.main.name for weight in others if weight.format and weight.format.name in raised.keys() & _QUANTISED]
    kinds = set(map(names.tensor_class, left))
    if kinds:
        rules.append(WrittenRule(to=DEARER[-1], classes=tuple(kind for kind in names.TENSOR_CLASSES if kind in kinds)))
    return tuple(rules)


def _scope(name: FormatName) -> Scope | None:
    return "projections" if name in _QUANTISED else None  # patterns say the rest


def patterns(units: Iterable[Unit]) -> tuple[str, ...]:
    """Return regular expressions that are found in the names of these units' weights, and in no others.

    Names that differ in the number of their layer, and of their expert, share one.
    """
    layers: dict[tuple[str, str, str], set[int]] = {}
    loose: set[str] = set()
    for unit in units:
        for weight in unit.weights:
            place, prefix = names.place(weight.base), names.spelling(weight.base)
            if place is None or prefix is None:
                loose.add(f"^{re.escape(weight.base)}$")
                continue
            above, last = names.split(place[1])
            above = "mlp.experts.[0-9]+" if names.expert(weight.base) is not None else above
            layers.setdefault((prefix, above, last), set()).add(place[0])
    alike: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for (prefix, above, last), some in sorted(layers.items()):
        alike.setdefault((prefix, above, tuple(sorted(some))), []).append(last)
    found = [
        rf"^{_dots(prefix)}layers\.{_either(map(str, some))}\.{_dots(above)}\.{_either(lasts)}$"
        for (prefix, above, numbers), lasts in alike.items()
        for some in _cut(numbers)
    ]
    return tuple(found + sorted(loose))


def _dots(name: str) -> str:
    return name.replace(".", r"\.")


def _either(words: Iterable[str]) -> str:
    one, *others = words
    return f"(?:{'|'.join((one, *others))})" if others else one


def _cut(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (numbers[first : first + _LAYERS] for first in range(0, len(numbers), _LAYERS))
