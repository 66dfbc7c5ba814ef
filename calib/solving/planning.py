"""`--dry-run` of `convert --method gptq`: what it will take, by headers, the config, and two seconds of measuring."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2quant.calib.coverage import THIN
from k2quant.calib.inputs.choosing import check_rows, held_out_rows
from k2quant.calib.operations import Counts, Work, measured, solved
from k2quant.calib.planning import longest
from k2quant.calib.solving.memory import Needs, needs
from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.files.paths import nearest_folder
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.estimate import read_rate
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.ground import names
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import counted, duration, enough, parse_size, size


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvingPlan:
    """What solving will take, of data that has as many tokens as are asked for."""

    matrices: int
    """That are solved."""
    hessians: int
    """Inputs that they have: gate and up share one."""
    tokens: int
    """That Hessians are summed over."""
    judging: int
    """That judge."""
    experts: int
    """Routed experts of a layer."""
    mean: float
    """Tokens that an expert sees in the mean."""
    thin: float
    """Tokens of an expert with `THIN` of the mean."""
    hidden: int
    """Columns of what an expert's gate and up multiply."""
    inner: int
    """Columns of what its down multiplies."""
    passes: Needs
    """What memory and disk the pass itself takes."""
    spool: int
    """Bytes of solved matrices that wait for their shard: those of two layers."""
    output: int
    """Bytes of the output."""
    disk_free: int
    """Bytes, where the output will lie."""
    bytes_moved: int
    """Read from and written to the disk in all."""
    reading: float
    """Bytes of the checkpoint a second, as just measured on its beginning."""
    work: Work
    """Of the whole run."""
    rates: Work
    """Of a second, with all workers, as just measured."""

    @property
    def seconds(self) -> float:
        """How long it will take, about."""
        return sum(self.parts().values())

    @property
    def beside(self) -> int:
        """Bytes on the disk beside the output until it is finished: the pass's files, and the spool."""
        return self.passes.disk + self.spool

    @property
    def disk_needed(self) -> int:
        """Bytes that must be free where nothing of the output stands yet."""
        return self.output + self.beside

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.disk_needed <= self.disk_free

    def parts(self) -> dict[str, float]:
        """Return the seconds of each kind of work."""
        computed = {name: work / rate for name, work, rate in zip(Work._fields, self.work, self.rates, strict=True)}
        return computed | {"disk": self.bytes_moved / self.reading}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        said = asdict(self) | {"work": self.work._asdict(), "rates": self.rates._asdict()}
        disk = {"beside": self.beside, "disk_needed": self.disk_needed, "fits": self.fits}
        return said | disk | {"seconds": self.seconds, "parts": self.parts()}

    def lines(self) -> dict[str, str]:
        """Return it as people read it, by what stands before each line."""
        short, passes = "" if self.fits else ", TOO SMALL", self.passes
        tokens = f"{size(passes.in_files)} of it in files" if passes.in_files else "is kept in memory"
        parts = sorted(self.parts().items(), key=lambda pair: -pair[1])
        largest = ", ".join(
            f"{_SPOKEN[name]} {duration(seconds)}" for name, seconds in parts if seconds >= _TOLD * self.seconds
        )
        return {
            "tokens": f"{self.tokens:,} to solve by, {self.judging:,} that judge, if the data has as many",
            "an expert": f"sees {self.mean:,.0f} tokens in the mean, and one with {self.thin / self.mean:.0%} of the "
            f"mean {self.thin:,.0f}; its inputs have {self.hidden:,} columns, {self.inner:,} of down_proj",
            "solved": f"{counted(self.matrices, 'matrix', 'matrices')} by {counted(self.hessians, 'Hessian')}, "
            f"{counted(passes.workers, 'expert')} at a time",
            "hidden states": f"{size(passes.hidden)}, on the disk twice while it runs; what a layer keeps of its "
            f"tokens, {size(passes.arrays)}, {tokens}",
            "disk needed": f"{size(self.disk_needed)}: {size(self.output)} for the output, {size(self.beside)} more "
            f"until it is finished{short}",
            "disk free": size(self.disk_free),
            "memory": f"at most {size(passes.memory)}; {enough(passes.least)} is the least that works",
            "time": f"about {duration(self.seconds)} here: {largest}; rates were measured just now on small matrices "
            "and are scaled by operations",
        }

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


