"""`plan`: what a job would train, what that takes, and whether its result can be saved; before a weight is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from k2quant.checkpoint.files.paths import nearest_folder
from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.conversion.plan import Plan, make_plan
from k2quant.data.learning import Census, Learning
from k2quant.data.packing import Rows, split
from k2quant.data.sources import DataSource, load_rows
from k2quant.errors import CheckFailed, CheckpointError, OutputError, UsageError
from k2quant.formats.dtypes import as_bits
from k2quant.ground import names
from k2quant.ground.saying.showing import as_html, brief
from k2quant.kernels.codecs.choice import codecs
from k2quant.model.decoding import decoded_rows
from k2quant.model.generation import load_tokenizer
from k2quant.qat.exporting.export import export_options
from k2quant.qat.exporting.starting import PostTraining
from k2quant.qat.exporting.trained import Trained, key
from k2quant.qat.job import Job, check_folders
from k2quant.qat.loading import skeleton
from k2quant.qat.preparing import Prepared, prepare, prepared
from k2quant.qat.rounding import adapters, scales
from k2quant.qat.rounding.estimators import largest_of
from k2quant.qat.rounding.rules import Rule, check_packed, plain_rule
from k2quant.qat.rounding.survey import coverage
from k2quant.qat.rounding.targets import bases_digest, canonical
from k2quant.qat.run import naming
from k2quant.qat.run.folder import MANIFEST, TARGETS, Run

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a job comes to."""

    coverage: dict[str, tuple[int, int]]
    """Weights that are fake-quantised and all weights, by tensor class."""
    trained: int
    """Numbers that the optimizer moves, adapters and learned scales among them."""
    memory: dict[str, int]
    """Bytes on each device, by what they are for; activations come on top."""
    processes: int
    """That these bytes are for."""
    rows: int
    """Of training data."""
    pieces: int
    """Of texts, in the rows: a whole one, or a part of one that is longer than a row."""
    learnt: int
    """Tokens that are learnt, over all rows."""
    held_out: int
    """Rows."""
    census: Census
    """What the data holds: conversations, tools, reasoning."""
    epochs: float
    """Times that the steps go through the rows."""
    checkpoint_bytes: int
    """Of one checkpoint of the training, but for a few numbers that monitors have counted."""
    checkpoints: int
    """That lie on the disk at a time, the one being written among them."""
    teacher_bytes: int
    """Of what a teacher said, where that is kept on the disk."""
    disk_free: int
    """Bytes, where the job's output will lie."""
    export_bytes: int
    """Of the exported checkpoint."""
    notes: tuple[str, ...]
    """What the user should know of the data."""
    begun: int | None
    """Step of the output's last checkpoint, 0 where there is none yet; None where nothing of this job lies there."""
    obstacle: str | None
    """Why `train` would be refused the output as it is."""
    tried: tuple[str, ...]
    """Weights of the base that were encoded, decoded and compared: one of each class that is fake-quantised."""

    work: int
    """Multiplications and additions of a step, about: six for each weight and token, those of experts that a token
    does not reach among them."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    @property
    def bytes_needed(self) -> int:
        """All of `memory`."""
        return sum(self.memory.values())

    @property
    def disk_needed(self) -> int:
        """Bytes of all checkpoints that lie on the disk at a time, and of what the teacher said."""
        return self.checkpoint_bytes * self.checkpoints + self.teacher_bytes


def plan_job(job: Job, *, processes: int = 1) -> JobPlan:
    """Plan a job; of the model only headers and a few matrices are read.

    What lies in the output stops no plan: the plan says what it means for a training.

    Args:
        job: from `read_job`.
        processes: that will train.

    Raises:
        UsageError: no routed expert would be fake-quantised, or another setting makes no sense for this model.
        CheckpointError: model or data cannot be used, or the result could not be saved.
        CheckFailed: what would be stored of a weight is not what the forward pass would see.
    """
    check_folders(job)
    source = open_checkpoint(Path(job.model), follow_links=job.follow_links)
    model = skeleton(source)
    prepare(model, job.quantize)
    found = prepared(model)
    if job.quantize.bit_widths:
        check_packed(job.final_bits)
    export = make_plan(source, export_options(job.quantize), substituted=True)
    Trained(model, found, export)  # every weight has a place, or this says which has none
    if job.training.batch % processes:
        raise UsageError(f"training: batch {job.training.batch} is no multiple of the {processes} processes")
    rows, held_out = read_data(job, model.config)
    post_training = PostTraining.of(job)
    post_training.check(source)
    facts = {"data": rows.digest, "held_out": held_out.digest, TARGETS: bases_digest(found.targets)}
    facts |= post_training.facts()
    begun, obstacle = _output(job, facts)
    sizes, top_k = _Sizes.of(job, model), (job.distill.top_k if job.distill else None) or 0
    return JobPlan(
        coverage=coverage(model, found.targets),
        trained=sizes.trained + sizes.extra,
        memory=_memory(job, model, found, processes, sizes),
        processes=processes,
        rows=len(rows.tokens),
        pieces=rows.documents,
        learnt=rows.learnt,
        held_out=len(held_out.tokens),
        census=rows.census,
        epochs=job.training.steps * job.training.batch / len(rows.tokens),
        checkpoint_bytes=sizes.checkpoint_bytes(_BYTES[job.training.masters]),
        checkpoints=job.saving.keep + 1,
        teacher_bytes=8 * top_k * rows.learnt,  # an id and a logarithm each
        disk_free=shutil.disk_usage(nearest_folder(Path(job.output))).free,
        export_bytes=export.bytes_written,
        notes=(*rows.notes(), *export.remarks),
        work=6 * sizes.weights * job.training.batch * job.data.length,
        begun=begun,
        obstacle=obstacle,
        tried=tuple(tried(job, source, found, export)),
    )


def _output(job: Job, facts: Mapping[str, str]) -> tuple[int | None, str | None]:
    """Return the step that a training would go on from, if it was begun, and why it would be refused, if so."""
    run = Run(Path(job.output))
    try:
        run.check_folder()
        run.compare(job, facts)
    except (OutputError, CheckpointError) as error:
        return None, str(error)
    if not (run.folder / MANIFEST).is_file():
        return None, None
    return max(map(naming.step_of, naming.found(run.checkpoints)), default=0), None


def read_data(job: Job, config: Any) -> tuple[Rows, Rows]:
    """Return the rows that a job trains on, and those that are held out.

    Args:
        job: a job.
        config: of its model.

    Raises:
        UsageError: the model reads no rows so long, or there are fewer than are to be held out.
        CheckpointError: the data or the tokenizer cannot be used.
    """
    longest = config.max_position_embeddings
    if job.data.length > longest:
        raise UsageError(f"data: length {job.data.length} is more than the {longest} tokens that the model reads")
    tokenizer = load_tokenizer(Path(job.model), trust_remote_code=job.trust_remote_code, follow_links=job.follow_links)
    source = DataSource(path=job.data.path, split=job.data.split, config=job.data.config)
    learning = Learning(turns=job.data.turns, reasoning=job.data.reasoning)
    rows = load_rows(source, tokenizer, length=job.data.length, vocabulary=config.vocab_size, learning=learning)
    return split(rows, job.data.held_out)


class _Sizes(NamedTuple):
    """How many numbers a job's model has."""

    weights: int
    extra: int
    """Of adapters and learned scales, which are float32 and all trained."""
    trained: int
    """Weights that the optimizer moves."""
    single: int
    """Of these, those with one moment where others have two."""
    starts: int
    """Scales that learned ones began with."""

    @classmethod
    def of(cls, job: Job, model: nn.Module) -> _Sizes:
        """Count."""
        beside = {scales.CHILD, adapters.CHILD}
        whole = list(model.named_parameters())
        extra = sum(parameter.numel() for name, parameter in whole if beside & set(name.split(".")))
        weights = sum(parameter.numel() for _, parameter in whole) - extra
        trained = sum(parameter.numel() for _, parameter in whole if parameter.requires_grad) - extra
        single = 0 if job.optimizer.method == "adamw" else sum(_moved_by_muon(whole, beside))
        starts = sum(module.start.numel() for module in model.modules() if isinstance(module, scales.LearnedScale))
        return cls(weights, extra, trained, single, starts)

    def checkpoint_bytes(self, width: int) -> int:
        """Return the bytes of what is trained and of its moments, for weights of a width in bytes."""
        return (3 * self.trained - self.single) * width + self.extra * 12 + self.starts * 4


