"""What a conversion that solves will write: which matrices are solved, which are merely searched, and what is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.layout import place_of
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.conversion.metadata import relatives
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.conversion.searching.fitting import SOLVED, UNWEIGHTED
from k2quant.conversion.searching.searched import Searched
from k2quant.errors import UsageError
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.inputs import Samples
    from k2quant.calib.solving.settings import Settings


class SolvedPlan(NamedTuple):
    """A plan, and what of it is solved."""

    plan: Plan
    jobs: Mapping[str, Job]
    """Of the matrices that are solved, by their names in the language model without suffix."""
    abroad: tuple[str, ...]
    """Names of jobs that the pass does not reach, such as those of MTP layers: they are searched."""

    def beyond(self) -> Searched:
        """Return who searches what the pass does not reach."""
        return Searched(self.plan, UNWEIGHTED, None)


def plan_solved(source: Checkpoint, options: Options) -> SolvedPlan:
    """Plan a conversion that solves, from headers alone.

    Args:
        source: the checkpoint.
        options: what was asked for; its method is `gptq`.

    Raises:
        CheckpointError: the source cannot be converted, or is no model that could be run.
        UsageError: the options make no sense, or another method was asked for.
    """
    if (method := options.in_force.method) != SOLVED:
        raise UsageError(f"`recipe=` says method {method} in its rules; what is solved has `method: {SOLVED}`")
    plan = make_plan(source, options)
    model = Model.of(source.config, file=source.folder / CONFIG)
    jobs: dict[str, Job] = {}
    abroad: list[str] = []
    for job in plan.jobs():
        if job.target is None or not plan.recipe.searches(job.weight):
            continue
        base = base_of(job.weight)
        place = None if base is None else place_of(base)
        if base is not None and place is not None and place.layer < model.layers:
            jobs[base] = job
        else:
            abroad.append(job.name)
    return SolvedPlan(replace(plan, remarks=(*plan.remarks, *_remarks(abroad))), jobs, tuple(abroad))


def _remarks(abroad: list[str]) -> Iterator[str]:
    if abroad:
        such = relatives.shown(abroad[0])
        yield (
            f"not reached by the pass, so searched for the least squared error alone ({UNWEIGHTED}): "
            f"{counted(len(abroad), 'weight')}, such as {such}"
        )


def said(settings: Settings, samples: Samples, device: str) -> dict[str, Any]:
    """Return what journal and report say of how matrices are solved, and by what: two runs with equal words are one.

    Args:
        settings: how.
        samples: by what.
        device: the kind of device that layers compute on; another one gives other last bits.
    """
    return {
        "asked": SOLVED,
        "scales": settings.scales,
        "damping": settings.damping,
        "propagate": settings.propagate,
        "data": {
            name: {"documents": len(part.hashes), "tokens": part.count, "digest": part.digest}
            for name, part in samples.parts.items()
        },
        "samples": samples.wanted,
        "length": samples.train.tokens.shape[1],
        "reasoning": samples.reasoning,
        "device": device,
    }
