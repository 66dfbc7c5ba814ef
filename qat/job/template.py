"""A job file for a model, to be edited: every key with its meaning and default, and values that fit the model."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from math import prod
from pathlib import Path
from typing import Any, get_args

import yaml

from k2quant.checkpoint.files.paths import write_whole
from k2quant.checkpoint.files.strict_yaml import parse_mapping
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.data.learning import Reasoning, Turns
from k2quant.errors import OutputError, UnsupportedFormat, UsageError
from k2quant.formats.known import ExportFormat
from k2quant.ground import names
from k2quant.ground.units import size
from k2quant.kernels.codecs.grids import Grid
from k2quant.qat.config import Adapter, Estimator, QATConfig, TrainedPart
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

MEANINGS: Mapping[str, str] = {
    "model": "folder of the checkpoint to begin with, in any format",
    "output": "folder of the run: checkpoints, history, report",
    "data.path": "a JSONL file, a folder of them, or a dataset's name, `org/name`, for `datasets` (extra `qat`)",
    "data.split": "of a dataset; refused for files",
    "data.config": "of a dataset that has several; refused for files",
    "data.length": "tokens of a row",
    "data.held_out": "rows, the last ones, that are measured and never learnt",
    "data.turns": "of the assistant that are learnt: all of a conversation's, or the last alone",
    "data.reasoning": "what becomes of reasoning that the chat template does not write; see Chat, tools and reasoning",
    "training.steps": "steps of the optimizer",
    "training.batch": "rows of a step, over all devices",
    "training.micro_batch": "rows of a forward pass on one device; null: a device's whole share",
    "training.seed": "of the order of rows, and of torch",
    "training.precision": "of products; `bfloat16` computes under autocast",
    "training.masters": "of the weights that are trained; BF16 masters lose steps below their last bit",
    "training.gradient_checkpointing": "compute activations anew in the backward pass",
    "training.experts": "transformers' implementation of the experts; null: the fastest for the device",
    "training.clip": "largest norm of the gradient",
    "training.evaluate_every": "steps between measurements; there is one before the first step and one after the last",
    "training.least_tokens": "an expert that saw fewer keeps its weights of the start; see Starved experts",
    "training.fallback": "how these are rounded, and all of a job that is exported untrained; see Starved experts",
    "training.fallback_stats": "folder that `k2quant calibrate` wrote of the model; with `fallback: imatrix`",
    "training.fake_quantize": "false for a control: rounded only when measured and exported",
    "training.shard": "shard parameters over the processes with torch's `fully_shard`",
    "quantize.to": "format of the export",
    "quantize.bits": "width of INT4's codes; see Ramp",
    "quantize.grid": "rounding rule of INT4; `moonshot` for anything that continues a Kimi release",
    "quantize.layout": "whose names and config the export has; null: the format's own",
    "quantize.scope": "what is fake-quantised; null: as the table above",
    "quantize.ignore": "regular expressions; a weight in whose name one is found stays out of scope; one that is found "
    "nowhere is an error",
    "quantize.allow_split": "whether what engines fuse may be fake-quantised in part",
    "quantize.estimator": "see Estimators",
    "quantize.train": "everything; what is fake-quantised alone; low-rank updates of that",
    "quantize.adapter.rank": "inner dimension of the updates, with `train: adapters`",
    "quantize.adapter.alpha": "they are multiplied by alpha / rank",
    "quantize.train_router": "whether the router's weights train, with `train: all`; its correction bias never does",
    "optimizer.method": "see Muon",
    "optimizer.rate": "highest learning rate",
    "optimizer.scale_rate": "that of learned scales; null: `rate`",
    "optimizer.beta1": "AdamW's",
    "optimizer.beta2": "AdamW's",
    "optimizer.weight_decay": "of matrices",
    "optimizer.warmup": "steps in which the rate grows from nothing; at most `training.steps`",
    "optimizer.decay": "how it falls after that",
    "optimizer.floor": "share of the rate that is left at the end",
    "distill.teacher": "folder of a checkpoint; null: the model itself as it was. The section `distill` alone, even "
    "with nothing under it, turns distillation on",
    "distill.weight": "share of the divergence in the loss; the rest is cross-entropy",
    "distill.temperature": "softens both distributions",
    "distill.top_k": "so many likeliest tokens are computed once and kept on the disk; null: the teacher runs beside "
    "the student",
    "saving.every": "steps between checkpoints",
    "saving.keep": "checkpoints that are kept, the last ones",
    "saving.tensorboard": "also write curves for TensorBoard (extra `qat`)",
}
"""What each key means, in the words of docs/qat.md."""

_SECTIONS = (
    ("data", Data),
    ("training", Training),
    ("quantize", QATConfig),
    ("optimizer", Optimizer),
    ("distill", Distillation),
    ("saving", Saving),
)
_CHOICES: Mapping[str, object] = {
    "quantize.to": ExportFormat,
    "quantize.bits": "4, 3, 2, or by the first step of each, {0: null, 100: 8, 200: 4}",
    "quantize.grid": Grid,
    "quantize.layout": "modelopt, compressed-tensors (NVFP4); deepseek, compressed-tensors (FP8)",
    "quantize.scope": "experts (the routed ones), linear (all but kv_b_proj), projections (all)",
    "quantize.estimator": Estimator,
    "quantize.train": TrainedPart,
    "data.turns": Turns,
    "data.reasoning": Reasoning,
    "training.precision": Precision,
    "training.masters": Precision,
    "training.experts": Experts,
    "training.fallback": Fallback,
    "optimizer.method": Method,
    "optimizer.decay": Decay,
}
"""The words that a key takes: those of a type, or a sentence where that says more."""

_WIDE = 100
_NAME_SHOWN = 100  # letters of a model's name
_SMALL, _LARGE = 10**9, 3 * 10**10  # weights: the first are tried on a CPU, of the others not all are trained
_EVERYTHING, _ADAPTED = 20, 4  # bytes a weight, as docs/qat.md adds them up


def write_template(
    model: Path,
    path: Path,
    *,
    to: ExportFormat,
    data: str | None = None,
    follow_links: bool = False,
    force: bool = False,
) -> None:
    """Write a job file for a model; of it only headers and config are read.

    Args:
        model: folder of the checkpoint.
        path: of the file.
        to: format of the export.
        data: what to learn from; None leaves a name to be replaced.
        follow_links: whether links of the model's folder may lead out of it.
        force: whether a file that is there may be replaced.

    Raises:
        UsageError: the file is there, and `force` was not asked for.
        CheckpointError: the model's headers or config cannot be used.
        UnsupportedFormat: it has no routed experts, without which there is no QAT.
        OutputError: the file cannot be written.
    """
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"{path}: is there already; name another file, or replace it with `force=True`")
    text = template(model, to=to, data=data, follow_links=follow_links, name=str(path))
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise OutputError("cannot be written", file=path, found=error.strerror or str(error)) from error


def template(model: Path, *, to: ExportFormat, data: str | None, follow_links: bool, name: str) -> str:
    """Return the text of a job file for a model, with commands that call it by its name; see `write_template`."""
    checkpoint = open_checkpoint(model, follow_links=follow_links)
    classes = _classes(checkpoint)
    if "routed experts" not in classes:
        raise UnsupportedFormat(
            "has no routed experts", file=model, remedy="QAT is for models of the K2 family; see k2quant inspect"
        )
    values = _fit(model, sum(classes.values()), checkpoint.config or {}, to, data)
    return "\n".join([*_head(model, classes, name), *_body(values), ""])


def _classes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of weights by tensor class."""
    found: dict[str, int] = {}
    for weight in group_tensors(checkpoint.tensors).weights:
        kind = names.tensor_class(weight.main.name)
        found[kind] = found.get(kind, 0) + prod(weight.shape)
    return {kind: found[kind] for kind in names.TENSOR_CLASSES if kind in found}


