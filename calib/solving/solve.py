"""`solve`: from a checkpoint and data to INT4 whose codes are chosen column by column, in one pass.

Rows of the data go through the model a layer at a time. What a layer was solved to is on the disk before the next layer
sees what it gives, and a shard is written as soon as all its layers are solved. All else is a conversion: its plan,
journal, checks and report.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from k2quant.calib.inputs import Reasoning, Samples, read_samples
from k2quant.calib.inputs.choosing import check_rows
from k2quant.calib.solving.memory import needs
from k2quant.calib.solving.passing import Pass
from k2quant.calib.solving.settings import Scales, Settings
from k2quant.calib.solving.writing.planned import SolvedPlan, plan_solved, said
from k2quant.calib.solving.writing.rounder import Solving
from k2quant.calib.solving.writing.spool import Spool
from k2quant.checkpoint.reader import INCOMPLETE, REPORT, Checkpoint, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.writing.destination import Destination
from k2quant.conversion.convert import Conversion, carry_out, chosen
from k2quant.conversion.resume import refuse_nested
from k2quant.conversion.searching.fitting import SOLVED
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.meter import TOKENS
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import parse_size
from k2quant.model.architecture import architecture
from k2quant.model.generation import load_tokenizer
from k2quant.model.placement import execution_device

if TYPE_CHECKING:
    from k2quant.conversion.recipes.rules import Recipes
    from k2quant.formats.format import Layout, Scope
    from k2quant.formats.known import FormatName
    from k2quant.ground.saying.progress import Progress
    from k2quant.kernels.codecs.grids import Grid


_HINTS = {
    "dataset": "the text is `data`",
    "calib_data": "the text is `data`",
    "num_calibration_samples": "it is `samples` here, rows of `length` tokens",
    "nsamples": "it is `samples` here, rows of `length` tokens",
    "max_seq_length": "it is `length` here",
    "seqlen": "it is `length` here",
    "dampening_frac": "it is `damping` here",
    "damp_percent": "it is `damping` here",
    "actorder": "columns are always solved in the order of their inputs, and stored as they stand",
    "desc_act": "columns are always solved in the order of their inputs, and stored as they stand",
    "group_size": "groups have 32 columns, as K2 is served",
    "bits": "codes have four bits, as K2 is served",
    "method": "this is `gptq`; others are methods of `k2quant.convert`",
    "stats": "what is needed is measured on the way, from `data`",
    "config": "a file of rules is `recipe`",
    "output": "the folder to write is the second argument, `destination`",
    "overwrite": "to throw away what an earlier run left is `restart=True`",
    "max_shard_size": "it is `shard_size` here, in bytes",
    "ignore_layers": "weights out of scope are `ignore`, regular expressions",
}
"""What other libraries have."""


@hinting(_HINTS)
@barred("solve", TOKENS)
def solve(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str],
    to: FormatName | None = None,
    *,
    data: str | os.PathLike[str],
    scales: Scales = "imatrix",
    damping: float = 0.1,
    propagate: bool = True,
    samples: int = 512,
    length: int = 2048,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    split: str = "train",
    config_name: str | None = None,
    reasoning: Reasoning = "split",
    memory: int | str = "32GB",
    recipe: Recipes | None = None,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None = None,
    layout: Layout | None = None,
    shard_size: int | None = None,
    allow_split: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    sha256: bool = False,
    trust_remote_code: bool = False,
    stage: Callable[[str], None] | None = None,
    progress: Asked = None,
) -> Conversion:
    """Convert a checkpoint to INT4 by GPTQ, with data: each code makes up for what those before it lost.

    The same call after a kill goes on within the layer that it was in and writes equal bytes; on a finished destination
    it does nothing. `k2quant.calib.inputs.read_samples` says how data is read and parted.

    Args:
        source: folder of the checkpoint, in any format.
        destination: folder to write; empty, new, or of an earlier run of the same call.
        to: `int4`, where no recipe says it.
        data: a file in JSON Lines or of plain text, a folder of such, or a dataset.
        scales: who chooses the scales that codes are solved with: `rtn`, `mse` or `imatrix`.
        damping: what is added to a Hessian's diagonal, in units of its mean.
        propagate: whether a layer sees what the quantised layers before it give.
        samples: rows that decide, at most.
        length: tokens of a row.
        validation: data that judges, in place of a tenth of the documents.
        test: data that is kept for a final figure, likewise.
        split: of a dataset.
        config_name: of a dataset that has several configurations.
        reasoning: what becomes of reasoning that the chat template drops: `split` or `drop`.
        memory: bytes, or a size such as `32GB`, that the pass may take.
        recipe: rules for classes and patterns, in place of `to`, `scope`, `ignore`, `grid` and `layout`, as `convert`
            takes them; those that are solved say `method: gptq`.
        scope: as in `convert`.
        ignore: as in `convert`.
        grid: `moonshot`, the only one that is solved on.
        layout: of other formats in a recipe.
        shard_size: largest output shard in bytes; None keeps the source's shards.
        allow_split: write what engines fuse in several formats too.
        workers: experts that are solved at a time, and threads that write; None takes one for each core.
        device: where layers compute and matrices are solved.
        follow_links: whether links of the checkpoint's folder may lead out of it.
        restart: throw away what an earlier run left in the destination.
        soft_lock: where its file system has no locks, lock the folder by a file.
        low_disk: of a source at an address, keep at most two shards on the disk, as `convert` does.
        sha256: also note a sha256 of each file.
        trust_remote_code: whether the tokenizer's own Python code may run.
        stage: called with what is being done before the pass, and with notes on the data.
        progress: called with tokens through layers, done and all; True for a bar.

    Returns:
        the destination with its report.

    Raises:
        UsageError: an option makes no sense, `memory` is too small, or a part of the data gets no document.
        CheckpointError: the checkpoint or the data cannot be used; nothing that looks finished was written.
        MissingExtra: `data` is a dataset, and `datasets` is not installed.
        OutputError: the destination is not ours, in use, or the disk failed; the same call resumes.
    """
    say = stage or _quiet
    here, there = spot(source), Path(destination)
    refuse_nested(here, there)
    threads = checked_workers(workers)
    settings = Settings(scales=scales, damping=damping, propagate=propagate)
    options = chosen(
        recipe,
        to=to if recipe is not None else to or "int4",
        scope=scope,
        ignore=ignore,
        grid=grid,
        shard_size=shard_size,
        layout=layout,
        allow_split=allow_split,
        method=None if recipe is not None else SOLVED,
    )
    checkpoint = open_checkpoint(here, follow_links=follow_links)
    config = architecture(checkpoint)
    check_rows(samples, length, longest=config.max_position_embeddings)
    planned = plan_solved(checkpoint, options)
    say("reading the data")
    read = read_samples(
        data,
        load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code, follow_links=follow_links),
        samples=samples,
        length=length,
        vocabulary=config.vocab_size,
        validation=validation,
        test=test,
        split=split,
        config_name=config_name,
        reasoning=reasoning,
    )
    for note in read.notes():
        say(f"note: {note}")
    say(f"{here.name}, through its layers")
    return solve_planned(
        planned,
        there,
        read,
        settings,
        memory=parse_size(memory) if isinstance(memory, str) else memory,
        workers=threads,
        device=device,
        restart=restart,
        soft_lock=soft_lock,
        low_disk=low_disk,
        sha256=sha256,
        say=say,
        progress=told(progress),
    )


def _quiet(_: str) -> None:
    """Tell nobody."""


def solve_planned(
    planned: SolvedPlan,
    there: Path,
    samples: Samples,
    settings: Settings,
    *,
    memory: int,
    workers: int,
    device: str = "cpu",
    restart: bool = False,
    soft_lock: bool = False,
    low_disk: bool = False,
    sha256: bool = False,
    say: Callable[[str], None] = _quiet,
    progress: Progress | None = None,
) -> Conversion:
    """Solve and write what a plan says, by rows of tokens that are there already; see `solve`."""
    kind = execution_device(device).type
    plan = replace(planned.plan, method=said(settings, samples, kind))
    planned = planned._replace(plan=plan)
    source: Checkpoint = plan.source
    if planned.jobs:  # too little memory is said before anything is written
        rows = [len(part.tokens) for part in (samples.train, samples.validation)]
        length = samples.train.tokens.shape[1]
        needs(source, rows=rows, length=length, bases=planned.jobs, memory=memory, workers=workers)

    def begin_pass(spool: Spool, work: Path) -> Pass:
        return Pass(
            source,
            samples,
            planned.jobs,
            settings,
            sink=spool,
            work=work,
            memory=memory,
            device=device,
            workers=workers,
            progress=progress,
        )

    work = Destination(there, report=REPORT, incomplete=INCOMPLETE).work
    solving = Solving(planned.jobs, work, begin_pass, planned.beyond(), planned.abroad, say)
    return carry_out(
        plan,
        there,
        workers=workers,
        restart=restart,
        soft_lock=soft_lock,
        low_disk=low_disk,
        sha256=sha256,
        rounder=solving if planned.jobs else planned.beyond(),
        progress=None if planned.jobs else progress,
    )
