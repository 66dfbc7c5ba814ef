"""Which weights get which format.

Defaults follow what Moonshot ships: INT4 releases quantise the routed experts, FP8 releases every projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.relatives import shown
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Layout, Scope
from k2quant.formats.known import FORMATS
from k2quant.ground import engines, names
from k2quant.ground.patterns import check_found
from k2quant.kernels.codecs.grids import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A format, and the weights that get it."""

    format: Format
    scope: Scope | None = None
    """Which weights, see `k2quant.formats.format.Scope`; None: every weight."""
    ignore: tuple[re.Pattern[str], ...] = ()
    """Weights in whose name one of these is found are out of scope."""

    def takes(self, base: str) -> bool:
        """Tell whether a weight is to be stored in the format."""
        return in_scope(base, self.scope, self.format) and not self.spares(base)

    def spares(self, base: str) -> bool:
        """Tell whether a pattern of `ignore` is found in a weight's name."""
        return any(pattern.search(base) for pattern in self.ignore)


def in_scope(base: str, scope: Scope | None, stored: Format) -> bool:
    """Tell whether a weight belongs to a scope, if it is to be stored in a format."""
    if scope is None:
        return True
    if scope == "experts":
        return names.is_routed_expert(base)
    return names.is_projection(base) and not (scope == "linear" and is_unfit(base, stored))


def is_unfit(base: str, stored: Format) -> bool:
    """Tell whether a weight is one that engines do not run in a format."""
    return names.split(base)[1] in stored.unfit


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

    def splits(self, weights: list[StoredWeight]) -> list[engines.Split]:
        """Return what engines fuse and the output has in several formats."""
        written = ((weight.base, self.format_of(weight) or weight.format) for weight in weights)
        return engines.splits((base, stored.name) for base, stored in written if stored is not None)

    def check_splits(self, splits: list[engines.Split], weights: list[StoredWeight]) -> None:
        """Refuse to split what engines fuse over several formats.

        A source that is split already and merely copied is not refused: nothing becomes worse.

        Args:
            splits: what `splits` found of these weights.
            weights: what the source holds.

        Raises:
            UsageError: one of them is this recipe's doing.
        """
        changed = {engines.fused(weight.base) for weight in weights if self._recasts(weight)} if splits else set()
        made = [split for split in splits if split.fused in changed]
        if made:
            more = f" ({len(made)} such groups)" if len(made) > 1 else ""
            raise UsageError(
                f"this would split what engines fuse: {made[0]}{more}; take all of them or none with --scope and "
                "--ignore, or write it all the same with --allow-split"
            )

    def remarks(self, weights: list[StoredWeight]) -> list[str]:
        """Return what is worth saying of the output: what stays quantised though nobody asked for it."""
        said = []
        kept = [(weight.base, weight.format) for weight in weights if weight.format is not None and self._stays(weight)]
        unfit = [base for base, stored in kept if is_unfit(base, stored)]
        if unfit:
            said.append(
                f"`{shown(unfit[0])}` stays quantised as in the source ({len(unfit)} such): engines that absorb it "
                "(MLA) want it in BF16 or FP8; convert to bf16 first, then again"
            )
        spared = [base for base, _ in kept if any(rule.spares(base) for rule in self.rules)]
        if spared:
            said.append(
                f"--ignore spares `{shown(spared[0])}`, which stays quantised as in the source ({len(spared)} such): "
                "to have it in BF16, convert to bf16 first"
            )
        named = {*unfit, *spared}
        others = [base for base, _ in kept if base not in named]
        if others:
            said.append(
                f"`{shown(others[0])}` is out of scope and stays quantised as in the source ({len(others)} such): to "
                "have it in BF16, convert to bf16 first"
            )
        return said

    def _stays(self, weight: StoredWeight) -> bool:
        """Tell whether a quantised weight is copied although no rule takes it."""
        quantised = weight.format is not None and weight.format.quantised and not self._recasts(weight)
        return quantised and not any(rule.takes(weight.base) for rule in self.rules)

    def _recasts(self, weight: StoredWeight) -> bool:
        """Tell whether a weight gets other values or another format, more than a layout of its own."""
        target = self.format_of(weight)
        return target is not None and weight.format is not None and not weight.format.relabels(target)

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
        UsageError: an option that has no meaning for this format, or a regular expression that is broken or is found in
            no name.
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
    patterns = tuple(_compile(pattern) for pattern in ignore)
    check_found(patterns, [weight.base for weight in weights], "--ignore")
    rule = Rule(format=target, scope=scope or kind.default_scope, ignore=patterns)
    if kind.quantised and not any(rule.takes(weight.base) for weight in weights if weight.format):
        raise CheckpointError(
            "no weight is in scope",
            expected="tensors such as model.layers.1.mlp.experts.0.gate_proj.weight",
            remedy="see `k2quant inspect`, and --scope and --ignore",
        )
    return Recipe((rule,))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--ignore {pattern!r} is no regular expression: {error}") from error
