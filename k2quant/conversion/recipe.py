"""Which weights get which format.

Defaults follow what Moonshot ships: INT4 releases quantise the routed experts, FP8 releases every projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Layout, Scope
from k2quant.formats.known import FORMATS
from k2quant.ground import names
from k2quant.kernels.codecs.grids import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A format, and the weights that get it."""

    format: Format
    scope: Scope | None = None
    """`experts`: the routed experts; `linear`: every projection of the decoder layers; None: every weight."""
    ignore: tuple[re.Pattern[str], ...] = ()
    """Weights in whose name one of these is found are out of scope."""

    def takes(self, base: str) -> bool:
        """Tell whether a weight is to be stored in the format."""
        return in_scope(base, self.scope) and not any(pattern.search(base) for pattern in self.ignore)


def in_scope(base: str, scope: Scope | None) -> bool:
    """Tell whether a weight belongs to a scope."""
    if scope is None:
        return True
    return names.is_routed_expert(base) if scope == "experts" else names.is_projection(base)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Decides, weight by weight, what a conversion writes; the first rule that takes a weight counts."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        """Refuse what no config could tell apart.

        Raises:
            UsageError: two rules ask for one format in different ways.
        """
        kinds = {rule.format.name: rule.format for rule in self.rules}
        other = next((rule.format for rule in self.rules if rule.format != kinds[rule.format.name]), None)
        if other is not None:
            raise UsageError(f"a recipe asks for {other.name} in two ways: {other} and {kinds[other.name]}")

    @property
    def formats(self) -> dict[str, Format]:
        """The formats that are asked for, by name."""
        return {rule.format.name: rule.format for rule in reversed(self.rules)}

    @property
    def quantises(self) -> bool:
        """Whether any weight is to be quantised."""
        return any(rule.format.quantised for rule in self.rules)

    def format_of(self, weight: StoredWeight) -> Format | None:
        """Return the format that a weight is converted to, or None where it is copied byte for byte.

        A weight that is already in the format of its rule is copied. One that no rule takes comes out as BF16 if it is
        quantised in a format that nobody asked for; else as that format was asked for, which rounds nothing.
        """
        if weight.format is None:
            return None
        for rule in self.rules:
            if rule.takes(weight.base):
                return None if weight.format.same(rule.format) else rule.format
        asked = self.formats.get(weight.format.name, Bf16()) if weight.format.quantised else weight.format
        return None if weight.format.same(asked) else asked

    def rounding(self, stored: Format) -> Format:
        """Return a format with the rounding rule that was asked for it, to write new values in it."""
        asked = self.formats.get(stored.name)
        return stored.rounded_as(asked) if asked else stored


def make_recipe(
    to: str,
    weights: list[StoredWeight],
    *,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None,
    layout: Layout | None = None,
) -> Recipe:
    """Make the recipe of a conversion from what the user asked for and what the source holds.

    Args:
        to: the name of a format.
        weights: what the source holds.
        scope: which weights get the format; None: as Moonshot ships it.
        ignore: regular expressions of weights that do not.
        grid: the rounding rule; None for the default.
        layout: what its tensors are called; None for the default.

    Raises:
        UsageError: an option that has no meaning for this format, or a broken regular expression.
        CheckpointError: nothing is in scope.
        UnsupportedFormat: the source cannot be rewritten in this format.
    """
    kind = FORMATS[to]
    if kind.default_scope is None and (scope or ignore):
        raise UsageError(f"--scope and --ignore have no meaning with --to {to}: everything becomes {to.upper()}")
    if grid and not kind.grids:
        owners = " and ".join(name.upper() for name, other in FORMATS.items() if other.grids)
        raise UsageError(f"--grid has no meaning with --to {to}: it is the rounding rule of {owners}")
    if layout and not kind.layouts:
        owners = " and ".join(name.upper() for name, other in FORMATS.items() if other.layouts)
        raise UsageError(f"--layout has no meaning with --to {to}: it says whose names {owners} is written with")
    target = kind.asked_for(((weight.format, weight.main) for weight in weights if weight.format), grid, layout)
    rule = Rule(format=target, scope=scope or kind.default_scope, ignore=tuple(_compile(pattern) for pattern in ignore))
    if kind.quantised and not any(rule.takes(weight.base) for weight in weights if weight.format):
        raise CheckpointError(
            "no weight is in scope",
            expected="tensors such as model.layers.1.mlp.experts.0.gate_proj.weight",
            remedy="see `k2quant inspect`, and --scope and --ignore",
        )
    return Recipe((rule,))


_QUANTIFIER = re.compile(r"(?<!\\)[*+{]")
MOST_QUANTIFIERS = 3
"""A few more in one pattern can keep the matcher busy for years."""


def may_take_for_ever(pattern: str) -> bool:
    """Tell of a regular expression that comes from a file whether matching it might never end."""
    return (
        len(pattern) > 500
        or re.search(r"\)[*+{]", pattern) is not None
        or len(_QUANTIFIER.findall(pattern)) > MOST_QUANTIFIERS
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--ignore {pattern!r} is no regular expression: {error}") from error
