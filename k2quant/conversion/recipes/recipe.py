"""Which weights get which format.

Defaults follow what Moonshot ships: INT4 releases quantise the routed experts, FP8 releases every projection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.metadata.relatives import shown
from k2quant.conversion.recipes.rules import METHODS, SEARCHED_BY_DEFAULT, WrittenRule, in_force, method_of
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Scope, listed
from k2quant.formats.known import FORMATS
from k2quant.ground import engines, names
from k2quant.ground.patterns import check_found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A format, and the weights that get it."""

    format: Format
    scope: Scope | None = None
    """Which weights, see `k2quant.formats.format.Scope`; None: every weight."""
    ignore: tuple[re.Pattern[str], ...] = ()
    """Weights in whose name one of these is found are out of scope."""
    classes: tuple[str, ...] = ()
    """Classes that it takes, of `names.TENSOR_CLASSES`; empty: all."""
    match: tuple[re.Pattern[str], ...] = ()
    """It takes weights in whose name one of these is found; empty: all."""
    searches: bool = False
    """Whether better scales than the format's own rule takes are searched for what it takes."""
    searched_from: tuple[str, ...] = ()
    """Where it does not: names of formats of a source from which they are searched all the same."""
    apart: frozenset[engines.Fused] = frozenset()
    """What engines fuse and no scope knows all of, such as q with k and v in K3's KDA: all of it stays as it is."""

    def takes(self, base: str) -> bool:
        """Tell whether a weight is to be stored in the format."""
        if not in_scope(base, self.scope, self.format) or (self.apart and engines.fused(base) in self.apart):
            return False
        return self.means(base) and not self.spares(base)

    def means(self, base: str) -> bool:
        """Tell whether classes and patterns name a weight."""
        if self.match and not any(pattern.search(base) for pattern in self.match):
            return False
        return not self.classes or _class_of(base) in self.classes

    def spares(self, base: str) -> bool:
        """Tell whether a pattern of `ignore` is found in a weight's name."""
        return any(pattern.search(base) for pattern in self.ignore)


@functools.lru_cache(maxsize=2**17)  # each name is asked for several times by each rule, and there are 70,000
def _class_of(base: str) -> str:
    return names.tensor_class(f"{base}.weight")


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
            raise UsageError(
                f"a recipe asks for {other.name} in two ways, {kinds[other.name]} and {other}: config.json has one "
                "group for a format"
            )

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
        if weight.format is None or names.is_float32(weight.base):
            return None
        if (rule := self.rule_of(weight)) is not None:
            return None if weight.format.same(rule.format) else rule.format.taking(weight.format)
        asked = self.formats.get(weight.format.name, Bf16()) if weight.format.quantised else weight.format
        return None if weight.format.same(asked) else asked.taking(weight.format)

    def rule_of(self, weight: StoredWeight) -> Rule | None:
        """Return the first rule that takes a weight, if one does."""
        return next((rule for rule in self.rules if rule.takes(weight.base)), None)

    def searches(self, weight: StoredWeight) -> bool:
        """Tell whether better scales than those of the format's own rule are searched for a weight.

        Only for one that gets the format: what is stored in it already lies on its grid, and is copied.
        """
        rule = self.rule_of(weight)
        if rule is None or weight.format is None:
            return False
        return (rule.searches or weight.format.name in rule.searched_from) and self._recasts(weight)

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
                f"this would split what engines fuse: {made[0]}{more}; take all of them or none with `scope=` "
                "and `ignore=`, or write it all the same with `allow_split=True`"
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
                f"`ignore=` spares `{shown(spared[0])}`, which stays quantised as in the source ({len(spared)} such): "
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
    written: Sequence[WrittenRule], weights: list[StoredWeight], adapted: Callable[[Format], Format] = lambda each: each
) -> Recipe:
    """Make the recipe of a conversion from what the user asked for and what the source holds.

    Args:
        written: the rules; the first that takes a weight counts.
        weights: what the source holds.
        adapted: returns a format with what was asked for beside the rules.

    Raises:
        UsageError: a key that has no meaning for its format, a regular expression that is broken or is found in no
            name, or one of several rules that takes nothing.
        CheckpointError: nothing is in scope.
        UnsupportedFormat: the source cannot be rewritten in this format.
    """
    resolved = in_force(tuple(written))
    defaults = method_of(resolved) in SEARCHED_BY_DEFAULT
    recipe = Recipe(tuple(_rule(rule, weights, adapted, defaults=defaults) for rule in resolved))
    _check_taken(recipe, resolved, weights)
    return recipe


