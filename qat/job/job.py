"""A whole job: its sections, what of it decides the trained weights, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.sources import no_folder
from k2quant.conversion.resume import refuse_nested
from k2quant.data.places import no_data
from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import PACKED_BITS, largest_code
from k2quant.qat.config import QATConfig
from k2quant.qat.job.sections import Data, Distillation, Optimizer, Saving, Training

_NO_PART = {"model", "output", "saving", "follow_links", "trust_remote_code"}  # in what decides the trained weights
_YOUNGER: Mapping[str, Mapping[str, object]] = {
    "data": {"turns": "all", "reasoning": "refuse"},
    "training": {"fallback": "rtn"},
    "quantize": {"layout": None},
}
"""Keys by section that runs of earlier versions do not name, with what they did: a run that was begun goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A whole training."""

    model: str
    """Folder of the checkpoint to begin with, in any format."""
    output: str
    """Folder of the run."""
    data: Data
    training: Training
    quantize: QATConfig = field(default_factory=QATConfig)
    bits: tuple[tuple[int, int | None], ...] = ()
    """Steps from which other widths hold, None for no fake quantisation yet; empty: `quantize.bits` throughout."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    distill: Distillation | None = None
    saving: Saving = field(default_factory=Saving)
    follow_links: bool = False
    """Whether links of the model's folder, and of the teacher's, may lead out of it; an option of the command line."""
    trust_remote_code: bool = False
    """Whether a tokenizer that is code may run; the command line's own option, never a key of a file."""

    def __post_init__(self) -> None:
        for name, path in (("model", self.model), ("output", self.output), ("data: path", self.data.path)):
            if not path:
                raise UsageError(f"{name}: expected a path, found nothing")
        if self.bits:
            self._check_bits()
        micro = self.training.micro_batch or self.training.batch
        if self.training.batch % micro:
            raise UsageError(f"training: batch {self.training.batch} is no multiple of micro_batch {micro}")
        if self.quantize.bit_widths and self.final_bits not in PACKED_BITS:
            raise UsageError(
                f"quantize: {self.final_bits}-bit codes have no place in a checkpoint; end with 4 bits or fewer"
            )
        if self.quantize.estimator == "learned" and not self.training.fake_quantize:
            raise UsageError("training: a control (`fake_quantize: false`) learns no scales; use `estimator: plain`")
        if self.optimizer.scale_rate is not None and self.quantize.estimator != "learned":
            raise UsageError("optimizer: scale_rate has a meaning with `estimator: learned` alone")
        if self.training.fallback != "rtn":
            self._check_fallback()
        if self.training.shard:
            refuse_sharded(self)

    def _check_fallback(self) -> None:
        """Refuse a search of scales where there is none, or where its outcome could not be kept."""
        if self.quantize.grid not in self.quantize.format.searched_grids:
            raise UsageError(
                f"training: fallback: {self.training.fallback} searches scales of int4 on the grid moonshot; use rtn"
            )
        if self.quantize.train == "adapters":
            raise UsageError(
                f"training: fallback: {self.training.fallback} changes weights, which `train: adapters` freezes and no "
                "checkpoint holds; use rtn, or convert the experts that the report lists"
            )

    def _check_bits(self) -> None:
        """Refuse widths that change and cannot."""
        last, steps = self.bits[-1], self.training.steps
        if not self.quantize.bit_widths:
            raise UsageError("quantize: bits that change with the steps are for int4")
        if last[1] is None:
            raise UsageError("quantize: bits: the last width must be a number, for it is exported; found null")
        if last[0] >= steps:
            raise UsageError(f"quantize: bits: the width from step {last[0]} on never comes: there are {steps} steps")
        for bits in {bits for _, bits in self.bits if bits is not None}:
            largest_code(self.quantize.grid, bits)

    def bits_at(self, step: int) -> int | None:
        """Return the width of the codes in a step, the first is 0; None: no fake quantisation yet."""
        if not self.training.fake_quantize:
            return None
        found: int | None = self.quantize.bits
        for begin, bits in self.bits:
            found = bits if begin <= step else found
        return found

    @property
    def final_bits(self) -> int:
        """The width that is exported."""
        last = self.bits[-1][1] if self.bits else self.quantize.bits
        assert last is not None  # noqa: S101  `__post_init__` refused it
        return last

    def identity(self) -> dict[str, Any]:
        """Return what decides the trained weights, but for the files that it names, whose contents are compared."""
        whole = json.loads(json.dumps(asdict(self)))
        whole["training"].pop("shard")  # no more than the number of processes, which may change too
        whole["quantize"].pop("allow_split")  # a permission; what is quantised, its targets say
        whole["data"].pop("path")
        whole["training"].pop("fallback_stats")
        for section, younger in _YOUNGER.items():
            for name, default in younger.items():
                if whole[section][name] == default:
                    whole[section].pop(name)
        if whole["distill"]:
            whole["distill"].pop("teacher")
        return {name: value for name, value in whole.items() if name not in _NO_PART}


def refuse_sharded(job: Job) -> None:
    """Refuse a job that cannot be trained with its parameters in shards.

    Raises:
        UsageError: so it is.
    """
    if job.optimizer.method == "muon":
        raise UsageError("optimizer: muon works on whole matrices, which sharding takes apart; use adamw")
    if job.quantize.estimator != "learned":
        return
    if len(job.bits) > 1:
        raise UsageError("quantize: learned scales begin anew at another width, which sharding takes apart")
    if job.training.masters == "bfloat16":
        raise UsageError(
            "training: learned scales are float32, and fully_shard wants one dtype of all that trains; "
            "use `masters: float32`, or do not shard"
        )


def check_folders(job: Job) -> None:
    """Refuse a job whose model, teacher or calibration is not there, or whose output would lie in the model or hold it.

    Raises:
        UsageError: so it is; the message names the key.
    """
    teacher = job.distill.teacher if job.distill else None
    folders = (
        ("model", job.model),
        ("distill: teacher", teacher),
        ("training: fallback_stats", job.training.fallback_stats),
    )
    for name, folder in folders:
        if folder is not None and (why := no_folder(folder)):
            raise UsageError(f"{name}: {folder}: {why}")
    refuse_nested(Path(job.model), Path(job.output))


def check_data(job: Job) -> None:
    """Refuse a job whose data are not there; one that is trained needs them no more.

    Raises:
        UsageError: so it is; the message names the key.
    """
    if why := no_data(job.data.path):
        raise UsageError(f"data: path: {job.data.path}: {why}")
