"""`allot`: bits a weight, or a divergence, to a recipe in which what carries most error a byte stays in FP8 or BF16."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.calib.budget.blaming import Damage, read_damage, shared_out
from k2quant.calib.budget.choosing import Step, hull, ranked, until, within
from k2quant.calib.budget.measuring import Lost, Measuring, Progress
from k2quant.calib.budget.units import DEARER, LEAST, Formats, Unit, formats_of, units_of
from k2quant.calib.budget.weighing import is_writer, relative, shares
from k2quant.calib.budget.wording import rules_of
from k2quant.calib.stats.matching import check_source
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.recipes.recipe import make_recipe
from k2quant.conversion.recipes.rules import WrittenRecipe, WrittenRule
from k2quant.conversion.searching.fitting import PLAIN, SOLVED, UNWEIGHTED, WEIGHTED
from k2quant.errors import UsageError
from k2quant.formats.format import Method, Scope
from k2quant.formats.known import FormatName
from k2quant.ground import names
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief
from k2quant.kernels.codecs.grids import Grid

_MB = 10**6

_SLACK = 0.005
"""Bits by which a budget may lie below INT4's own: 4.5 is asked, and 4.500004 it is with the shapes of K2's experts."""

_SEARCHED: tuple[Method, ...] = (PLAIN, UNWEIGHTED, WEIGHTED)
"""Whose scales can be measured on weights alone; other methods are ranked by the best of these."""

_WITHOUT_STATS: frozenset[Method] = frozenset({PLAIN, SOLVED})
"""Methods that convert without a folder of statistics: by no data, and by data of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A unit, what it would cost and lose in each format, and which one it gets."""

    unit: str
    """As engines call the module, such as `layers.3.mlp.experts`, or the matrix that stands alone."""
    kind: str
    """Its tensor class."""
    layer: int | None
    tensors: int
    weights: int
    """Counted."""
    format: FormatName
    """What it gets."""
    nbytes: Mapping[FormatName, int]
    """In each format that it may have, scales counted."""
    errors: Mapping[FormatName, float]
    """In each, as `Allotment.measure` says; empty for what was not measured."""
    gain: float | None
    """Error that its first step up removes a MB; None where there is none."""
    reason: str

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def as_json(self) -> dict[str, Any]:
        """Return it as a report has it."""
        said: dict[str, Any] = {
            "unit": self.unit,
            "class": self.kind,
            "layer": self.layer,
            "tensors": self.tensors,
            "weights": self.weights,
            "format": self.format,
            "bytes": dict(self.nbytes),
        }
        said |= {"errors": dict(self.errors)} if self.errors else {}
        said |= {} if self.gain is None else {"gain": self.gain}
        return {**said, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """Which unit gets which format, and why."""

    rules: tuple[WrittenRule, ...]
    """By which each unit gets its format."""
    ranked: tuple[Ranked, ...]
    """Most error removed a byte first; what was not measured or is copied last."""
    bits: float
    """A weight, over all weights in scope, scales counted."""
    least: float
    """The same with all of them in INT4."""
    most: float
    """The same with all of them where no further byte removes an error."""
    before: float
    """Sum of errors of what was measured, all in INT4."""
    after: float
    """The same as chosen."""
    measure: str
    """`outputs`: shares of the residual stream's energy; `kl`: nats a token, of `eval blame`'s measure."""
    asked: Mapping[str, float]
    """What was asked for: `bits`, or `kl`."""
    said: Mapping[str, Any]
    """By what it was measured: the scales' method, the statistics, and blame's file."""

    @property
    def recipe(self) -> WrittenRecipe:
        """What `convert(recipe=...)` takes; the report of that conversion then has this choice under `budget`."""
        return WrittenRecipe(rules=self.rules, budget=self.as_json())

    @property
    def searches(self) -> bool:
        """Whether its recipe has scales chosen by statistics, which stand beside it then."""
        return self.recipe.method not in _WITHOUT_STATS

    @property
    def cheapest(self) -> FormatName:
        """The format of all that nothing is spent on."""
        return LEAST

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        units: dict[str, object] = {name: sum(one.format == name for one in self.ranked) for name in (*DEARER, LEAST)}
        return {"bits": f"{self.bits:.3f}", **units, "error": f"{self.before:.3g} -> {self.after:.3g}"}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    def as_json(self) -> dict[str, Any]:
        """Return what a report says of it under `budget`."""
        return {
            "asked": dict(self.asked),
            "bits": self.bits,
            "least": self.least,
            "most": self.most,
            "weights": sum(one.weights for one in self.ranked),
            "bytes": sum(one.nbytes[one.format] for one in self.ranked),
            "measure": self.measure,
            **self.said,
            "error": {LEAST: self.before, "chosen": self.after},
            "units": [one.as_json() for one in self.ranked],
        }


@barred("weigh")
def allot(
    source: str | os.PathLike[str],
    stats: str | os.PathLike[str],
    *,
    to: FormatName = LEAST,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    budget: float | None = None,
    max_kl: float | None = None,
    blame: str | os.PathLike[str] | None = None,
    method: Method = "imatrix",
    grid: Grid | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    progress: Asked = None,
) -> Allotment:
    """Choose which weights stay in FP8 or BF16, so that what `convert` would store as INT4 has a given size.

    A unit, which is what engines hold in one module, is never split. The same input gives the same choice.

    Args:
        source: folder of the checkpoint, in BF16 or FP8.
        stats: folder that `k2quant calibrate` wrote for it.
        to: `int4`, the format of all that nothing is spent on.
        scope: which weights, as `convert` takes it.
        ignore: regular expressions of names that stay out of scope, likewise.
        budget: bits a weight over the weights in scope, scales counted: of INT4 alone they are 4.5.
        max_kl: in its place, the divergence that the output may have, nats a token; it needs `blame`. Divergences of
            units are added up, which holds for small ones: `k2quant eval fidelity` has the last word.
        blame: what `k2quant eval blame SOURCE INT4 -o FILE` measured of the same weights, all of them in INT4: errors
            within what it names are scaled to that.
        method: how INT4's scales are to be chosen. Of `rtn`, `mse` and `imatrix` the errors are measured; of another
            the order is that of `imatrix`.
        grid: INT4's rounding rule.
        workers: threads; None takes one for each core that this process may use.
        follow_links: read files that links in the source lead to, wherever they lie.
        progress: called as the work goes on, with the bytes read and all bytes; True for a bar.

    Returns:
        the choice, with its recipe and its ranking.

    Raises:
        UsageError: both or none of `budget` and `max_kl`, or one that no choice meets.
        CheckpointError: the source or the statistics are damaged, or do not belong together.
        MalformedResults: `blame` is none.
    """
    _check_asked(to, budget, max_kl, blame)
    damage = None if blame is None else read_damage(Path(blame))
    known, opened = open_stats(Path(stats)), open_checkpoint(Path(source), follow_links=follow_links)
    weights, problems = group_tensors(opened.tensors)
    if problems:
        raise problems[0]
    check_source(known, opened, weights)
    asked = WrittenRule(to=to, scope=scope, ignore=ignore, grid=grid, method=None if method == PLAIN else method)
    recipe = make_recipe((asked,), weights)
    formats = formats_of(weights, recipe.rules[0].format)
    units = units_of(weights, recipe, formats)
    scales = method if method in _SEARCHED else _SEARCHED[-1]
    errors = _errors(opened, known, weights, units, formats, scales, checked_workers(workers), told(progress))
    said: dict[str, Any] = {"scales": scales, "stats": known.fingerprint}
    if damage is not None:
        _check_damage(damage, sum(recipe.format_of(weight) is not None for weight in weights), Path(blame or ""))
        errors, said = _as_kl(damage, units, errors), said | {"blame": damage.sha256}
    found = _choose(units, errors, budget, max_kl)
    return _allotment(found, units, errors, rules_of(asked, found.chosen, units, weights, recipe), said)


def _check_asked(to: str, budget: float | None, max_kl: float | None, blame: object) -> None:
    """Refuse what is no question, before anything is read."""
    if to != LEAST:
        raise UsageError(f"`budget=` chooses among INT4, FP8 and BF16 for what `to=` {LEAST} takes, found `to=` {to}")
    if (budget is None) == (max_kl is None):
        raise UsageError("say what the output may cost, `budget=` in bits a weight, or what it may lose, `max_kl=`")
    name, value = ("budget", budget) if max_kl is None else ("max_kl", max_kl)
    if type(value) not in {int, float} or not 0 < float(value or 0) < float("inf"):
        raise UsageError(f"`{name}=` is {value!r:.50}; expected a number above 0")
    if max_kl is not None and blame is None:
        raise UsageError(
            "`max_kl=` needs `blame=`: no error of outputs says how far predictions drift. Convert all of it to INT4, "
            "then measure: `k2quant eval blame SOURCE INT4 -o FILE`"
        )


def _check_damage(damage: Damage, wanted: int, file: Path) -> None:
    """Refuse what was measured of another candidate than all in INT4.

    Args:
        damage: what was measured.
        wanted: weights that are stored otherwise there.
        file: for the message.

    Raises:
        UsageError: so it was.
    """
    if damage.changed != wanted:
        raise UsageError(
            f"{file} is of a candidate in which {damage.changed:,} weights are stored otherwise, and INT4 alone would "
            f"change {wanted:,}: for `blame=` convert the same scope to INT4 without a budget, and measure that"
        )


Errors = dict[str, dict[FormatName, float]]
"""By unit, then by format; none of a unit that was not measured."""


def _errors(
    source: Checkpoint,
    stats: Stats,
    weights: Sequence[StoredWeight],
    units: Sequence[Unit],
    formats: Formats,
    method: Method,
    workers: int,
    progress: Progress | None,
) -> Errors:
    """Measure all that is in question, and what writes to the residual stream beside it."""
    measuring = Measuring(source, stats, formats, method)
    wanted = {weight.base: tuple(unit.nbytes) for unit in units if not unit.fixed for weight in unit.weights}
    read = [weight for weight in weights if weight.base in wanted or is_writer(weight.base)]
    lost = measuring.run(wanted, read, workers=workers, progress=progress)
    counts = shares(read, lost, stats, measuring.embedding(weights))
    return {
        unit.name: {name: _sum(unit, name, lost, counts) for name in unit.nbytes}
        for unit in units
        if not unit.fixed and all(weight.base in counts for weight in unit.weights)
    }


def _sum(unit: Unit, name: FormatName, lost: Mapping[str, Lost], counts: Mapping[str, float]) -> float:
    return sum(relative(lost[weight.base], name) * counts[weight.base] for weight in unit.weights)


def _as_kl(damage: Damage, units: Sequence[Unit], errors: Errors) -> Errors:
    """Return errors in nats: of a unit in INT4 what blame says, in other formats as they are to that."""
    kl = shared_out(damage, units, {name: each[LEAST] for name, each in errors.items()})
    return {
        name: {each: kl[name] * (error / found[LEAST] if found[LEAST] else 0.0) for each, error in found.items()}
        for name, found in errors.items()
    }


@dataclass(frozen=True, slots=True)
class _Found:
    """A choice."""

    chosen: dict[str, FormatName]
    steps: list[Step]
    """All of them, the steepest first."""
    taken: list[Step]
    asked: dict[str, float]


def _choose(units: Sequence[Unit], errors: Errors, budget: float | None, max_kl: float | None) -> _Found:
    """Take steps until the budget is spent, or the divergence is reached.

    Raises:
        UsageError: no choice meets what was asked for.
    """
    steps = ranked(hull(unit.name, unit.nbytes, errors[unit.name]) for unit in units if unit.name in errors)
    size, least = sum(unit.size for unit in units), sum(unit.nbytes[LEAST] for unit in units)
    if budget is not None:
        most = max(least, sum(max(unit.nbytes.values()) for unit in units))
        low, high = 8 * least / size, 8 * most / size
        if not low - _SLACK <= budget <= high:
            raise UsageError(
                f"`budget=` {budget:g}: these {size:,} weights take {low:.4f} bits each in INT4, scales counted, and "
                f"{high:.4f} in BF16; ask for something between"
            )
        taken = within(steps, int(budget * size / 8) - least)
    else:
        taken = until(steps, sum(found[LEAST] for found in errors.values()) - float(max_kl or 0))
    chosen = dict.fromkeys((unit.name for unit in units), LEAST) | {step.unit: step.to for step in taken}
    return _Found(chosen, steps, taken, {"bits": budget} if budget is not None else {"kl": float(max_kl or 0)})


def _allotment(
    found: _Found, units: Sequence[Unit], errors: Errors, rules: tuple[WrittenRule, ...], said: Mapping[str, Any]
) -> Allotment:
    first = {step.unit: step for step in reversed(found.steps)}
    order = {name: place for place, name in enumerate(dict.fromkeys(step.unit for step in found.steps))}
    known = {unit.name: place for place, unit in enumerate(units)}

    def rank(unit: Unit) -> tuple[bool, int, int]:
        return unit.name not in errors, order.get(unit.name, len(order)), known[unit.name]

    cut = next((step.rate for step in found.steps if step not in found.taken), None)
    ranking = tuple(
        Ranked(
            unit=unit.name,
            kind=names.tensor_class(unit.weights[0].main.name),
            layer=names.layer(unit.weights[0].base),
            tensors=len(unit.weights),
            weights=unit.size,
            format=found.chosen[unit.name],
            nbytes=dict(unit.nbytes),
            errors=dict(errors.get(unit.name, {})),
            gain=first[unit.name].rate * _MB if unit.name in first else None,
            reason=_reason(unit, found, measured=unit.name in errors, cut=cut),
        )
        for unit in sorted(units, key=rank)
    )
    size = sum(unit.size for unit in units)
    after = {unit.name: found.chosen[unit.name] for unit in units}
    spent = {step.unit: 0 for step in found.steps}
    for step in found.steps:
        spent[step.unit] += step.nbytes
    least = sum(unit.nbytes[LEAST] for unit in units)
    return Allotment(
        rules=rules,
        ranked=ranking,
        bits=8 * sum(unit.nbytes[after[unit.name]] for unit in units) / size,
        least=8 * least / size,
        most=8 * (least + sum(spent.values())) / size,
        before=sum(each[LEAST] for each in errors.values()),
        after=sum(each[after[name]] for name, each in errors.items()),
        measure="kl" if "blame" in said else "outputs",
        asked=found.asked,
        said=said,
    )


def _reason(unit: Unit, found: _Found, *, measured: bool, cut: float | None) -> str:
    """Say why a unit has its format."""
    own = [step for step in found.steps if step.unit == unit.name]
    taken = [step for step in found.taken if step.unit == unit.name]
    if unit.fixed:
        return f"{LEAST}: in the source already, copied"
    if not measured:
        return f"{LEAST}: not measured by the calibration"
    if not own:
        return f"{LEAST}: no format loses less here"
    if not taken:
        above = cut is not None and own[0].rate >= cut
        why = "no room for it" if above and "bits" in found.asked else "below the cut"
        return f"{LEAST}: {own[0].to} would take away {own[0].rate * _MB:.2e} a MB, {why}"
    return f"{taken[-1].to}: takes away {taken[-1].rate * _MB:.2e} a MB, above the cut"
