"""Who a student learns from: nobody, a model that runs beside it, or what one said once of every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.data.packing import Rows, batch
from k2quant.errors import UsageError
from k2quant.qat.job import Job
from k2quant.qat.loading import load
from k2quant.qat.rounding.autocast import keep_out_of_autocast
from k2quant.qat.run.folder import Run
from k2quant.qat.training.distillation import Cache, build_cache
from k2quant.qat.training.processes import Processes
from k2quant.qat.training.task import Hints, learnt_logits


class Teacher:
    """What a teacher says of rows."""

    def __init__(
        self, *, model: nn.Module | None = None, cache: Cache | None = None, precision: torch.dtype = torch.float32
    ) -> None:
        """Listen to a model, to a file, or to neither.

        Args:
            model: the teacher, if it runs.
            cache: what it said once.
            precision: of its products.
        """
        self._model, self._cache, self._precision = model, cache, precision

    @classmethod
    def of(
        cls,
        job: Job,
        run: Run,
        rows: Rows,
        processes: Processes,
        files: Mapping[str, str] | None,
        stage: Callable[[str], None],
    ) -> Teacher:
        """Return the teacher of a job.

        Args:
            job: the job.
            run: its folder.
            rows: to train on.
            processes: that train; each calls this.
            files: what `contents` says of the teacher; the first process has to know.
            stage: called with what is being done.

        Raises:
            CheckpointError: the teacher cannot be loaded.
            UsageError: it has another vocabulary.
            OutputError: the disk is full or fails.
        """
        if job.distill is None:
            return cls()
        precision = torch.bfloat16 if job.training.precision == "bfloat16" else torch.float32
        folder = Path(job.distill.teacher or job.model)
        if job.distill.top_k is None:
            stage("loading the teacher")
            return cls.beside(job, processes)
        return cls(cache=_cached(folder, job, run, rows, processes, files, precision, stage))

    @classmethod
    def beside(cls, job: Job, processes: Processes) -> Teacher:
        """Return the teacher that runs beside the student, nobody where there is none or it is asked before.

        Raises:
            CheckpointError: it cannot be loaded.
            UsageError: it has another vocabulary.
        """
        if job.distill is None or job.distill.top_k is not None:
            return cls()
        precision = torch.bfloat16 if job.training.precision == "bfloat16" else torch.float32
        model = _frozen(Path(job.distill.teacher or job.model), job, processes.device)
        return cls(model=model, precision=precision)

    def hints(self, rows: dict[str, Tensor], indices: Tensor) -> Hints | None:
        """Return what it says of the learnt tokens of some rows.

        Args:
            rows: a batch.
            indices: the places of its rows among all.
        """
        if self._model is not None:
            with torch.no_grad():
                return Hints(logits=learnt_logits(self._model, rows, self._precision)[0])
        if self._cache is not None:
            ids, logs = self._cache.rows(indices)
            device = rows["targets"].device
            return Hints(ids=ids.to(device), logs=logs.to(device))
        return None


def _frozen(folder: Path, job: Job, device: torch.device) -> nn.Module:
    """Load a teacher that never changes, in BF16 values."""
    dtype = torch.bfloat16 if job.training.precision == "bfloat16" else torch.float32
    model = load(folder, dtype=dtype, device=device, follow_links=job.follow_links)
    ours = _vocabulary(job)
    if model.config.vocab_size != ours:
        raise UsageError(f"distill: the teacher knows {model.config.vocab_size} tokens, the student {ours}")
    keep_out_of_autocast(model)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _vocabulary(job: Job) -> int:
    """Return how many tokens the student knows."""
    student: Any = open_checkpoint(Path(job.model), follow_links=job.follow_links).config or {}
    return int(student.get("text_config", student)["vocab_size"])  # the student was built from it


def _cached(
    folder: Path,
    job: Job,
    run: Run,
    rows: Rows,
    processes: Processes,
    files: Mapping[str, str] | None,
    precision: torch.dtype,
    stage: Callable[[str], None],
) -> Cache:
    """Let the first process compute what the teacher says, and all read it."""
    assert job.distill is not None and job.distill.top_k is not None  # noqa: S101, PT018  asked before
    if processes.leads:
        stage("asking the teacher")
        identity = {"teacher": files, "data": rows.digest}
        model = _Lazy(folder, job, processes.device)

        def logits(row: int) -> Tensor:
            one = {name: tensor.to(processes.device) for name, tensor in batch(rows, torch.tensor([row])).items()}
            with torch.no_grad():
                return learnt_logits(model.get(), one, precision)[0]

        build_cache(
            run.teacher,
            rows.targets,
            logits,
            top_k=job.distill.top_k,
            temperature=job.distill.temperature,
            identity=identity,
        )
    processes.wait()
    return Cache(run.teacher, rows.targets, _vocabulary(job))


class _Lazy:
    """A teacher that is loaded when it is first asked."""

    def __init__(self, *how: Any) -> None:
        self._how = how
        self._model: nn.Module | None = None

    def get(self) -> nn.Module:
        """Return it."""
        if self._model is None:
            self._model = _frozen(*self._how)
        return self._model
