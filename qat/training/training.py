"""`train`: from a job to a run whose last checkpoint can be exported.

A step is a pure function of its number and of what the last one left: which rows it takes, the learning rate, the width
of the codes. So a run that was killed goes on from its last checkpoint with the bits that it would have had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from k2quant.checkpoint.contents import contents
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import BadValue, OutputError, UsageError
from k2quant.qat.data.packing import NO_TARGET, Rows, batch, order, share
from k2quant.qat.exporting.export import plan_export
from k2quant.qat.job import Job, check_folders, refuse_sharded
from k2quant.qat.loading import MASTERS, load
from k2quant.qat.planning import read_data, tried
from k2quant.qat.preparing import Prepared, prepare, prepared
from k2quant.qat.rounding.targets import bases_digest
from k2quant.qat.run import checkpoints, naming
from k2quant.qat.run.folder import TARGETS, Run
from k2quant.qat.run.history import Evaluation, History, Record, Records, StepRecord, kept_history
from k2quant.qat.run.result import Result, note_done, stamps
from k2quant.qat.run.shards import whole
from k2quant.qat.run.state import restore_weights, trained_tensors
from k2quant.qat.run.tensorboard import Board
from k2quant.qat.training import fallback
from k2quant.qat.training.measuring import Measures
from k2quant.qat.training.monitors import Monitors, reported
from k2quant.qat.training.optimizers import Optimizers
from k2quant.qat.training.processes import Processes
from k2quant.qat.training.task import Task
from k2quant.qat.training.teacher import Teacher

Sink = Callable[[Record], None]
Progress = Callable[[int, int, float], None]
"""Called with the steps done, all steps and the last loss."""


def train(
    job: Job,
    *,
    restart: bool = False,
    soft_lock: bool = False,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> Result:
    """Train what a job says, or go on with it.

    With several processes, each calls this; the first one writes.

    Args:
        job: from `read_job`.
        restart: throw away what an earlier run left in the output folder.
        soft_lock: where its file system has no locks, lock it by a file.
        progress: called after each step.
        stage: called with what is being done before the first step.

    Raises:
        UsageError: the job cannot be done here.
        CheckpointError: model or data cannot be used.
        BadValue: the loss is not finite any more; the last checkpoint stands.
        OutputError: the run's folder is not ours, in use, of another job, or the disk failed.
    """
    begun, say = time.monotonic(), stage or _quiet
    check_folders(job)
    # Learned scales have no part in steps without fake quantisation.
    plain = not job.training.fake_quantize or any(bits is None for _, bits in job.bits)
    unused = plain and job.quantize.estimator == "learned"
    processes = Processes(shard=job.training.shard, unused=unused)
    run, made_of = Run(Path(job.output)), stamps(job)
    try:
        held = run.held(soft_lock=soft_lock) if processes.leads else contextlib.nullcontext()
        with _reproducible(job, processes.device), held:
            processes.wait()
            trainer = Trainer(job, run, processes, say, restart=restart)
            resumed = trainer.resume()
            say("training")
            evaluation, starved = trainer.run(resumed, progress)
            notes = tuple(trainer.rows.notes())
            result = Result(
                run.folder, job.training.steps, resumed, time.monotonic() - begun, evaluation, starved, notes
            )
            if processes.leads:
                note_done(run, result, made_of)
            return result
    except OSError as error:
        raise OutputError(
            "cannot be written", file=error.filename or run.folder, found=error.strerror or str(error)
        ) from error


class Trainer:
    """A training in one process."""

    def __init__(
        self, job: Job, run: Run, processes: Processes, stage: Callable[[str], None], *, restart: bool
    ) -> None:
        """Load everything and check all that can be checked before the first step."""
        if job.training.batch % processes.world:
            raise UsageError(f"training: batch {job.training.batch} is no multiple of the {processes.world} processes")
        if processes.sharded:  # by accelerate's plugin too, of which the job does not know
            refuse_sharded(job)
        self.job, self.processes = job, processes
        self._run = run
        stage("loading the model")
        self.model: nn.Module = self._load()
        self.prepared: Prepared = prepared(self.model)
        stage("reading the data")
        self.rows, held_out = read_data(job, self.model.config)
        for note in self.rows.notes():
            stage(f"note: {note}")
        source, files = open_checkpoint(Path(job.model), follow_links=job.follow_links), None
        with self._final_width():
            export, _ = plan_export(self.model, source)  # a result that cannot be saved is not worth a step
        if processes.leads:
            list(tried(job, source, self.prepared, export))
            files = self._begin_run(held_out, restart=restart, stage=stage)
        processes.wait()
        self._teacher = Teacher.of(job, run, self.rows, processes, files, stage)
        self._monitors = Monitors(self.model, self.prepared, sharded=processes.sharded)
        task = Task(self.model, job.distill, MASTERS[job.training.precision])
        processes.shard(task, self.model, self.prepared.targets)
        self._optimizers = Optimizers(self.model, self.prepared, job.optimizer, sharded=processes.sharded)
        self._wrapped = processes.wrap(task)
        self._measures = Measures(task, self.prepared, held_out, processes.device)

    def _begin_run(self, held_out: Rows, *, restart: bool, stage: Callable[[str], None]) -> dict[str, str] | None:
        """Note what is trained, or check that it is what was begun; return the digests of the teacher's files."""
        stage("reading the digests of the model")
        job = self.job
        model = contents(open_checkpoint(Path(job.model), follow_links=job.follow_links))
        named = job.distill.teacher if job.distill else None
        teacher = (
            contents(open_checkpoint(Path(named), follow_links=job.follow_links))
            if named
            else model
            if job.distill
            else None
        )
        facts = {"data": self.rows.digest, "held_out": held_out.digest, "model": model, "teacher": teacher}
        facts[TARGETS] = bases_digest(self.prepared.targets)
        self._run.begin(job, facts, restart=restart)
        return teacher

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

    def resume(self) -> int:
        """Go on from the last checkpoint, if there is one; return its step, or 0."""
        found = naming.found(self._run.checkpoints)
        if not found:
            return 0
        path = found[-1]
        step = naming.step_of(path)
        with checkpoints.resuming(path):
            self._restore(path, step)
        return step

    def _restore(self, path: Path, step: int) -> None:
        state, optimizer = checkpoints.read_state(path, self._run.digest()), path / "optimizer.safetensors"
        self._set_bits(step - 1)
        restore_weights(self.model, path)
        self._optimizers.restore(dict(checkpoints.read_tensors(optimizer)), file=optimizer)
        self._monitors.restore(dict(checkpoints.read_tensors(path / "watch.safetensors")), lead=self.processes.leads)
        self._measures.restore(state.get("start"), file=path / naming.STATE)
        self.prepared.refresh()

    def run(self, first: int, progress: Progress | None) -> tuple[Evaluation | None, int]:
        """Take all steps from `first` on; return the last evaluation and how many experts were starved.

        Raises:
            MalformedFile: the history lacks a record of what was done before `first`.
        """
        job, steps = self.job, self.job.training.steps
        kept = kept_history(self._run.history, first, self._evaluated(first)) if first else Records((), ())
        history = self._history(first) if self.processes.leads else None
        board = Board(self._run.board, after=first or -1) if job.saving.tensorboard and history is not None else None
        with contextlib.closing(board) if board is not None else contextlib.nullcontext():
            sinks = _sinks(history, board)
            if first == 0:
                self._begin()
                _tell(sinks, self._evaluate(0))
            for step in range(first, steps):
                record = self._step(step)
                _tell(sinks, record)
                done = step + 1
                if done % job.training.evaluate_every == 0 and done < steps:
                    _tell(sinks, self._evaluate(done))
                if done % job.saving.every == 0 and done < steps:
                    self._save(done)
                if progress:
                    progress(done, steps, record.loss)
            last = kept.evaluations[-1] if kept.evaluations else None
            return self._finish(sinks, last, trained=first < steps)

    def _evaluated(self, step: int) -> list[int]:
        """Return the steps, up to one that is done, after which held-out rows were measured."""
        settings = self.job.training
        if not self.job.data.held_out:
            return []
        last = [step] if step == settings.steps and step % settings.evaluate_every else []
        return [*range(0, step + 1, settings.evaluate_every), *last]

    def _history(self, first: int) -> History:
        """Take the history up without what lies behind a checkpoint; without one, the run begins anew."""
        if first == 0:
            self._run.history.unlink(missing_ok=True)
        history = History(self._run.history)
        history.rewind(first or -1)
        return history

    def _begin(self) -> None:
        """Measure the start point, in BF16 and as post-training rounding to the final width has it."""
        with self._final_width():
            self._measures.begin(file=self.job.model)
        self._set_bits(0)
        self._monitors.begin(self._measures.run)

    @contextlib.contextmanager
    def _final_width(self, *, anew: bool = False) -> Iterator[None]:
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

    def _set_bits(self, step: int) -> int | None:
        """Give the codes the width of a step; a change of it begins anew with scales of the weights as they are."""
        bits, before = self.job.bits_at(step), self.prepared.bits if self.prepared.enabled else None
        self.prepared.enabled = bits is not None
        if bits is not None and self.job.quantize.bit_widths and bits != before:
            self.prepared.set_bits(bits)
            self._monitors.rebase()
        return bits

    def _step(self, step: int) -> StepRecord:
        """Take one step of the optimizer; the first is 0."""
        begun, job = time.perf_counter(), self.job
        bits = self._set_bits(step)
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
        self._optimizers.step(part)
        self._optimizers.zero_grad()
        self._monitors.observe()
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
                self._monitors.counting(rows),
            ):
                found = self._wrapped(rows, self._teacher.hints(rows, part))
                # Data parallelism averages over processes what is a sum over all of them.
                ((found * weights).sum() * (self.processes.world / total)).backward()
            sums += found.detach().double()
        entropy, gap = (self.processes.total(sums) / total).tolist()
        return entropy, gap

    def _evaluate(self, step: int) -> Evaluation | None:
        """Measure the model as it is quantised now, or would be exported where it is not quantised yet."""
        if self.prepared.enabled:
            return self._measures.evaluate(step)
        self.prepared.enabled = True
        with self._final_width(anew=True):
            found = self._measures.evaluate(step)
        self.prepared.enabled = False
        return found

    def _save(self, step: int) -> None:
        watched = self._monitors.state(self.processes.total)
        checkpoints.save(
            self._run.checkpoints,
            step,
            {"weights": trained_tensors(self.model), "optimizer": self._optimizers.state(), "watch": watched.items()},
            {
                checkpoints.TRAINING: self._run.digest(),
                "start": self._measures.state(),
                "processes": self.processes.world,
            },
            gather=whole,
            writes=self.processes.leads,
        )
        self.processes.wait()
        if self.processes.leads:
            checkpoints.prune(self._run.checkpoints, self.job.saving.keep)

    def _finish(self, sinks: list[Sink], last: Evaluation | None, *, trained: bool) -> tuple[Evaluation | None, int]:
        """Let starved experts fall back, measure, save and report.

        Args:
            sinks: take the last evaluation.
            last: the one before, which is the last of a run that was finished already.
            trained: whether there was a step; else nothing is measured anew, and a report that is there stays.
        """
        steps = self.job.training.steps
        self._set_bits(steps - 1)
        if not self.prepared.enabled:  # trained without fake quantisation throughout, as a control is
            self.prepared.enabled = True
            if self.job.quantize.bit_widths and self.prepared.bits != self.job.final_bits:
                self.prepared.set_bits(self.job.final_bits)
        starved = self._monitors.starved(self.job.training.least_tokens, self.processes.total)
        if trained:
            names = [name for name, _ in starved]
            fallback.restore(self.prepared, names, Path(self.job.model), follow_links=self.job.follow_links)
            last = self._evaluate(steps)
            _tell(sinks, last)
            self._save(steps)
        if self.processes.leads or self.processes.world > 1:
            summary = self._monitors.summary(self.job, starved, self._measures.run, self.processes.total)
            if self.processes.leads and (trained or not reported(self._run)):
                self._monitors.report(self._run, summary)
        self.processes.wait()
        return last, len(starved)


def _sinks(history: History | None, board: Board | None) -> list[Sink]:
    return [*([history.append] if history is not None else []), *([board.add] if board is not None else [])]


def _tell(sinks: list[Sink], record: Record | None) -> None:
    if record is not None:
        for sink in sinks:
            sink(record)


def _quiet(_: str) -> None:
    """Say nothing."""


@contextlib.contextmanager
def _reproducible(job: Job, device: torch.device) -> Iterator[None]:
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
