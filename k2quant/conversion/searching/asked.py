"""Who searches scales for a conversion, and what its plan says of that."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.calib.stats.matching import check_source
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.remote.address import Address
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.conversion.searching.fitting import FOLDED, PLAIN, UNWEIGHTED, check_method, unmeasured
from k2quant.conversion.searching.folding import Folding
from k2quant.conversion.searching.inputs import scaled
from k2quant.conversion.searching.searched import Searched

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats


def planned(
    source: Path | Address,
    options: Options,
    stats: str | os.PathLike[str] | None = None,
    activation_scales: str | os.PathLike[str] | None = None,
    *,
    follow_links: bool = False,
) -> tuple[Plan, Searched | None]:
    """Plan a conversion; return with it who searches scales, if anybody does. See `convert`.

    Raises:
        CheckpointError: the source cannot be converted, or the statistics are damaged, or another model's.
        UsageError: the options make no sense.
    """
    check_method(options.in_force.method, stats=stats is not None)
    plan = make_plan(open_checkpoint(source, follow_links=follow_links), options)
    known = [
        None if folder is None else open_stats(Path(folder))
        for folder in (stats, activation_scales if options.activation_scales == "stats" else None)
    ]
    plan = scaled(plan, known[1])
    return searched(plan, known[0], *(each for each in known[1:] if each is not None))


def searched(
    plan: Plan, stats: Stats | None, *calibrated: Stats, but: Collection[str] = ()
) -> tuple[Plan, Searched | None]:
    """Return a plan that says how scales are searched, and who does it; None where nobody asked for it.

    Args:
        plan: of a conversion.
        stats: what is known of the source's inputs, if anything.
        calibrated: statistics that serve something else; whoever searches refuses other weights than theirs.
        but: names of main tensors of weights that get other values than the source's, and are rounded.

    Raises:
        UsageError: the method needs statistics, or has no use for them.
        CheckpointError: they are another model's.
    """
    method = plan.options.in_force.method
    check_method(method, stats=stats is not None)
    said: dict[str, Any] = {}
    if method == PLAIN:
        found = Searched(plan, method, None, calibrated, but)
        if not len(found):
            return plan, found if calibrated else None
        method, said["default"] = UNWEIGHTED, True  # `Format.searched_from` asks for it
    kinds = [rule.format for rule in plan.recipe.rules if rule.searches or rule.searched_from]
    said |= {"asked": method, "candidates": max(kind.candidates for kind in kinds)}
    if stats is None:
        return replace(plan, method=said), Searched(plan, method, stats, calibrated, but)
    jobs = list(plan.jobs())
    check_source(stats, plan.source, [job.weight for job in jobs])
    said["stats"] = stats.fingerprint
    rounder = (partial(Folding, plan) if method == FOLDED else partial(Searched, plan, method))(stats, calibrated)
    remarks = (*plan.remarks, *unmeasured(filter(rounder.takes, jobs), stats), *rounder.remarks())
    return replace(plan, method=said, remarks=remarks), rounder