_TOLD = 0.01  # of the time: what takes less is not told apart
_SPOKEN = {
    "model": "the model",
    "hessians": "Hessians",
    "factors": "their factors",
    "sweeps": "rounding columns",
    "search": "searching scales",
    "judging": "judging",
    "disk": "the disk",
}


def plan_solving(
    plan: Plan,
    destination: Path,
    *,
    samples: int = 512,
    length: int = 2048,
    memory: int | str = "32GB",
    workers: int | None = None,
    device: str = "cpu",
    scales: str = "imatrix",
    propagate: bool = True,
) -> SolvingPlan:
    """Plan a conversion whose weights are solved; headers, the config and the beginning of a shard are read.

    Args:
        plan: of the conversion, with `method` gptq.
        destination: folder that would be written.
        samples: rows that Hessians are summed over.
        length: tokens of a row.
        memory: bytes, or a size such as `32GB`, that the pass may take.
        workers: threads, an expert each; None takes one for each core.
        device: where layers compute.
        scales: how those are chosen that a matrix is solved with.
        propagate: whether a layer sees what quantised layers give.

    Raises:
        UsageError: an option makes no sense, or `memory` is too small.
        CheckpointError: the checkpoint is no model.
    """
    source = plan.source
    model = Model.of(source.config, file=source.folder / "config.json")
    check_rows(samples, length, longest=longest(source))
    rows = samples, held_out_rows(samples)
    tokens, judging = (count * length for count in rows)
    jobs = list(solved(plan, model))
    weights = [job.weight for job in plan.jobs()]
    limit = parse_size(memory) if isinstance(memory, str) else memory
    bases = {base for job in jobs if (base := base_of(job.weight)) is not None}
    passes = needs(source, rows=rows, length=length, bases=bases, memory=limit, workers=workers)
    counts = Counts(model, jobs, tokens, judging, length)
    mean = tokens * model.top_k / model.experts
    read = sum(weight.nbytes for weight in weights if _used(weight, model))
    return SolvingPlan(
        matrices=len(jobs),
        hessians=len(counts.inputs),
        tokens=tokens,
        judging=judging,
        experts=model.experts,
        mean=mean,
        thin=mean * THIN,
        hidden=model.hidden,
        inner=model.inner,
        passes=passes,
        spool=_spool(jobs),
        output=plan.bytes_written,
        disk_free=shutil.disk_usage(nearest_folder(destination)).free,
        bytes_moved=read + plan.bytes_written + _moved(model, passes, jobs),
        reading=read_rate(source),
        work=counts.work(weights, searched=scales != "rtn", propagate=propagate),
        rates=measured(model, device, passes.workers, next((job.target for job in jobs), None)),
    )


def _used(weight: StoredWeight, model: Model) -> bool:
    base = base_of(weight)
    layer = None if base is None else names.layer(base)
    return base is not None and (layer is None or layer < model.layers)


def _moved(model: Model, passes: Needs, jobs: Iterable[Job]) -> int:
    """Return the bytes that are written and read again in all: states and tokens of each layer, and the spool."""
    solved = sum(entry.nbytes for job in jobs for entry in job.outputs.values())
    tokens = passes.in_files
    return 2 * (solved + model.layers * (passes.hidden + tokens))


def _spool(jobs: Iterable[Job]) -> int:
    """Return the bytes of the two layers whose solved matrices have the most."""
    layers: dict[int | None, int] = {}
    for job in jobs:
        layer = names.layer(job.name)
        layers[layer] = layers.get(layer, 0) + sum(entry.nbytes for entry in job.outputs.values())
    return sum(sorted(layers.values())[-2:])
