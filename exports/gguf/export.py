"""Export a checkpoint to GGUF: plan, folder beside the output, stream of weights, names."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.reader import INCOMPLETE, REPORT, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.writing.destination import Destination
from k2quant.checkpoint.writing.target import Room
from k2quant.conversion.places import pinned
from k2quant.conversion.resume import refuse_nested
from k2quant.conversion.stream import Progress, Record
from k2quant.errors import UsageError
from k2quant.exports.exporting import check_room, disk_errors, facts_of, fill, report_of
from k2quant.exports.gguf.files import check_name
from k2quant.exports.gguf.plan import GgufPlan, make_gguf_plan
from k2quant.exports.gguf.types import GgufOptions
from k2quant.exports.gguf.writing import Output, check_finished, finished, locked, room_of, tidy, work_folder
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief

_HINTS = {
    "output": "the file to write is the second argument, `destination`",
    "outtype": "what has no codes of GGUF's is `rest` and `experts`",
    "to": "the type of each tensor follows from its codes; what has none is `rest` and `experts`",
    "shard_size": "it is `split_size` here, in bytes",
    "overwrite": "to throw away what an earlier run left is `restart=True`",
}
"""What other commands and tools have."""


class GgufExport(NamedTuple):
    """What an export to GGUF came to."""

    files: tuple[Path, ...]
    """The files, that which is loaded first."""
    report: dict[str, Any]
    """The content of the report beside them."""
    resumed: int
    """Parts that an earlier, interrupted run had finished."""
    already_done: bool
    """Whether the output was finished before, so that nothing was written."""

    @property
    def file(self) -> Path:
        """The file that llama.cpp is given."""
        return self.files[0]

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        done = facts_of(self.report, resumed=self.resumed, already_done=self.already_done, files=len(self.files))
        return {"file": str(self.file), **done}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


@hinting(_HINTS)
@barred("export")
def export_gguf(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    rest: str | None = None,
    experts: str | None = None,
    fallback: str | None = None,
    split_size: int | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    progress: Asked = None,
) -> GgufExport:
    """Write a checkpoint as GGUF, for llama.cpp. Codes of INT4, MXFP4 and NVFP4 go over as they are.

    The same call after a kill resumes; on a finished output it does nothing.

    Args:
        source: folder of the checkpoint, in any of the formats, mixed too, or its address, see `k2quant.convert`.
        destination: file to write, which ends in `.gguf`.
        rest: type of all that is no routed expert and has no codes of GGUF's, norms and routers aside, which are
            float32: `bf16` (default), `f32` or `q8_0`.
        experts: type of routed experts in a format of which GGUF has no codes, such as FP8: `bf16` (default) or `q8_0`.
        fallback: type of a tensor whose codes cannot be kept, for a scale of it is no value of FP16, or its experts
            have several formats: `q8_0` or `bf16`. None: such a tensor is refused.
        split_size: most bytes of tensors in a file; there are then several, of which llama.cpp is given the first.
            None: one file.
        workers: threads; None takes one for each core that this process may use.
        follow_links: read files that links in the source lead to, wherever they lie.
        restart: throw away what an earlier run of other options or another source left.
        soft_lock: where the file system has no locks, lock by a file.
        low_disk: of a source at an address, keep at most two shards on the disk at a time.
        progress: called as the work goes on, with the bytes read and all bytes; True for a bar.

    Returns:
        the files with their report.

    Raises:
        CheckpointError: the source cannot be exported; nothing that looks finished was written.
        OutputError: the output is not ours, in use, or the disk failed; the same call resumes.
        UsageError: the options make no sense.
    """
    there = checked_destination(destination)
    begun = spot(source)
    refuse_nested(begun, there)
    options = options_of(rest=rest, experts=experts, fallback=fallback, split_size=split_size)
    here, remark = pinned(begun, work_folder(there), restart=restart)
    plan = make_gguf_plan(open_checkpoint(here, follow_links=follow_links), there.name, options, workers=workers)
    return carry_out(
        plan.remarked(remark),
        there,
        workers=workers,
        restart=restart,
        soft_lock=soft_lock,
        low_disk=low_disk,
        progress=told(progress),
    )


def look_ahead_gguf(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    restart: bool = False,
    workers: int | None = None,
    follow_links: bool = False,
    **options: Any,
) -> tuple[GgufPlan, dict[str, Record], Room]:
    """Return what an export would write, what of it stands, and what the disk must have free; write nothing.

    Args:
        source: as in `export_gguf`, as the others are.
        destination: the file.
        restart: whether what stands there would be thrown away.
        workers: threads that look at scales.
        follow_links: whether links of the source may lead out of it.
        options: `rest`, `experts`, `fallback` and `split_size`.

    Raises:
        CheckpointError: the source cannot be exported.
        OutputError: the output would be refused.
        UsageError: the options make no sense.
    """
    there = checked_destination(destination)
    begun = spot(source)
    refuse_nested(begun, there)
    here, remark = pinned(begun, work_folder(there), restart=restart)
    opened = open_checkpoint(here, follow_links=follow_links)
    plan = make_gguf_plan(opened, there.name, options_of(**options), workers=workers).remarked(remark)
    work = work_folder(there)
    if not restart and (report := finished(there)) is not None:
        check_finished(there, report, plan)
        return plan, {name: {} for name in plan.sections}, room_of(there, 0)
    if not work.is_dir():
        return plan, {}, room_of(there, plan.size)
    output = Output(plan, Destination(work, report=REPORT, incomplete=INCOMPLETE), there)
    done = {} if restart else output.standing()
    return plan, done, output.space()


def checked_destination(destination: str | os.PathLike[str] | Address) -> Path:
    """Return the path of an output.

    Raises:
        UsageError: it is an address, or no name of a GGUF file.
    """
    there = spot(destination)
    if isinstance(there, Address):
        raise UsageError(f"{there} is no file: write GGUF to a folder of this machine first, then upload it")
    check_name(there.name)
    return there


def options_of(**said: Any) -> GgufOptions:
    """Return what was asked for; what was not said is as its default is.

    Raises:
        UsageError: it makes no sense.
    """
    return GgufOptions(**{name: value for name, value in said.items() if value is not None})


def carry_out(
    plan: GgufPlan,
    there: Path,
    *,
    workers: int | None = None,
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> GgufExport:
    """Write what a plan says; see `export_gguf`."""
    begun = time.monotonic()
    files = tuple(there.with_name(file.name) for file in plan.files)
    with disk_errors(there):
        if not restart and (report := finished(there)) is not None:
            check_finished(there, report, plan)
            tidy(there)
            return GgufExport(files, report, 0, already_done=True)
        with locked(there, restart=restart, soft=soft_lock) as folder:
            output = Output(plan, folder, there)
            output.refuse_others(restart=restart)
            if restart:
                output.clear()
            done = {} if restart else output.standing()
            check_room(output.space())
            records = fill(
                plan.export, folder, output, done=done, workers=workers, low_disk=low_disk, progress=progress
            )
            own = {
                "resumed_parts": len(done),
                "types": [row._asdict() for row in plan.rows],
                "fallback": dict(plan.fallback),
                "starting": dict(plan.starting),
                "files": {file.name: {"size": file.size} for file in plan.files},
            }
            report = report_of(plan.export, records, written=plan.size, begun=begun, own=own)
            output.finish(report)
    return GgufExport(files, report, len(done), already_done=False)
