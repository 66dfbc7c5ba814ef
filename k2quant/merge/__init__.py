"""Merge a LoRA adapter that PEFT wrote into a checkpoint of any format, and write it in any format.

The base streams through the converter, and the adapter is read piece by piece beside it: memory grows with neither.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.panels import ROW_STEP
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.conversion.convert import Conversion, carry_out, chosen, codecs_of
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.conversion.recipes.rules import Recipes
from k2quant.conversion.resume import refuse_nested
from k2quant.conversion.searching.asked import searched
from k2quant.errors import DtypeMismatch
from k2quant.formats.format import Layout, Scope
from k2quant.formats.known import FormatName
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import brief
from k2quant.kernels.codecs.grids import Grid
from k2quant.merge.adapter import Adapter, check_values, open_adapter
from k2quant.merge.targets import Change, LowRank, Whole, resolve

if TYPE_CHECKING:
    from k2quant.conversion.searching.searched import Searched
    from k2quant.conversion.searching.surveys import Substitute

__all__ = ["MergePlan", "make_merge_plan", "merge"]

_BYTES_PER_VALUE = 64
"""Of a band of float64 arrays in work: sum, update, effect and what is computed from them."""


class MergePlan(NamedTuple):
    """What a merge will write, and what it changes on the way."""

    plan: Plan
    adapter: Adapter
    changes: dict[str, Change]
    """By the name of the main tensor of each weight."""
    rounder: Searched | None = None
    """Who searches scales of weights that stay as they were, where `Format.searched_from` asks for it."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def substitute(self) -> Substitute:
        """Return where the merged values come from."""
        from k2quant.merge.update import Merger

        return Merger(self.plan, self.adapter, self.changes, codecs_of("cpu"))

    def peak_memory(self, workers: int) -> int:
        """Return an upper estimate of the resident memory in bytes; it grows with neither model nor adapter."""
        widest = max((job.weight.shape[-1] for job in self._changed() if job.weight.shape), default=0)
        rank = max((change.rank for change in self.changes.values() if isinstance(change, LowRank)), default=0)
        band = _BYTES_PER_VALUE * ROW_STEP * widest + 8 * rank * (widest + ROW_STEP)
        return self.plan.peak_memory(workers) + workers * band + 2_000 * len(self.adapter.shard.tensors)

    def _changed(self) -> list[Job]:
        return [job for job in self.plan.jobs() if job.weight.main.name in self.changes]


@hinting({"overwrite": "to throw away what an earlier run left is `restart=True`", "format": "it is `to`"})
@barred("merge")
def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: FormatName | None = None,
    *,
    recipe: Recipes | None = None,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None = None,
    layout: Layout | None = None,
    shard_size: int | None = None,
    allow_split: bool = False,
    workers: int | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    sha256: bool = False,
    progress: Asked = None,
) -> Conversion:
    """Merge a PEFT LoRA adapter into a checkpoint and write the whole of it in a format.

    A weight that the adapter updates becomes bf16(W0 + scaling * B @ A), W0 being the base's weight as BF16, summed in
    float64 and rounded once; then it is stored as `k2quant.convert` stores a BF16 weight. All others are converted or
    copied as by `k2quant.convert`. The same call after a kill resumes; on a finished destination it does nothing.

    Args:
        base: folder of the checkpoint that the adapter was trained on, in any of the formats, mixed too.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        destination: folder to write; empty, new, or of an earlier run of the same call.
        to: `bf16`, `fp8`, `int4`, `nvfp4` or `mxfp4`.
        recipe: in its place, rules for classes and patterns; as in `convert`.
        scope: as in `convert`, like the others.
        ignore: regular expressions of weights that stay out of scope.
        grid: INT4 rounding rule.
        layout: whose names and config FP8 or NVFP4 is written with.
        shard_size: largest output shard in bytes.
        allow_split: write what engines fuse in several formats too.
        workers: threads.
        follow_links: whether links in the base may lead out of it.
        restart: throw away what an earlier run left.
        soft_lock: lock by a file where there is no other way.
        sha256: note digests of the files.
        progress: called as the work goes on; True for a bar.

    Returns:
        the destination with its report, in which the figures of each updated tensor also say what rounding left of
        the update; see `k2quant.merge.figures.MergeFigures`.

    Raises:
        CheckpointError: base or adapter cannot be read, or the adapter does not fit, or is none that can be merged.
        OutputError: the destination is not ours, in use, or the disk failed; the same call resumes.
        UsageError: the options make no sense.
    """
    here, there, update = spot(base), spot(destination), Path(adapter)
    refuse_nested(here, there)
    refuse_nested(update, there)
    options = chosen(
        recipe,
        to=to,
        scope=scope,
        ignore=ignore,
        grid=grid,
        shard_size=shard_size,
        layout=layout,
        allow_split=allow_split,
    )
    prepared = make_merge_plan(here, update, options, follow_links=follow_links)
    return carry_out(
        prepared.plan,
        there,
        workers=workers,
        restart=restart,
        soft_lock=soft_lock,
        sha256=sha256,
        substitute=prepared.substitute(),
        rounder=prepared.rounder,
        progress=told(progress),
    )


def make_merge_plan(base: Path | Address, adapter: Path, options: Options, *, follow_links: bool = False) -> MergePlan:
    """Plan a merge. The adapter is read once, for its digest and for NaN; of the base, headers alone.

    Raises:
        CheckpointError: base or adapter cannot be read, or the adapter does not fit, or is none that can be merged.
        UsageError: the options make no sense.
    """
    update = open_adapter(adapter, follow_links=follow_links)
    plan = make_plan(open_checkpoint(base, follow_links=follow_links), options, substituted=True)
    changes = resolve(update, (job.weight for job in plan.jobs()))
    for job in plan.jobs():
        _check_writable(job, changes.get(job.weight.main.name))
    check_values(update)
    plan, rounder = searched(plan, None, but=changes)
    return MergePlan(replace(plan, values=_values(update, changes)), update, changes, rounder)


def _check_writable(job: Job, change: Change | None) -> None:
    """Refuse a change of a tensor that stays in a dtype which would round a second time."""
    if change is None or job.target is not None:
        return
    stored, main = job.weight.format, job.weight.main
    dtype = stored.unwritable if stored is not None else main.dtype
    takes: set[str | None] = {None}
    if isinstance(change, Whole) and (stored is None or not stored.quantised):
        takes |= {"BF16", "F32", change.entry.dtype}
    if dtype not in takes:
        raise DtypeMismatch(
            "would stay in this dtype, in which merged values are not written",
            tensor=main.name,
            file=main.file,
            expected="BF16",
            found=dtype,
            remedy="merge with `to=bf16`, then convert",
        )


def _values(adapter: Adapter, changes: dict[str, Change]) -> dict[str, Any]:
    """Return what the merged values depend on, beside the base: it must be equal for a run to be resumed."""
    settings = adapter.settings
    whole = sum(isinstance(change, Whole) for change in changes.values())
    return {
        "adapter": {
            "name": adapter.folder.resolve().name,
            "sha256": adapter.digests(),
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "use_rslora": settings.rank_stabilised,
            "updated": len(changes) - whole,
            "replaced": whole,
        }
    }
