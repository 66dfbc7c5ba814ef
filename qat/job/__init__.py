"""The job file: everything that a training is made of, read from YAML and checked before anything is loaded.

A key that is not known is an error, since a setting that is silently passed over is a silently different model. So is
a setting without effect, and a section with nothing under it is there, with its defaults.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from k2quant.checkpoint.files.strict_yaml import read_mapping
from k2quant.conversion.resume import refuse_nested
from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import FAKE_BITS, PACKED_BITS, largest_code
from k2quant.qat.config import QATConfig, shown

_LIMIT = 2**20  # bytes of a job file
_NO_PART = {"model", "output", "saving", "trust_remote_code"}  # in what decides the trained weights
_MOST = 2**31
_MOST_BETA = 0.9999999  # of what float32 rounds to 1, a mean would never move
_MOST_STEPS = 10**8 - 1  # the names of checkpoints have eight digits

Precision = Literal["float32", "bfloat16"]
Method = Literal["adamw", "muon"]
Decay = Literal["cosine", "linear", "constant"]
Experts = Literal["eager", "batched_mm", "grouped_mm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is learnt from."""

    path: str
    """A JSONL file, a folder of them, or the name of a dataset of the `datasets` library."""
    split: str = "train"
    """Of a dataset of the hub."""
    config: str | None = None
    """The same."""
    length: int = 1024
    """Tokens of a row; examples lie side by side in it and do not see one another."""
    held_out: int = 16
    """Rows that are not trained on but measured."""

    def __post_init__(self) -> None:
        _whole("length", self.length, 2)
        _whole("held_out", self.held_out, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How much, and in which pieces."""

    steps: int
    """Steps of the optimizer."""
    batch: int = 16
    """Rows of a step, over all devices."""
    micro_batch: int | None = None
    """Rows of a forward pass on one device; None: all of a device's share at once."""
    seed: int = 0
    """Of the order of the rows."""
    precision: Precision = "float32"
    """Of products: `bfloat16` computes under autocast."""
    masters: Precision = "float32"
    """Of the weights that are trained."""
    gradient_checkpointing: bool = False
    """Whether activations are computed anew in the backward pass."""
    experts: Experts | None = None
    """transformers' implementation of the experts; None: the fastest for the device."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    evaluate_every: int = 100
    """Steps between measurements on the held-out rows; there is one before the first step and after the last."""
    least_tokens: int = 100
    """An expert that saw fewer keeps its weights of the start, rounded: they would be noise."""
    fake_quantize: bool = True
    """Whether weights are fake-quantised while they train; false for a control: trained as long, rounded afterwards."""
    shard: bool = False
    """Whether parameters are sharded over the processes, with torch's `fully_shard`."""

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, _MOST_STEPS)
        for name in ("batch", "evaluate_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("seed", "least_tokens"):
            _whole(name, getattr(self, name), 0)
        if self.micro_batch is not None:
            _whole("micro_batch", self.micro_batch, 1)
        _number("clip", self.clip, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How weights move."""

    method: Method = "adamw"
    """`muon`: torch's Muon for matrices, at AdamW's rates (arXiv 2502.16982); AdamW for the rest."""
    rate: float = 1e-5
    """Highest learning rate."""
    scale_rate: float | None = None
    """That of learned scales, which are trained as ratios; None: `rate`."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    """Of matrices."""
    warmup: int = 0
    """Steps in which the rate grows from nothing."""
    decay: Decay = "cosine"
    """How the rate falls after that."""
    floor: float = 0.1
    """Share of the rate that is left at the end."""

    def __post_init__(self) -> None:
        _number("rate", self.rate, above=0)
        if self.scale_rate is not None:
            _number("scale_rate", self.scale_rate, above=0)
        _whole("warmup", self.warmup, 0)
        _number("weight_decay", self.weight_decay, least=0)
        _number("floor", self.floor, least=0, most=1)
        for name in ("beta1", "beta2"):
            _number(name, getattr(self, name), least=0, most=_MOST_BETA)

    def share(self, step: int, steps: int) -> float:
        """Return the share of the highest rate that a step takes; the first is 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        gone = (step - self.warmup) / max(steps - self.warmup, 1)
        shape = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[self.decay]
        return 1.0 if self.decay == "constant" else self.floor + (1 - self.floor) * shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What is learnt from a teacher."""

    teacher: str | None = None
    """Folder of a checkpoint; None: the model itself as it was."""
    weight: float = 0.5
    """Share of the divergence from the teacher in the loss; the rest is cross-entropy."""
    temperature: float = 1.0
    """Softens both distributions."""
    top_k: int | None = None
    """So many likeliest tokens of the teacher are computed once, before training, and kept on the disk; None: the
    teacher runs beside the student."""

    def __post_init__(self) -> None:
        _number("weight", self.weight, above=0, most=1)
        _number("temperature", self.temperature, above=0, most=100)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What is kept of a training while it runs."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the last ones."""
    tensorboard: bool = False
    """Whether curves are also written for TensorBoard."""

    def __post_init__(self) -> None:
        _whole("every", self.every, 1)
        _whole("keep", self.keep, 1, 1000)


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
        if self.quantize.to == "int4" and self.final_bits not in PACKED_BITS:
            raise UsageError(
                f"quantize: {self.final_bits}-bit codes have no place in a checkpoint; end with 4 bits or fewer"
            )
        if self.quantize.estimator == "learned" and not self.training.fake_quantize:
            raise UsageError("training: a control (`fake_quantize: false`) learns no scales; use `estimator: plain`")
        if self.optimizer.scale_rate is not None and self.quantize.estimator != "learned":
            raise UsageError("optimizer: scale_rate has a meaning with `estimator: learned` alone")
        if self.training.shard:
            refuse_sharded(self)

    def _check_bits(self) -> None:
        """Refuse widths that change and cannot."""
        last, steps = self.bits[-1], self.training.steps
        if self.quantize.to != "int4":
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
        whole["data"].pop("path")
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


def read_job(path: Path, *, trust_remote_code: bool = False) -> Job:
    """Read a job file.

    Raises:
        UsageError: it cannot be read, is no YAML mapping, lacks a key or has an unknown one, or a value makes no sense
            or has no effect.
    """
    content = read_mapping(path, _LIMIT)
    if "bits" in content:
        raise UsageError(f"{path}: unknown key 'bits'; it belongs under `quantize`")
    try:
        job = job_from(_filled(Job, content))
        _check_effect(job)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return replace(_located(job), trust_remote_code=trust_remote_code)


def _filled(kind: type, content: dict[Any, Any]) -> dict[Any, Any]:
    """Return what a file holds, each section with nothing under it as `{}`, if it can do with its defaults.

    YAML reads it as null, which would be no section at all. That is what null means in the manifest of a run.
    """
    found = dict(content)
    for name, hint in typing.get_type_hints(kind).items():
        section = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        if section is None:
            continue
        if name in found and found[name] is None and not _needed(cast("type", section)):
            found[name] = {}
        elif isinstance(found.get(name), dict):
            found[name] = _filled(cast("type", section), found[name])
    return found


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
        distill = replace(distill, teacher=_absolute(distill.teacher))
    return replace(job, model=_absolute(job.model), output=_absolute(job.output), data=data, distill=distill)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def check_folders(job: Job) -> None:
    """Refuse a job whose model or teacher is not there, or whose output would lie in the model or hold it.

    Raises:
        UsageError: so it is; the message names the key.
    """
    for name, folder in (("model", job.model), ("distill: teacher", job.distill.teacher if job.distill else None)):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{name}: no such folder: {folder}")
    refuse_nested(Path(job.model), Path(job.output))


def job_from(content: Mapping[Any, Any]) -> Job:
    """Make a job of what a YAML or JSON file holds.

    Raises:
        UsageError: see `read_job`.
    """
    content = dict(content)
    if "trust_remote_code" in content:
        raise UsageError("trust_remote_code is no key of a file; it is an option of the command line")
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
    return replace(_build(Job, content, ""), bits=ramp)


def _pairs(content: object) -> dict[Any, Any]:
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise UsageError(f"bits: expected pairs of step and width, found {content!r:.100}")
    if any(isinstance(step, list | dict) for step, _ in content):
        raise UsageError(f"bits: expected pairs of step and width, found {content!r:.100}")
    return dict(content)


def _ramp(content: Mapping[Any, Any]) -> tuple[tuple[int, int | None], ...]:
    """Read widths by their first step."""
    for step, bits in content.items():
        _whole("quantize: bits: a step", step, 0)
        if bits is not None and (type(bits) is not int or bits not in FAKE_BITS):
            raise UsageError(f"quantize: bits: expected {', '.join(map(str, FAKE_BITS))} or null, found {shown(bits)}")
    if 0 not in content:
        raise UsageError("quantize: bits: say what holds from step 0 on")
    return tuple(sorted(content.items()))


_Type = TypeVar("_Type")


def _build(kind: type[_Type], content: object, where: str) -> _Type:
    """Make a dataclass of a mapping, checking names and types."""
    if not isinstance(content, Mapping):
        found = "nothing" if content is None else type(content).__name__
        raise UsageError(f"{where or 'job'}: expected keys and values, found {found}")
    known = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    hidden = {"trust_remote_code", "bits"} if kind is Job else set()
    prefix = f"{where}: " if where else ""
    for name in content:
        if name not in known or name in hidden:
            listed = ", ".join(sorted(known.keys() - hidden))
            raise UsageError(f"{prefix}unknown key {shown(name)}; known are {listed}")
    for name in _needed(kind):
        if name not in content:
            raise UsageError(f"{prefix}the key {name!r} is missing")
    types_of = typing.get_type_hints(kind)
    values = {name: _value(types_of[name], value, f"{prefix}{name}") for name, value in content.items()}
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from error


def _needed(kind: type) -> list[str]:
    """Return the names of a dataclass's fields that have no default."""
    parts = fields(kind)
    return [part.name for part in parts if part.default is MISSING and part.default_factory is MISSING]


def _value(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a field of this type wants it."""
    origin = get_origin(kind)
    if origin in {types.UnionType, typing.Union}:
        inner = next(one for one in get_args(kind) if one is not type(None))
        return None if value is None else _value(inner, value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{where}: expected {', '.join(get_args(kind))}, found {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list, found {shown(value)}")
        return tuple(_value(get_args(kind)[0], one, where) for one in value)
    return _build(cast("type", kind), value, where) if is_dataclass(kind) else _plain(kind, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    """Return text, a number or a truth value."""
    if kind is float and (type(value) is int or isinstance(value, str)):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{where}: expected {words.get(kind, kind)}, found {shown(value)}")
    return value


def _whole(name: str, value: object, least: int, most: int = _MOST) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name}: expected a whole number from {least} to {most}, found {shown(value)}")


def _number(
    name: str, value: object, *, above: float | None = None, least: float | None = None, most: float = 1e6
) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not (above is None or value > above) or not (least is None or value >= least) or not value <= most:  # type: ignore[operator]
        span = f"above {above:g}, at most" if above is not None else f"from {least or 0:g} to"
        raise UsageError(f"{name}: expected a number {span} {most:.15g}, found {shown(value)}")