def _rule(
    written: WrittenRule, weights: list[StoredWeight], adapted: Callable[[Format], Format], *, defaults: bool
) -> Rule:
    """Make one rule, whose patterns are found somewhere."""
    stored = ((weight.format, weight.main) for weight in weights if weight.format)
    bases = [weight.base for weight in weights]
    patterns = {name: tuple(_compile(each, written, name) for each in getattr(written, name)) for name in _PATTERNS}
    for name, found in patterns.items():
        check_found(found, bases, written.called(name))
    target = adapted(FORMATS[written.to].asked_for(stored, written.grid, written.layout))
    return Rule(
        format=target,
        scope=written.scope,
        classes=written.classes,
        searches=written.method not in {None, METHODS[0]},
        searched_from=target.searched_from if written.method is None and defaults else (),
        apart=_apart(weights) if written.scope is not None else frozenset(),
        **patterns,
    )


def _apart(weights: list[StoredWeight]) -> frozenset[engines.Fused]:
    """Return the fused modules of which a member is in no scope."""
    unknown = {
        engines.fused(weight.base) for weight in weights if weight.format and not names.is_projection(weight.base)
    }
    return frozenset(whole for whole in unknown if whole is not None)


def _check_taken(recipe: Recipe, written: tuple[WrittenRule, ...], weights: list[StoredWeight]) -> None:
    """Refuse rules that take nothing: what somebody meant by them would not come about.

    Raises:
        UsageError: one of a recipe.
        CheckpointError: the only one, and something was to be quantised.
    """
    held = [weight for weight in weights if weight.format]
    taken = {id(recipe.rule_of(weight)) for weight in held}
    for rule, asked in zip(recipe.rules, written, strict=True):
        if id(rule) in taken:
            continue
        if asked.place and (asked.narrowed or len(written) > 1):
            raise UsageError(f"{asked.place}: takes no weight: {_why(rule, asked, held)}")
        if rule.format.quantised:
            raise CheckpointError(
                "no weight is in scope",
                expected="tensors such as model.layers.1.mlp.experts.0.gate_proj.weight",
                remedy="see `k2quant inspect`, and `scope=` and `ignore=`",
            )


def _why(rule: Rule, asked: WrittenRule, held: list[StoredWeight]) -> str:
    """Say why a rule takes nothing: others come before it, a class is not there, or engines do not run them so."""
    mine = [weight.base for weight in held if rule.takes(weight.base)]
    if mine:
        return f"rules before it take all {len(mine):,} that it would, such as `{shown(mine[0])}`; put it before them"
    here = {_class_of(weight.base) for weight in held}
    if asked.classes and not here & set(asked.classes):
        return f"the checkpoint has no weight of {listed(asked.classes)}; it has {listed(sorted(here))}"
    named = [weight.base for weight in held if rule.means(weight.base)]
    if not named:
        return "no weight is of its classes and has one of its patterns in its name"
    if all(map(rule.spares, named)):
        return f"`ignore` spares all {len(named):,} that it names, such as `{shown(named[0])}`"
    return f"none of the {len(named):,} that it names is in scope ({rule.scope}), such as `{shown(named[0])}`"


_PATTERNS = ("match", "ignore")


def _compile(pattern: str, written: WrittenRule, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{written.called(name)} {pattern!r} is no regular expression: {error}") from error
