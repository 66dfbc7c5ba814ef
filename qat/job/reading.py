"""A job read from a file, or made of what a file holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.strict_yaml import read_mapping
from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import FAKE_BITS
from k2quant.qat.config import shown
from k2quant.qat.job.building import build, filled
from k2quant.qat.job.job import Job
from k2quant.qat.job.limits import whole
from k2quant.qat.job.sections import Data

_SWITCHES = ("follow_links", "trust_remote_code")  # of the command line, never of a file
_LIMIT = 2**20  # bytes of a job file
_NO_KEYS = {"bits", *_SWITCHES}  # of a file's top: they are read from elsewhere


def read_job(path: Path, *, trust_remote_code: bool = False, follow_links: bool = False) -> Job:
    """Read a job file.

    Args:
        path: of the file.
        trust_remote_code: whether a tokenizer that is code may run.
        follow_links: whether links of the model's folder, and of the teacher's, may lead out of it.

    Raises:
        UsageError: it cannot be read, is no YAML mapping, lacks a key or has an unknown one, or a value makes no sense
            or has no effect.
    """
    content = read_mapping(path, _LIMIT)
    if "bits" in content:
        raise UsageError(f"{path}: unknown key 'bits'; it belongs under `quantize`")
    try:
        job = job_from(filled(Job, content))
        _check_effect(job)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return replace(_located(job), trust_remote_code=trust_remote_code, follow_links=follow_links)


def _check_effect(job: Job) -> None:
    """Refuse what would change nothing. A run that was begun with it goes on, so a `Job` may hold it."""
    warmup, steps = job.optimizer.warmup, job.training.steps
    if warmup > steps:
        raise UsageError(
            f"optimizer: warmup: expected at most the {steps} steps of `training`, found {warmup}; "
            "the rate would never reach its highest"
        )
    local = os.path.lexists(job.data.path)
    for part in fields(Data):
        if local and part.name in {"split", "config"} and getattr(job.data, part.name) != part.default:
            raise UsageError(
                f"data: {part.name}: has a meaning for a dataset of a hub alone, and {job.data.path} is a file or "
                "folder here; leave it out"
            )


def _located(job: Job) -> Job:
    """Write out where files lie that are named as seen from here, so that the run can be exported from anywhere."""
    data = replace(job.data, path=_absolute(job.data.path)) if Path(job.data.path).exists() else job.data
    distill = job.distill
    if distill is not None and distill.teacher is not None:
        distill = replace(distill, teacher=_found(distill.teacher))
    training = job.training
    if training.fallback_stats is not None:
        training = replace(training, fallback_stats=_found(training.fallback_stats))
    found = replace(job, data=data, distill=distill, training=training)
    return replace(found, model=_found(job.model), output=_absolute(job.output))


def _found(path: str) -> str:
    """Write out where a folder lies; what is not there is named in the error as it stands in the file."""
    return _absolute(path) if os.path.lexists(path) else path


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def job_from(content: Mapping[Any, Any]) -> Job:
    """Make a job of what a YAML or JSON file holds.

    Raises:
        UsageError: see `read_job`.
    """
    content = dict(content)
    if given := next((name for name in _SWITCHES if name in content), None):
        raise UsageError(f"{given} is no key of a file; it is an option of the command line")
    ramp: tuple[tuple[int, int | None], ...] = ()
    quantize = content.get("quantize")
    if isinstance(quantize, Mapping) and isinstance(quantize.get("bits"), Mapping):
        ramp = _ramp(quantize["bits"])
        content["quantize"] = {name: value for name, value in quantize.items() if name != "bits"}
        if ramp[-1][1] is not None:  # else the job says that it must be a number
            content["quantize"]["bits"] = ramp[-1][1]
    elif "bits" in content:
        pairs = content.pop("bits")  # as `identity` has them
        ramp = _ramp(_pairs(pairs)) if pairs else ()
    return replace(build(Job, content, "", hidden=_NO_KEYS), bits=ramp)


def _pairs(content: object) -> dict[Any, Any]:
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise UsageError(f"bits: expected pairs of step and width, found {content!r:.100}")
    if any(isinstance(step, list | dict) for step, _ in content):
        raise UsageError(f"bits: expected pairs of step and width, found {content!r:.100}")
    return dict(content)


def _ramp(content: Mapping[Any, Any]) -> tuple[tuple[int, int | None], ...]:
    """Read widths by their first step."""
    for step, bits in content.items():
        whole("quantize: bits: a step", step, 0)
        if bits is not None and (type(bits) is not int or bits not in FAKE_BITS):
            raise UsageError(f"quantize: bits: expected {', '.join(map(str, FAKE_BITS))} or null, found {shown(bits)}")
    if 0 not in content:
        raise UsageError("quantize: bits: say what holds from step 0 on")
    return tuple(sorted(content.items()))
