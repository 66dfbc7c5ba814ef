"""One step of a training: its rows, its gradient, its optimizer; and how long it takes.

A step is a pure function of its number and of what the last one left: which rows it takes, the learning rate, the width
of the codes. So a run that was killed goes on from its last checkpoint with the bits that it would have had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from k2quant.data.packing import NO_TARGET, batch, order, share
from k2quant.errors import BadValue, UsageError
from k2quant.qat.job import Job, refuse_sharded
from k2quant.qat.loading import MASTERS, load
from k2quant.qat.planning import read_data
from k2quant.qat.preparing import Prepared, prepare, prepared
from k2quant.qat.rounding.shards import whole
from k2quant.qat.run.history import Evaluation, StepRecord
from k2quant.qat.training.measuring import Measures
from k2quant.qat.training.monitors import Monitors
from k2quant.qat.training.optimizers import Optimizers
from k2quant.qat.training.processes import Processes
from k2quant.qat.training.task import Task
from k2quant.qat.training.teacher import Teacher

_TIMED = 3
"""Steps whose time is taken."""
_PATIENCE = 10.0
"""Seconds after which no further one is."""


class Stepper:
    """A model that is trained in one process, a step at a time; nothing is written."""

    def __init__(self, job: Job, processes: Processes, stage: Callable[[str], None]) -> None:
        """Load the model and read the data.

        Args:
            job: the job.
            processes: that train.
            stage: called with what is being done.

        Raises:
            UsageError: the processes cannot do it.
            CheckpointError: model or data cannot be used.
        """
        if job.training.batch % processes.world:
            raise UsageError(f"training: batch {job.training.batch} is no multiple of the {processes.world} processes")
        if processes.sharded:  # by accelerate's plugin too, of which the job does not know
            refuse_sharded(job)
        self.job, self.processes = job, processes
        stage("loading the model")
        self.model: nn.Module = self._load()
        self.prepared: Prepared = prepared(self.model)
        stage("reading the data")
        self.rows, self.held_out = read_data(job, self.model.config)
        for note in self.rows.notes():
            stage(f"note: {note}")

    def set_up(self, teacher: Teacher) -> None:
        """Make what a step needs beside the model; the width of its codes is that of the first step.

        Args:
            teacher: that is listened to.
        """
        job, processes = self.job, self.processes
        self._teacher = teacher
        self.monitors = Monitors(self.model, self.prepared, sharded=processes.sharded)
        task = Task(self.model, job.distill, MASTERS[job.training.precision])
        processes.shard(task, self.model, self.prepared.targets)
        self.optimizers = Optimizers(self.model, self.prepared, job.optimizer, sharded=processes.sharded)
        self._wrapped = processes.wrap(task)
        self.measures = Measures(task, self.prepared, self.held_out, processes.device)

    def _load(self) -> nn.Module:
        job, settings = self.job, self.job.training
        model = load(
            job.model,
            dtype=MASTERS[settings.masters],
            device=self.processes.device,
            follow_links=job.follow_links,
        )
        if settings.experts is not None:
            model.set_experts_implementation(settings.experts)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        first = next((bits for _, bits in job.bits if bits is not None), job.quantize.bits)
        prepare(model, dataclasses.replace(job.quantize, bits=first))
        return model

    @contextlib.contextmanager
    def final_width(self, *, anew: bool = False) -> Iterator[None]:
        """Let the model have the codes of the export while the block runs; not while learned scales are trained.

        Args:
            anew: whether learned scales, which have not begun, are those of the weights as they are now.
        """
        before, final = self.prepared.bits, self.job.final_bits
        if not self.job.quantize.bit_widths or (before == final and not anew):
            yield
            return
        self.prepared.set_bits(final)
        try:
            yield
        finally:
            self.prepared.set_bits(before)

    def set_bits(self, step: int) -> int | None:
        """Give the codes the width of a step; a change of it begins anew with scales of the weights as they are."""
        bits, before = self.job.bits_at(step), self.prepared.bits if self.prepared.enabled else None
        self.prepared.enabled = bits is not None
        if bits is not None and self.job.quantize.bit_widths and bits != before:
            self.prepared.set_bits(bits)
            self.monitors.rebase()
        return bits

    def step(self, step: int) -> StepRecord:
        """Take one step of the optimizer; the first is 0."""
        begun, job = time.perf_counter(), self.job
        bits = self.set_bits(step)
        indices = order(step, len(self.rows.tokens), job.training.batch, job.training.seed)
        total = int((self.rows.targets[indices] != NO_TARGET).sum())
        entropy, gap = self._gradients(indices, max(total, 1))
        weight = job.distill.weight if job.distill else 0.0
        loss = (1 - weight) * entropy + weight * gap
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(whole(nn.utils.clip_grad_norm_(trained, job.training.clip)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise BadValue(
                f"the loss or its gradient is not finite at step {step + 1}",
                found=f"loss {loss}, gradient {norm}",
                remedy="the last checkpoint stands; try a lower rate or a longer warm-up"
                if step
                else "is the model damaged? compare its files with their published sha256",
            )
        part = job.optimizer.share(step, job.training.steps)
        self.optimizers.step(part)
        self.optimizers.zero_grad()
        self.monitors.observe()
        return StepRecord(
            step=step + 1,
            loss=loss,
            cross_entropy=entropy,
            divergence=gap if job.distill else None,
            rate=job.optimizer.rate * part,
            norm=norm,
            bits=bits if job.quantize.bit_widths else None,
            tokens=total,
            seconds=time.perf_counter() - begun,
        )

    def _gradients(self, indices: Tensor, total: int) -> tuple[float, float]:
        """Add up the gradients of a step's rows; return cross-entropy and divergence, nats a token."""
        settings, device = self.job.training, self.processes.device
        mine = share(indices, self.processes.rank, self.processes.world)
        parts = mine.split(settings.micro_batch or len(mine))
        weight = self.job.distill.weight if self.job.distill else 0.0
        weights = torch.tensor([1 - weight, weight], device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for place, part in enumerate(parts):
            rows = {name: tensor.to(device) for name, tensor in batch(self.rows, part).items()}
            with (
                self.processes.accumulating(self._wrapped, last=place == len(parts) - 1),
                self.monitors.counting(rows),
            ):
                found = self._wrapped(rows, self._teacher.hints(rows, part))
                # Data parallelism averages over processes what is a sum over all of them.
                ((found * weights).sum() * (self.processes.world / total)).backward()
            sums += found.detach().double()
        entropy, gap = (self.processes.total(sums) / total).tolist()
        return entropy, gap

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure the model as it is quantised now, or would be exported where it is not quantised yet."""
        if self.prepared.enabled:
            return self.measures.evaluate(step)
        self.prepared.enabled = True
        with self.final_width(anew=True):
            found = self.measures.evaluate(step)
        self.prepared.enabled = False
        return found


def evaluated(job: Job, step: int) -> list[int]:
    """Return the steps, up to one that is done, after which held-out rows are measured."""
    settings = job.training
    if not job.data.held_out:
        return []
    last = [step] if step == settings.steps and step % settings.evaluate_every else []
    return [*range(0, step + 1, settings.evaluate_every), *last]


@contextlib.contextmanager
def reproducible(job: Job, device: torch.device) -> Iterator[None]:
    """Let torch choose algorithms that give the same bits again, and put its choice back."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(job.training.seed)
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


class Timing(NamedTuple):
    """How long a training takes here, from some of its steps."""

    step: float
    """Seconds of a step, the median of those that were taken."""
    evaluation: float
    """Seconds of a measurement of the held-out rows, from those of one batch."""
    loading: float
    """Seconds before the first step, but for the digests of the model, and for what a teacher is asked before."""
    taken: int
    """Steps that were measured, after one that was not."""
    whole: float
    """Seconds of the whole training: loading, every step, every measurement; what is saved comes on top."""


def time_job(job: Job) -> Timing:
    """Take a job's first steps, and throw them away; nothing is written.

    Raises:
        UsageError: more than one process does it, or the job cannot be done here.
        CheckpointError: model or data cannot be used, or the loss is not finite.
    """
    begun = time.perf_counter()
    processes = Processes(shard=job.training.shard)
    if processes.world > 1:
        raise UsageError("steps are timed in one process")
    with reproducible(job, processes.device):
        stepper = Stepper(job, processes, lambda _: None)
        stepper.set_up(Teacher.beside(job, processes))
        loading = time.perf_counter() - begun
        seconds = list(_timed(stepper))
        before = time.perf_counter()
        stepper.measures.run(lambda _: None)
        batch_seconds = time.perf_counter() - before
    evaluation = 2 * stepper.measures.batches * batch_seconds  # rounded, and in BF16
    step, count = statistics.median(seconds), len(evaluated(job, job.training.steps))
    whole = loading + step * job.training.steps + evaluation * (count + 1)  # the start point is measured by itself
    return Timing(step, evaluation if count else 0.0, loading, len(seconds), whole if count else whole - evaluation)


def _timed(stepper: Stepper) -> Iterator[float]:
    """Yield the seconds of a few steps, fewer if they are long.

    The first makes what later ones use again, and is left out where there are others.
    """
    steps, spent = stepper.job.training.steps, 0.0
    first = stepper.step(0).seconds
    if steps == 1:
        yield first
    for number in range(1, min(_TIMED + 1, steps)):
        yield (took := stepper.step(number).seconds)
        spent += took
        if spent > _PATIENCE:
            return
