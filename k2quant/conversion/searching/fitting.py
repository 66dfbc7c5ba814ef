"""Whether a way of searching scales and the statistics that are named fit together, and what these do not know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from k2quant.calib.stats.digests import base_of
from k2quant.conversion.metadata import relatives
from k2quant.conversion.placing import Job
from k2quant.conversion.recipes.rules import METHODS
from k2quant.errors import UsageError
from k2quant.formats.format import Method
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats

PLAIN, UNWEIGHTED, WEIGHTED, SOLVED, FOLDED = METHODS


def check_method(method: Method, *, stats: bool) -> None:
    """Refuse statistics that nobody would read, a search that cannot do without, and what is no search.

    Args:
        method: how scales are chosen.
        stats: whether a folder of statistics was named.

    Raises:
        UsageError: so it is.
    """
    if method == SOLVED:
        raise UsageError(
            f"`method=` {method} runs data through the model while it converts: call `k2quant.calib.solve` with "
            "`data=`, or `k2quant convert --method gptq --data FILE`"
        )
    if method in {WEIGHTED, FOLDED} and not stats:
        raise UsageError(
            f"`method=` {method} weighs errors by what a calibration saw, and `stats=` names none: make it with "
            "`k2quant calibrate SOURCE STATS --data FILE`, or take `method=` mse, which needs no data"
        )
    if method == PLAIN and stats:
        raise UsageError(
            f"`stats=` has no meaning with `method=` {method}: rounding to nearest asks no data; take `method=` "
            f"{WEIGHTED}"
        )


def unmeasured(jobs: Iterable[Job], stats: Stats) -> Iterator[str]:
    """Say which of the weights that are to be searched the statistics do not know."""
    bases = ((job.weight.base, base_of(job.weight)) for job in jobs)
    missing = [shown for shown, base in bases if base is None or stats.width(base) is None]
    if missing:
        such = relatives.shown(missing[0])
        yield (
            f"not measured by the calibration, so searched for the least squared error alone ({UNWEIGHTED}): "
            f"{counted(len(missing), 'weight')}, such as {such}"
        )