def _fit(model: Path, weights: int, config: Mapping[str, Any], to: str, data: str | None) -> dict[str, object]:
    """Choose values by the number of weights: what is tried on a CPU, what a few GPUs hold, and what they do not."""
    small, large = weights < _SMALL, weights >= _LARGE
    inner = config.get("text_config", config)
    longest = inner.get("max_position_embeddings") if isinstance(inner, dict) else None
    length = 256 if small else 4096
    steps = 300 if small else 1000
    values: dict[str, object] = {
        "model": str(model),
        "output": f"runs/{model.resolve().name or 'model'}-{to}",
        "data.path": data or "train.jsonl",
        "data.length": min(length, longest) if type(longest) is int and longest > 1 else length,
        "training.steps": steps,
        "training.batch": 16,
        "quantize.to": to,
        "optimizer.rate": 1e-4 if small or large else 1e-5,
        "optimizer.warmup": steps // 20,
    }
    if not small:
        values |= {
            "training.micro_batch": 1,
            "training.precision": "bfloat16",
            "training.gradient_checkpointing": True,
        }
    if large:
        values |= {"training.masters": "bfloat16", "quantize.train": "adapters", "quantize.adapter.rank": 16}
    return values


def _head(model: Path, classes: Mapping[str, int], name: str) -> Iterator[str]:
    whole = sum(classes.values())
    called, job = _plain(model.resolve().name)[:_NAME_SHOWN], _plain(shlex.quote(name))
    yield f"# A training of {called} for k2quant qat. A key after # has the value shown without"
    yield "# being asked for: take the # away to change it. Paths are seen from where the command runs."
    yield "#"
    yield f"#   k2quant qat plan {job}    what it takes, before anything is trained"
    yield f"#   k2quant qat train {job}   the same command again goes on after a kill"
    yield "#"
    yield f"# The model has {whole:,} weights:"
    for kind, weights in classes.items():
        yield f"#   {kind:<16} {weights:>20,}  {weights / max(whole, 1):6.1%}"
    yield f"# Weights, gradients and moments of all of it in float32 are about {size(_EVERYTHING * whole)};"
    yield f"# adapters on BF16 weights take about {size(_ADAPTED * whole)}. `plan` says it to the byte."
    yield ""


