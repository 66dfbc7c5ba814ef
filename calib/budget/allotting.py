"""`allot`: bits a weight, or a divergence, to a recipe in which what carries most error a byte stays in FP8 or BF16."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2quant.calib.budget.blaming import Damage, read_damage, shared_out
from k2quant.calib.budget.deciding import Errors, allotment_of, check_bits, choose
from k2quant.calib.budget.measuring import Lost, Measuring, Progress
from k2quant.calib.budget.result import Allotment
from k2quant.calib.budget.units import LEAST, Formats, Unit, formats_of, units_of
from k2quant.calib.budget.weighing import is_writer, relative, shares
from k2quant.calib.budget.wording import rules_of
from k2quant.calib.stats.matching import check_source
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.recipes.recipe import make_recipe
from k2quant.conversion.recipes.rules import WrittenRule
from k2quant.conversion.searching.fitting import PLAIN, UNWEIGHTED, WEIGHTED
from k2quant.errors import UsageError
from k2quant.formats.format import Method, Scope
from k2quant.formats.known import FormatName
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.kernels.codecs.grids import Grid

_SEARCHED: tuple[Method, ...] = (PLAIN, UNWEIGHTED, WEIGHTED)
"""Whose scales can be measured on weights alone; other methods are ranked by the best of these."""


@barred("weigh")
def allot(
    source: str | os.PathLike[str] | Address,
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
    known, opened = open_stats(Path(stats)), open_checkpoint(spot(source), follow_links=follow_links)
    weights, problems = group_tensors(opened.tensors)
    if problems:
        raise problems[0]
    check_source(known, opened, weights)
    asked = WrittenRule(to=to, scope=scope, ignore=ignore, grid=grid, method=None if method == PLAIN else method)
    recipe = make_recipe((asked,), weights)
    formats = formats_of(weights, recipe.rules[0].format)
    units = units_of(weights, recipe, formats)
    if budget is not None:
        check_bits(units, budget)
    if damage is not None:
        _check_damage(damage, sum(recipe.format_of(weight) is not None for weight in weights), Path(blame or ""))
    scales = method if method in _SEARCHED else _SEARCHED[-1]
    errors = _errors(opened, known, weights, units, formats, scales, checked_workers(workers), told(progress))
    said: dict[str, Any] = {"scales": scales, "stats": known.fingerprint}
    if damage is not None:
        errors, said = _as_kl(damage, units, errors), said | {"blame": damage.sha256}
    found = choose(units, errors, budget, max_kl)
    return allotment_of(found, units, errors, rules_of(asked, found.chosen, units, weights, recipe), said)


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
