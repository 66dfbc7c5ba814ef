"""What is to be exported, as the disk tells without torch: so a slip is answered at once."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from k2quant.checkpoint.files.sources import no_folder
from k2quant.errors import UsageError
from k2quant.qat.job import Job, read_job
from k2quant.qat.run.folder import Run


def asked_job(
    folder: Path, *, to: str | None = None, base: str | os.PathLike[str] | None = None, follow_links: bool = False
) -> Job:
    """Return the job whose model is to be exported, with the place where its base lies now.

    Args:
        folder: of a run; or a job's file.
        to: the format that was asked for; None for the one that was trained for.
        base: where the model lies that the training began with; None: where it lay then.
        follow_links: whether links of the model's folder may lead out of it.

    Raises:
        UsageError: another format than was trained for, or there is no such folder.
        CheckpointError: the folder is no training's.
    """
    job = read_job(folder) if folder.is_file() else Run(folder).job()
    if to not in {None, job.quantize.to}:
        raise UsageError(f"{folder} was trained for {job.quantize.to}, not for {to}; use `k2quant convert` for that")
    job = dataclasses.replace(job, model=job.model if base is None else str(base), follow_links=follow_links)
    if why := no_folder(job.model):
        raise UsageError(f"model: {job.model}: {why}; if it was moved, name its place with `model=`")
    return job