def _body(values: Mapping[str, object]) -> Iterator[str]:
    for key in ("model", "output"):
        yield from _entry(key, values, None, "")
    for section, kind in _SECTIONS:
        yield ""
        # Of the sections that hold no key an empty one is its defaults, but for `distill`, which would distil.
        yield f"{'#' if section == 'distill' else ''}{section}:"
        for part in fields(kind):
            key = f"{section}.{part.name}"
            if key == "quantize.adapter":
                yield from _adapter(values)
            else:
                yield from _entry(key, values, part, "  ")


def _adapter(values: Mapping[str, object]) -> Iterator[str]:
    used = any(key.startswith("quantize.adapter.") for key in values)
    yield f"  {'' if used else '#'}adapter:"
    for part in fields(Adapter):
        yield from _entry(f"quantize.adapter.{part.name}", values, part, "    ")


def _entry(key: str, values: Mapping[str, object], part: Field[Any] | None, indent: str) -> Iterator[str]:
    """Yield the comment of a key, and the key; with a # before it where it has its default."""
    said = (
        MEANINGS[key]
        .replace("see ", "docs/qat.md, ")
        .replace("as the table above", "linear for FP8, experts for the others")
    )
    default = part is not None and part.default is not MISSING
    if words := _CHOICES.get(key):
        said += f"; one of {words if isinstance(words, str) else ', '.join(get_args(words))}"
    if default and key in values:
        said += f" (default: {_scalar(part.default if part else None)})"
    if key == "data.path" and values[key] == "train.jsonl":
        said = f"YOURS, to be named here: {said}. A line holds text; prompt and completion; or messages"
    yield from textwrap.wrap(
        said, _WIDE, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )
    name = key.rpartition(".")[2]
    value = values.get(key, part.default if part else None)
    yield f"{indent}{'' if key in values else '#'}{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    """Return a value as YAML; text in quotes where it would be read as anything else."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    return "[]" if value == () else str(value)


def _is_plain(text: str) -> bool:
    try:
        return text.isprintable() and parse_mapping(f"a: {text}".encode(), file="") == {"a": text}
    except UsageError:
        return False


def _quoted(text: str) -> str:
    """Return text in quotes as YAML has them: JSON's two escapes for an emoji would be two letters."""
    found: str = yaml.safe_dump(text, default_style='"', width=math.inf)
    return found.strip()


def _plain(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)
