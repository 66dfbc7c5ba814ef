"""`train`: from a job to a run whose last checkpoint can be exported; a killed one goes on from its last checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from k2quant.checkpoint.contents import contents
from k2quant.checkpoint.files.paths import as_output_error
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.qat.exporting.export import plan_export
from k2quant.qat.exporting.starting import PostTraining
from k2quant.qat.job import Job, check_folders
from k2quant.qat.planning import tried
from k2quant.qat.rounding.shards import whole
from k2quant.qat.rounding.targets import bases_digest, bases_of
from k2quant.qat.run import checkpoints, naming
from k2quant.qat.run.folder import TARGETS, Run
from k2quant.qat.run.history import Evaluation, History, Record, Records, kept_history
from k2quant.qat.run.result import Result, note_done, stamps
from k2quant.qat.run.state import restore_weights, trained_tensors
from k2quant.qat.run.tensorboard import Board
from k2quant.qat.training import fallback
from k2quant.qat.training.monitors import reported
from k2quant.qat.training.processes import Processes
from k2quant.qat.training.stepping import Stepper, evaluated, reproducible
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
    held = run.held(soft_lock=soft_lock) if processes.leads else contextlib.nullcontext()
    with as_output_error(run.folder), reproducible(job, processes.device), held:
        processes.wait()
        trainer = Trainer(job, run, processes, say, restart=restart)
        resumed = trainer.resume()
        if resumed < job.training.steps:
            say("training")
        evaluation, starved = trainer.run(resumed, progress)
        notes = tuple(trainer.stepper.rows.notes())
        result = Result(run.folder, job.training.steps, resumed, time.monotonic() - begun, evaluation, starved, notes)
        if processes.leads:
            note_done(run, result, made_of)
        return result


class Trainer:
    """A training in one process."""

    def __init__(
        self, job: Job, run: Run, processes: Processes, stage: Callable[[str], None], *, restart: bool
    ) -> None:
        """Load everything and check all that can be checked before the first step."""
        self.job, self.processes = job, processes
        self._run = run
        self._post_training = PostTraining.of(job)
        self.stepper = Stepper(job, processes, stage)
        source, files = open_checkpoint(Path(job.model), follow_links=job.follow_links), None
        with self.stepper.final_width():
            export, _ = plan_export(self.stepper.model, source)  # a result that cannot be saved is not worth a step
        if processes.leads:
            list(tried(job, source, self.stepper.prepared, export))
            files = self._begin_run(source, restart=restart, stage=stage)
        processes.wait()
        self.stepper.set_up(Teacher.of(job, run, self.stepper.rows, processes, files, stage))

    def _begin_run(self, source: Checkpoint, *, restart: bool, stage: Callable[[str], None]) -> dict[str, str] | None:
        """Note what is trained, or check that it is what was begun; return the digests of the teacher's files."""
        stage("reading the digests of the model")
        job = self.job
        model = contents(source)
        named = job.distill.teacher if job.distill else None
        teacher = (
            contents(open_checkpoint(Path(named), follow_links=job.follow_links))
            if named
            else model
            if job.distill
            else None
        )
        rows, held_out = self.stepper.rows, self.stepper.held_out
        facts = {"data": rows.digest, "held_out": held_out.digest, "model": model, "teacher": teacher}
        facts[TARGETS] = bases_digest(self.stepper.prepared.targets)
        self._post_training.check(source, bases_of(self.stepper.prepared.targets))
        facts |= self._post_training.facts()
        self._run.begin(job, facts, restart=restart)
        return teacher

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
        self.stepper.set_bits(step - 1)
        restore_weights(self.stepper.model, path)
        self.stepper.optimizers.restore(dict(checkpoints.read_tensors(optimizer)), file=optimizer)
        self.stepper.monitors.restore(
            dict(checkpoints.read_tensors(path / "watch.safetensors")), lead=self.processes.leads
        )
        self.stepper.measures.restore(state.get("start"), file=path / naming.STATE)
        self.stepper.prepared.refresh()

    def run(self, first: int, progress: Progress | None) -> tuple[Evaluation | None, int]:
        """Take all steps from `first` on; return the last evaluation and how many experts were starved.

        Raises:
            MalformedFile: the history lacks a record of what was done before `first`.
        """
        job, steps = self.job, self.job.training.steps
        kept = kept_history(self._run.history, first, evaluated(job, first)) if first else Records((), ())
        history = self._history(first) if self.processes.leads else None
        board = Board(self._run.board, after=first or -1) if job.saving.tensorboard and history is not None else None
        with contextlib.closing(board) if board is not None else contextlib.nullcontext():
            sinks = _sinks(history, board)
            if first == 0:
                self._begin()
                _tell(sinks, self.stepper.evaluate(0))
            for step in range(first, steps):
                record = self.stepper.step(step)
                _tell(sinks, record)
                done = step + 1
                if done % job.training.evaluate_every == 0 and done < steps:
                    _tell(sinks, self.stepper.evaluate(done))
                if done % job.saving.every == 0 and done < steps:
                    self._save(done)
                if progress:
                    progress(done, steps, record.loss)
            last = kept.evaluations[-1] if kept.evaluations else None
            return self._finish(sinks, last, trained=first < steps)

    def _history(self, first: int) -> History:
        """Take the history up without what lies behind a checkpoint; without one, the run begins anew."""
        if first == 0:
            self._run.history.unlink(missing_ok=True)
        history = History(self._run.history)
        history.rewind(first or -1)
        return history

    def _begin(self) -> None:
        """Measure the start point, in BF16 and as post-training rounding to the final width has it."""
        with self.stepper.final_width():
            self.stepper.measures.begin(file=self.job.model)
        self.stepper.set_bits(0)
        self.stepper.monitors.begin(self.stepper.measures.run)

    def _save(self, step: int) -> None:
        watched = self.stepper.monitors.state(self.processes.total)
        checkpoints.save(
            self._run.checkpoints,
            step,
            {
                "weights": trained_tensors(self.stepper.model),
                "optimizer": self.stepper.optimizers.state(),
                "watch": watched.items(),
            },
            {
                checkpoints.TRAINING: self._run.digest(),
                "start": self.stepper.measures.state(),
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
        self.stepper.set_bits(steps - 1)
        if not self.stepper.prepared.enabled:  # trained without fake quantisation throughout, as a control is
            self.stepper.prepared.enabled = True
            if self.job.quantize.bit_widths and self.stepper.prepared.bits != self.job.final_bits:
                self.stepper.prepared.set_bits(self.job.final_bits)
        starved = self.stepper.monitors.starved(self.job.training.least_tokens, self.processes.total)
        if trained:
            names = [name for name, _ in starved]
            fallback.restore(
                self.stepper.prepared,
                names,
                Path(self.job.model),
                post_training=self._post_training,
                follow_links=self.job.follow_links,
            )
            last = self.stepper.evaluate(steps)
            _tell(sinks, last)
            self._save(steps)
        if self.processes.leads or self.processes.world > 1:
            summary = self.stepper.monitors.summary(self.job, starved, self.stepper.measures.run, self.processes.total)
            if self.processes.leads and (trained or not reported(self._run)):
                self.stepper.monitors.report(self._run, summary)
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
