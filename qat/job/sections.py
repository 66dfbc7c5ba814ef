"""The sections of a job: what each of its keys means, and which values make sense by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from k2quant.data.learning import Reasoning, Turns
from k2quant.errors import UsageError
from k2quant.qat.job.limits import number, whole

_MOST_BETA = 0.9999999  # of what float32 rounds to 1, a mean would never move
_MOST_STEPS = 10**8 - 1  # the names of checkpoints have eight digits

Precision = Literal["float32", "bfloat16"]
Method = Literal["adamw", "muon"]
Decay = Literal["cosine", "linear", "constant"]
Experts = Literal["eager", "batched_mm", "grouped_mm"]
Fallback = Literal["rtn", "mse", "imatrix"]
"""How post-training rounding chooses a group's scale: from its largest weight; searched for the least squared error; or
for the least error of outputs, as a calibration tells what the inputs are."""


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
    turns: Turns = "all"
    """Of the assistant that are learnt: all of a conversation's, or the last alone."""
    reasoning: Reasoning = "refuse"
    """What becomes of reasoning in a learnt turn that the chat template does not write: the job is refused; the turn is
    learnt without it; that turn is not learnt; or each turn is learnt as it is asked for, with its reasoning."""

    def __post_init__(self) -> None:
        whole("length", self.length, 2)
        whole("held_out", self.held_out, 0)


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
    fallback: Fallback = "rtn"
    """How they are rounded then, and all that is exported of a job that was not trained."""
    fallback_stats: str | None = None
    """Folder that `k2quant calibrate` wrote of the model; with `imatrix`, and with nothing else."""
    fake_quantize: bool = True
    """Whether weights are fake-quantised while they train; false for a control: trained as long, rounded afterwards."""
    shard: bool = False
    """Whether parameters are sharded over the processes, with torch's `fully_shard`."""

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1, _MOST_STEPS)
        for name in ("batch", "evaluate_every"):
            whole(name, getattr(self, name), 1)
        for name in ("seed", "least_tokens"):
            whole(name, getattr(self, name), 0)
        if self.micro_batch is not None:
            whole("micro_batch", self.micro_batch, 1)
        number("clip", self.clip, above=0)
        if self.fallback == "imatrix" and not self.fallback_stats:
            raise UsageError("fallback_stats: `imatrix` needs the folder that `k2quant calibrate` wrote of the model")
        if self.fallback != "imatrix" and self.fallback_stats is not None:
            raise UsageError(f"fallback_stats: has a meaning with `fallback: imatrix` alone, found {self.fallback}")


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
        number("rate", self.rate, above=0)
        if self.scale_rate is not None:
            number("scale_rate", self.scale_rate, above=0)
        whole("warmup", self.warmup, 0)
        number("weight_decay", self.weight_decay, least=0)
        number("floor", self.floor, least=0, most=1)
        for name in ("beta1", "beta2"):
            number(name, getattr(self, name), least=0, most=_MOST_BETA)

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
        number("weight", self.weight, above=0, most=1)
        number("temperature", self.temperature, above=0, most=100)
        if self.top_k is not None:
            whole("top_k", self.top_k, 1, 4096)


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
        whole("every", self.every, 1)
        whole("keep", self.keep, 1, 1000)
