"""`export`: a trained model as a checkpoint that holds, bit for bit, what the forward pass saw.

The converter writes the files: its plan, its journal, its report. Weights that the model holds come from the model:
codes and scales of the fake-quantiser, BF16 of what was only rounded. What the model does without (vision, projector)
comes from the base as in any conversion. When all shards stand on the disk, a gate reads them back, decodes each weight
of the model and compares it with what the forward pass uses. Only then does the folder get an index and a config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from k2quant.checkpoint.contents import contents
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.conversion.convert import Conversion, carry_out
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.conversion.resume import refuse_nested
from k2quant.conversion.stream import Progress
from k2quant.errors import CheckFailed, CheckpointError, CheckpointWarning, DestinationStale, UsageError
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.qat.config import QATConfig
from k2quant.qat.exporting.asked import asked_job
from k2quant.qat.exporting.gate import check_export
from k2quant.qat.exporting.starting import PostTraining, round_start
from k2quant.qat.exporting.trained import Trained
from k2quant.qat.job import Job
from k2quant.qat.loading import MASTERS, load
from k2quant.qat.preparing import prepare, prepared
from k2quant.qat.rounding.rules import check_packed
from k2quant.qat.rounding.targets import bases_digest, bases_of
from k2quant.qat.run import checkpoints, naming
from k2quant.qat.run.folder import TARGETS, Run
from k2quant.qat.run.state import restore_weights


@barred("export")
def export(
    model: nn.Module,
    destination: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    progress: Asked = None,
) -> Conversion:
    """Write a prepared model as a checkpoint in the format that it was trained for.

    Args:
        model: a prepared model, on any device; not one whose parameters are sharded over processes.
        destination: folder to write; empty or new.
        base: the checkpoint that the training began with, which has the config, the tokenizer and what the model does
            without; None where the model came from `k2quant.qat.load`.
        shard_size: largest output shard in bytes; None keeps the base's shards.
        workers: threads; None takes one for each core.
        follow_links: whether links of `base` may lead out of its folder; of a model's own checkpoint, `load` was told.
        restart: throw away what an earlier export left in the destination.
        soft_lock: where its file system has no locks, lock it by a file.
        progress: called with the bytes done and all bytes; True for a bar.

    Raises:
        UsageError: the model is not prepared, or its codes have no place in a checkpoint.
        CheckpointError: the base does not have the model's weights.
        CheckFailed: what was written is not, bit for bit, what the forward pass sees; the folder is not finished.
        OutputError: the destination is not ours, in use, holds another training, or the disk failed.
    """
    source, there = _base(model, base, follow_links=follow_links), Path(destination)
    refuse_nested(source.folder, there)
    plan, trained = plan_export(model, source, shard_size=shard_size)
    return _write(plan, trained, there, workers, restart=restart, soft_lock=soft_lock, progress=told(progress))


def _write(
    plan: Plan,
    trained: Trained,
    there: Path,
    workers: int | None,
    *,
    restart: bool,
    soft_lock: bool,
    progress: Progress | None,
) -> Conversion:
    """Carry an export out, with its gate."""

    def check(folder: Path) -> None:
        check_export(folder, plan, trained)

    done = carry_out(
        plan,
        there,
        workers=workers,
        restart=restart,
        soft_lock=soft_lock,
        substitute=trained,
        check=check,
        progress=progress,
    )
    if done.already_done:
        _check_again(there, check)
    return done


@contextlib.contextmanager
def said_once() -> Iterator[list[str]]:
    """Hold warnings of a checkpoint back while the block runs; give a list for what will be said otherwise.

    Behind the block the others are warned of.
    """
    said: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CheckpointWarning)
            yield said
    finally:
        for each in caught:
            if each.category is not CheckpointWarning or not any(str(each.message).endswith(text) for text in said):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def export_run(
    folder: Path,
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    base: str | os.PathLike[str] | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the last checkpoint of a training, or what post-training rounding makes of a job's model; see `export`.

    Args:
        folder: of the run; or a job's file: its model is written rounded as it is, to compare with what training gives.
        destination: folder to write.
        to: the format; None for the one that was trained for, and no other is possible.
        base: where the model lies that the training began with; None: where it lay then.
        shard_size: as in `export`, like the others.
        workers: threads.
        follow_links: whether links of the model's folder may lead out of it.
        restart: throw away what an earlier export left.
        soft_lock: lock by a file where there is no other way.
        progress: called with the bytes done and all bytes.

    Raises:
        UsageError: another format than was trained for.
        CheckpointError: there is no finished checkpoint, or it is damaged.
    """
    untrained = folder.is_file()
    job = asked_job(folder, to=to, base=base, follow_links=follow_links)
    there = Path(destination)
    with said_once() as said:
        model = load_start(job) if untrained else load_run(folder, job)
        source = _base(model, None, follow_links=follow_links)
        refuse_nested(source.folder, there)
        plan, trained = plan_export(model, source, shard_size=shard_size)
        said.extend(plan.remarks)
    plan = dataclasses.replace(plan, origin=_origin(folder, untrained=untrained))
    return _write(plan, trained, there, workers, restart=restart, soft_lock=soft_lock, progress=progress)


