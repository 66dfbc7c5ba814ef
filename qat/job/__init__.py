"""The job file: everything that a training is made of, read from YAML and checked before anything is loaded.

A key that is not known is an error, since a setting that is silently passed over is a silently different model. So is
a setting without effect, and a section with nothing under it is there, with its defaults.
"""

from __future__ import annotations

from k2quant.qat.job.job import Job, check_data, check_folders, refuse_sharded
from k2quant.qat.job.reading import job_from, read_job
from k2quant.qat.job.sections import (
    Data,
    Decay,
    Distillation,
    Experts,
    Fallback,
    Method,
    Optimizer,
    Precision,
    Saving,
    Training,
)
from k2quant.qat.job.template import write_template

__all__ = [
    "Data",
    "Decay",
    "Distillation",
    "Experts",
    "Fallback",
    "Job",
    "Method",
    "Optimizer",
    "Precision",
    "Saving",
    "Training",
    "check_data",
    "check_folders",
    "job_from",
    "read_job",
    "refuse_sharded",
    "write_template",
]
