"""Convert a checkpoint: plan, destination, stream of shards, then what makes the folder usable.

The order on disk is the promise: shards first, each whole before it has its name, then other files, the report, the
index, and config.json last. Until then the folder says that it is incomplete, and the same call resumes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.panels import naming, read_whole
from k2quant.checkpoint.reader import INCOMPLETE, REPORT, Checkpoint
from k2quant.checkpoint.reading import check_constants
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.writing.opening import locked
from k2quant.conversion.finishing.completing import complete
from k2quant.conversion.finishing.report import fetched, report_of
from k2quant.conversion.places import pinned
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Options, Plan, options_of
from k2quant.conversion.recipes.rules import Recipes, read_recipe
from k2quant.conversion.resume import (
    begin,
    check_finished,
    clear,
    finished_shards,
    refuse_nested,
    to_be_cleared,
)
from k2quant.conversion.searching.asked import planned
from k2quant.conversion.searching.folding import check_halves
from k2quant.conversion.searching.surveys import Substitute, check_shared
from k2quant.conversion.spreading.order import order
from k2quant.conversion.spreading.part import Part, beside_cluster, part_of, share
from k2quant.conversion.stream import Progress, Rounder, Stream
from k2quant.errors import OutputError, UsageError
from k2quant.formats.activations import ActivationScales, KvCache
from k2quant.formats.format import Layout, Method, Scope
from k2quant.formats.known import FormatName
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import counted, duration, size
from k2quant.kernels.codecs.grids import Grid

if TYPE_CHECKING:
    from k2quant.conversion.spreading.cluster import Spread
    from k2quant.kernels.codecs.seam import Codecs

_log = logging.getLogger(__name__)


_HINTS = {
    "format": "the format to write is `to`",
    "dtype": "the format to write is `to`, such as to='bf16'",
    "output_dtype": "the format to write is `to`",
    "quantization_config": "which weights get which format is `to` with `scope` and `ignore`, or `recipe`",
    "config": "a file of rules is `recipe`",
    "output": "the folder to write is the second argument, `destination`",
    "overwrite": "to throw away what an earlier run left is `restart=True`",
    "max_shard_size": "it is `shard_size` here, in bytes",
    "targets": "which weights get the format is `scope`, or a `recipe` of rules",
    "data": "text goes through the model in `k2quant.calib.solve`, which is `gptq`, or in `k2quant.calib.calibrate`",
    "dry_run": "that is an option of the command line; from Python, `k2quant.conversion.plan.make_plan` writes nothing",
}
"""What other libraries have."""


class Conversion(NamedTuple):
    """What a conversion came to."""

    spot: Path | Address
    """The folder or address that it was written to."""
    report: dict[str, Any]
    """The content of k2quant_report.json."""
    resumed: int
    """Shards that an earlier, interrupted run had finished."""
    already_done: bool
    """Whether the destination was finished before, so that nothing was written."""
    missing: tuple[str, ...] = ()
    """Shards that other parts have still to write. As long as there are any, `report` is empty."""
    shards: int = 0
    """All shards of the output, where some are missing."""

    @property
    def still_to_come(self) -> str:
        """What other parts have still to write, such as `5 of 61 shards`."""
        return f"{len(self.missing)} of {counted(self.shards, 'shard')}"

    @property
    def folder(self) -> Path:
        """The folder that it was written to.

        Raises:
            UsageError: it was written to an address, which is `spot`.
        """
        if isinstance(self.spot, Address):
            raise UsageError(f"{self.spot} is no folder; where a conversion was written to is `spot`")
        return self.spot

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        report = self.report
        if self.missing:
            return {"folder": str(self.spot), "still_to_come": self.still_to_come}
        sizes = {name: size(report[key]) for name, key in (("read", "bytes_read"), ("written", "bytes_written"))}
        seconds = {} if self.already_done else {"time": duration(report["seconds"])}
        counts = {"tensors": len(report["tensors"]), "remarks": len(report.get("remarks", []))}
        done = {"resumed": self.resumed, "already_done": self.already_done}
        return {"folder": str(self.spot), "to": report["options"]["to"], **sizes, **seconds, **counts, **done}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


@hinting(_HINTS)
@barred("convert")
def convert(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    to: FormatName | None = None,
    *,
    recipe: Recipes | None = None,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None = None,
    layout: Layout | None = None,
    method: Method | None = None,
    stats: str | os.PathLike[str] | None = None,
    activation_scales: str | os.PathLike[str] | None = None,
    kv_cache: KvCache | None = None,
    allow_rounding: bool = False,
    shard_size: int | None = None,
    allow_split: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    cluster: str | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    sha256: bool = False,
    part: str | None = None,
    low_disk: bool = False,
    progress: Asked = None,
) -> Conversion:
    """Convert a checkpoint to BF16, block-FP8, INT4, NVFP4 or MXFP4.

    The same call after a kill resumes; on a finished destination it does nothing.

    Args:
        source: folder of the checkpoint, in any of the formats, mixed too, or its address: `hf://org/name@revision`,
            `s3://bucket/prefix`; see docs/places.md. Where the address of a model on a hub names no revision, a
            destination that was begun goes on with the commit that it was begun with.
        destination: folder to write; empty, new, or of an earlier run of the same call.
        to: `bf16`, `fp8`, `int4`, `nvfp4` or `mxfp4`.
        recipe: in place of `to`, `scope`, `ignore`, `grid`, `layout` and `method`, rules for classes and patterns: a
            YAML or JSON file, what such a file holds, or another conversion's folder, to convert as that was; see
            docs/recipes.md.
        scope: `experts` (default for int4, nvfp4 and mxfp4), `linear` (default for fp8; of the others it leaves out
            `kv_b_proj`, which MLA engines do not run so) or `projections` (all of them).
        ignore: regular expressions; a weight in whose name, without its `.weight`, one is found stays out of scope.
        grid: INT4 rounding rule, `moonshot` (default) or `compressed-tensors`.
        layout: whose names and config FP8 is written with, `deepseek` (default) or `compressed-tensors`, and NVFP4,
            `modelopt` (default) or `compressed-tensors`.
        method: how scales of 4-bit formats are chosen: `rtn`, rounding to nearest; `mse`, the least squared error among
            some scales for each group; `imatrix`, the least error of the outputs, by means and mean squares of the
            inputs that a calibration saw; `awq`, the same after a fold, for INT4. `gptq`, for INT4 too, runs the model,
            which `k2quant.calib.solve` does. The default is `rtn`, but `mse` for what is INT4 in the source and becomes
            NVFP4 or MXFP4. What has the format already is copied.
        stats: folder that `k2quant calibrate` wrote for this source; `imatrix` and `awq` need it, and with it the
            better of searched and plain scales is taken for each matrix, by data that was held out.
        activation_scales: scales of the layers' inputs beside NVFP4 weights, which engines that compute in FP4 need:
            a folder that `k2quant calibrate` wrote for this source, whose largest inputs they are taken from, or
            `one` for 1.0 everywhere. None: weights only, as the config then says.
        kv_cache: `fp8` asks engines, in the config, to keep keys and values in FP8, without scales: they take 1.0.
        allow_rounding: where scales of MXFP4 lie too far apart for NVFP4, round what is too small, and count it.
        shard_size: largest output shard in bytes; None keeps the source's shards.
        allow_split: write what engines fuse (experts of a layer, gate and up, q_a and kv_a) in several formats too.
        workers: threads; None takes one for each core that this process may use.
        device: where the arithmetic runs, `cpu` or `cuda`.
        cluster: spread the shards over a Ray cluster: `auto`, the one that this machine is part of or that RAY_ADDRESS
            names, or `ray://HOST:PORT`. All its machines must see source and destination by the names given here, and
            have this release. `workers` are threads of each machine; with `cuda`, each GPU has a worker.
        follow_links: read files that links in the source lead to, wherever they lie; only for a folder of your own,
            for whoever made its links chooses which files are read, and copied along.
        restart: throw away what an earlier run of other options or another source left in the destination.
        soft_lock: where the destination's file system has no locks, lock it by a file. What a killed run leaves of it
            is removed by the next one on the same machine; where another finds it, it must be deleted by hand.
        sha256: also note a sha256 of each file, as hubs list them.
        part: `K/N`, such as `2/8`: write the K-th of N shares of the shards alone, beside other processes, on whatever
            machines see source and destination, that write the others. Whoever finds all shards there completes the
            destination. With `restart`, what an earlier run of the very same call left is not thrown away: it may be
            another part's work.
        low_disk: of a source at an address, keep at most two shards on the disk at a time, where they come to lie there
            at all: what reads each weight once, as `rtn` does, has them in memory alone.
        progress: called as the work goes on, with the bytes read and all bytes; True for a bar.

    Returns:
        the destination with its report.

    Raises:
        CheckpointError: the source cannot be converted; nothing that looks finished was written.
        ClusterError: the cluster is not there, was lost, or its machines do not fit; the same call resumes.
        OutputError: the destination is not ours, in use, or the disk failed; the same call resumes.
        UsageError: the options make no sense.
    """
    begun, there = spot(source), spot(destination)
    refuse_nested(begun, there)
    own = None if part is None else part_of(part)
    here, said = pinned(begun, there, restart=restart)
    if said:
        _log.info("%s", said)
    if cluster is not None:
        from k2quant.conversion.spreading.cluster import check_cluster  # loads what starts processes

        check_cluster(cluster)
        if own is not None:
            raise beside_cluster()
    options = chosen(
        recipe,
        to=to,
        scope=scope,
        ignore=ignore,
        grid=grid,
        shard_size=shard_size,
        layout=layout,
        allow_split=allow_split,
        method=method,
        activation_scales=source_of(activation_scales),
        kv_cache=kv_cache,
        allow_rounding=allow_rounding,
    )
    plan, rounder = planned(here, options, stats, activation_scales, follow_links=follow_links)
    spread = None
    if cluster is not None:
        from k2quant.conversion.spreading.cluster import Spread

        others: dict[str, Any] = {"stats": stats, "activation_scales": activation_scales, "follow_links": follow_links}
        asked = order(plan, plan.source.place, there, device=device, sha256=sha256, low_disk=low_disk, **others)
        spread = Spread(cluster, asked, plan, workers=workers)
    return carry_out(
        plan,
        there,
        workers=workers,
        device=device,
        restart=restart,
        soft_lock=soft_lock,
        sha256=sha256,
        part=own,
        low_disk=low_disk,
        rounder=rounder,
        spread=spread,
        progress=told(progress),
    )


def source_of(activation_scales: str | os.PathLike[str] | None) -> ActivationScales | None:
    """Return where activation scales come from, by what `convert` takes for them; a folder `./one` is a folder.

    Raises:
        UsageError: they are neither a folder nor `one`.
    """
    if not isinstance(activation_scales, str | os.PathLike | None):
        found = f"activation_scales is {activation_scales!r}"
        raise UsageError(f"{found}; expected a folder that `k2quant calibrate` wrote, or 'one', which stands for 1.0")
    return None if activation_scales is None else "one" if activation_scales == "one" else "stats"


def carry_out(
    plan: Plan,
    there: Path | Address,
    *,
    workers: int | None = None,
    device: str = "cpu",
    restart: bool = False,
    soft_lock: bool = False,
    sha256: bool = False,
    low_disk: bool = False,
    substitute: Substitute | None = None,
    rounder: Rounder | None = None,
    check: Callable[[Path], None] | None = None,
    part: Part | None = None,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write what a plan says; see `convert`.

    Args:
        plan: what to write.
        there: folder or address to write it to.
        workers: as in `convert`, like the others.
        device: where the converter's arithmetic runs.
        restart: throw away what an earlier run left.
        soft_lock: lock by a file where there is no other way.
        sha256: note digests.
        low_disk: keep at most two shards of a source at an address on the disk.
        substitute: whose values take the place of the source's; `plan.values` says which these are.
        rounder: who rounds better than the formats' own rules; `plan.method` says how.
        check: is given the folder, which no address is, when all shards stand there and nothing yet makes it look
            finished; what it raises leaves it so.
        part: which share of the shards to write, beside others who write theirs; None: all of them.
        spread: who has other machines write the shards, if anybody.
        progress: called as the work goes on.
    """
    begun = time.monotonic()
    if check is not None:
        _as_folder(there)
    check_shared(plan, substitute)
    threads, arithmetic = checked_workers(workers), codecs_of(device if spread is None else "cpu")
    own = None if part is None else frozenset(share(plan, part))
    locking: dict[str, Any] = {"restart": restart, "soft": soft_lock, "share": "" if part is None else part.name}
    try:
        with locked(there, report=REPORT, incomplete=INCOMPLETE, **locking) as folder:
            with folder.alone():
                fresh = restart and (part is None or to_be_cleared(folder, plan))
                if not fresh and (report := folder.finished_report()) is not None:
                    check_finished(folder, report, plan)
                    return Conversion(there, report, 0, already_done=True)
                jobs = [job for shard in plan.shards if own is None or shard.file in own for job in shard.jobs]
                check_constants(plan.source, (job.weight for job in jobs))
                _check_relabels(plan.source, jobs, substitute)
                if fresh:
                    folder.refuse_others()
                    clear(folder)
                done = begin(folder, plan, fresh=fresh, shared=part is not None)
            whole = counted(len(plan.shards), "shard")
            _log.info("%s: %s, %d of them there already; %s", there, whole, len(done), counted(threads, "thread"))
            if spread is not None:
                folder.spread()
                written = spread.write(done, folder, progress)
            else:
                stream = Stream(
                    plan,
                    folder,
                    done=set(done),
                    only=own,
                    codecs=arithmetic,
                    sha256=sha256,
                    progress=progress,
                    substitute=substitute,
                    rounder=rounder,
                    low_disk=low_disk,
                    records=done.values(),
                )
                written = stream.run(threads)
            with folder.alone():
                before = len(done if own is None else own & done.keys())
                if part is not None and (report := folder.finished_report()) is not None:  # another was the last
                    return Conversion(there, report, before, already_done=False)
                shards = done | written if part is None else finished_shards(folder, plan)
                if missing := tuple(shard.file for shard in plan.shards if shard.file not in shards):
                    return Conversion(there, {}, before, already_done=False, missing=missing, shards=len(plan.shards))
                check_halves(shards.values(), folder.spot)
                if check is not None:
                    check(_as_folder(there))
                more = {} if rounder is None else rounder.summary()
                more = {**more, **fetched(plan.source, shards.values())}
                seconds, others = time.monotonic() - begun, len(shards) - len(written)
                report = report_of(plan, shards, seconds=seconds, resumed=others, more=more)
                folder.sweep(shards)
                complete(folder, plan, report, sha256=sha256)
                folder.finish()
                return Conversion(there, report, before, already_done=False)
    except OSError as error:
        raise OutputError(
            "cannot be written",
            file=error.filename or there,
            found=error.strerror or str(error),
            remedy="when that is mended, run the same command again: it resumes",
        ) from error


def _as_folder(there: Path | Address) -> Path:
    if isinstance(there, Address):
        raise UsageError(f"{there} is no folder, and what is written here is read again before it is finished")
    return there


def chosen(recipe: Recipes | None, **options: Any) -> Options:
    """Return what was asked for, in arguments or by a recipe.

    Raises:
        UsageError: it makes no sense, or both say one thing.
    """
    return Options(**options) if recipe is None else options_of(read_recipe(recipe), **options)


def codecs_of(device: str) -> Codecs:
    """Return the arithmetic of a device.

    Raises:
        UsageError: there is no such device here.
    """
    from k2quant.kernels.codecs.choice import codecs

    return codecs(device)


def _check_relabels(source: Checkpoint, jobs: Iterable[Job], substitute: Substitute | None) -> None:
    """Refuse at once, by a few bytes of each weight, what would be refused when its panel comes, hours later.

    Raises:
        BadValue: a number that cannot be said in the other layout.
    """
    for job in jobs:
        weight, stored = job.weight, job.weight.format
        if stored is None or job.target is None or not (stored.whole and stored.relabels(job.target)):
            continue
        if substitute is None or not substitute.replaces(weight):
            with naming(weight, 0):
                stored.check_relabel(read_whole(source, weight), job.target)