def _origin(folder: Path, *, untrained: bool) -> dict[str, Any]:
    """Return what a report says of a run whose last checkpoint is exported, or of a job's file."""
    if untrained:
        return {"job": folder.name}
    last = naming.found(Run(folder).checkpoints)[-1]
    return {"run": folder.resolve().name, "step": naming.step_of(last)}


def load_start(job: Job) -> nn.Module:
    """Return a job's model before its first step, prepared for the width of the export and rounded as the job says.

    Raises:
        CheckpointError: the statistics that the job names are not those of its model.
    """
    source, post_training = open_checkpoint(Path(job.model), follow_links=job.follow_links), PostTraining.of(job)
    post_training.check(source)
    model = load(source, dtype=MASTERS[job.training.masters])
    prepare(model, dataclasses.replace(job.quantize, bits=job.final_bits))
    if post_training.searches:
        found = prepared(model)
        post_training.check(source, bases_of(found.targets))
        round_start(found, post_training)
    return model


def load_run(folder: Path, job: Job) -> nn.Module:
    """Return the model of a run's last checkpoint, prepared as it was trained.

    Raises:
        CheckpointError: there is no finished checkpoint, it is damaged, or the base has changed.
        DestinationStale: other weights were fake-quantised than this version takes for the same job.
    """
    run = Run(folder)
    found = naming.found(run.checkpoints)
    if not found:
        raise CheckpointError(
            "no checkpoint", file=run.checkpoints, remedy="train first: k2quant qat train with the same job"
        )
    source = open_checkpoint(Path(job.model), follow_links=job.follow_links)
    run.check_model(contents(source))
    model = load(source, dtype=MASTERS[job.training.masters])
    step = naming.step_of(found[-1])
    bits = job.bits_at(step - 1)
    if bits not in {None, job.final_bits}:
        raise UsageError(
            f"{folder}: its last checkpoint, of step {step}, has codes of {bits} bits, the end has {job.final_bits}; "
            "train on"
        )
    prepare(model, dataclasses.replace(job.quantize, bits=job.final_bits))
    run.compare(job, {TARGETS: bases_digest(prepared(model).targets)})
    with checkpoints.resuming(found[-1]):
        checkpoints.read_state(found[-1], run.digest())
        restore_weights(model, found[-1])
    if bits is None and job.quantize.bit_widths:
        prepared(model).set_bits(job.final_bits)  # learned scales have not begun: they are those of the weights now
    return model


def plan_export(model: nn.Module, base: Checkpoint, *, shard_size: int | None = None) -> tuple[Plan, Trained]:
    """Plan an export and check that every weight finds its place, before a byte is written.

    Raises:
        UsageError: the model is not prepared, is sharded, or its codes have no place in a checkpoint.
        CheckpointError: the base does not have the model's weights.
    """
    found = prepared(model)
    if found.config.bit_widths:
        check_packed(found.bits)
    plan = make_plan(base, export_options(found.config, shard_size), substituted=True)
    trained = Trained(found.model, found, plan)
    return dataclasses.replace(plan, values=trained.identity()), trained


def export_options(config: QATConfig, shard_size: int | None = None) -> Options:
    """Return what the converter is asked for: the same format, scope, grid and layout."""
    grid = config.grid if config.format.grids else None
    return Options(
        config.to,
        config.resolved_scope,
        config.ignore,
        grid,
        shard_size,
        layout=config.layout,
        allow_split=config.allow_split,
    )


def _check_again(folder: Path, check: Callable[[Path], None]) -> None:
    """Refuse a finished folder that is another training's: a plan tells trainings apart by a sample of their values.

    Raises:
        DestinationStale: so it is.
    """
    try:
        check(folder)
    except CheckFailed as error:
        raise DestinationStale(
            "holds a finished export of other values",
            file=folder,
            remedy="write it anew with `restart=True`, or name another folder",
        ) from error


def _base(model: nn.Module, base: str | os.PathLike[str] | Checkpoint | None, *, follow_links: bool) -> Checkpoint:
    if isinstance(base, Checkpoint):
        return base
    if base is not None:
        return open_checkpoint(Path(base), follow_links=follow_links)
    found = getattr(model, "checkpoint", None)
    if not isinstance(found, Checkpoint):
        raise UsageError("base: name the checkpoint that the training began with; the model does not know it")
    return found