def _memory(job: Job, model: nn.Module, found: Prepared, processes: int, sizes: _Sizes) -> dict[str, int]:
    """Return bytes on each device by purpose."""
    width = _BYTES[job.training.masters]
    shares = processes if job.training.shard else 1
    weights, extra, trained = sizes.weights, sizes.extra, sizes.trained
    seen = 2 if job.training.precision == "bfloat16" else width
    rounded = sum(target.master.numel() for target in found.targets)
    rounded += sum(target.master.numel() for target in found.plain) if width == 4 else 0
    gathered = max(sum(p.numel() for p in layer.parameters()) for layer in _layers(model))
    if shares > 1 and job.training.gradient_checkpointing:  # else they wait for the backward pass, all of them
        rounded = gathered
    memory = {
        "weights": weights * width // shares,
        "gradients": trained * width // shares,
        "optimizer": (2 * trained - sizes.single) * width // shares,
        "rounded weights": rounded * seen,
    }
    if extra:
        memory["adapters or scales"] = extra * 16 // shares
    if shares > 1:
        memory["gathered layer"] = 2 * gathered * width  # weights and gradients
    elif processes > 1:
        memory["gradients in buckets"] = trained * width  # of data parallelism
    if job.distill is not None:  # beside the student, or, for likeliest tokens, before the first step
        memory["teacher"] = weights * seen
    rows = min(job.training.micro_batch or job.training.batch, job.training.batch // processes)
    config: Any = model.config
    memory["logits"] = 3 * 4 * rows * job.data.length * config.vocab_size
    return memory


def _moved_by_muon(whole: list[tuple[str, nn.Parameter]], beside: set[str]) -> Iterator[int]:
    """Yield the sizes of the projections, which have one moment where others have two."""
    for name, parameter in whole:
        inner, fused = beside & set(name.split(".")), names.fused_experts(canonical(name))
        if (
            parameter.requires_grad
            and not inner
            and (fused or names.is_projection(canonical(name).removesuffix(".weight")))
        ):
            yield parameter.numel()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    causal: Any = model
    yield from causal.model.layers


def tried(job: Job, source: Checkpoint, found: Prepared, export: Plan) -> Iterator[str]:
    """Store and read one weight of each class as an export would; yield its name.

    Raises:
        CheckFailed: what would be stored is not what the forward pass would see.
    """
    rule = plain_rule(job.quantize, job.final_bits)
    weights = {key(weight.weight): weight.weight for weight in export.jobs()}
    seen: set[str] = set()
    for target in found.targets:
        kind = names.tensor_class(canonical(target.name))
        if kind in seen:
            continue
        seen.add(kind)
        base = target.parts[0].base
        weight = weights[base]
        start, stop = next(panel_rows(weight.shape))
        values = decoded_rows(source, weight, start, stop)
        one = rule.knowing(largest_of(values, 1)[0]) if rule.surveyed else rule
        if not torch.equal(_decoded(rule, values), one.values(values)):
            raise CheckFailed(
                "what would be stored of it is not what the forward pass would see", tensor=base, file=source.folder
            )
        yield base


def _decoded(rule: Rule, values: torch.Tensor) -> torch.Tensor:
    """Return what is stored of BF16 weights `[R, K]` on the CPU, decoded as a checkpoint is."""
    out, arithmetic = torch.empty_like(values), codecs("cpu")
    settled = rule.format.settled([rule.format.survey(as_bits(values), arithmetic)])
    parts = {suffix: as_bits(tensor) for suffix, tensor in replace(rule, format=settled).stored(values).items()}
    settled.decode(parts, as_bits(out), arithmetic)
    return out
