"""What a step minimises: the loss of the tokens that are learnt, and the divergence from a teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from k2quant.data.packing import NO_TARGET
from k2quant.qat.job import Distillation
from k2quant.qat.training.distillation import divergence, divergence_of_likeliest


class Hints(NamedTuple):
    """What a teacher says of the learnt tokens of some rows: logits `[T, V]`, or likeliest tokens `[T, k]`."""

    logits: Tensor | None = None
    ids: Tensor | None = None
    logs: Tensor | None = None


class Task(nn.Module):
    """A causal LM with its loss; one module, so that data parallelism sees one forward pass."""

    def __init__(self, model: nn.Module, distill: Distillation | None, precision: torch.dtype) -> None:
        """Wrap a model.

        Args:
            model: a causal LM of transformers with `model` and `lm_head`.
            distill: how a teacher is listened to; None: there is none.
            precision: of products; bfloat16 computes under autocast.
        """
        super().__init__()
        self.model = model
        self._distill, self._precision = distill, precision

    def forward(self, batch: dict[str, Tensor], hints: Hints | None = None, *, summed: bool = True) -> Tensor:
        """Return float32 `[2]`: cross-entropy and divergence, each summed over the learnt tokens, in nats.

        Not summed it is `[2, T]`: of each learnt token its cross-entropy, and 1 where it is the likeliest one, else 0.

        Args:
            batch: rows.
            hints: what the teacher says of them.
            summed: whether over the tokens.
        """
        logits, targets = learnt_logits(self.model, batch, self._precision)
        if not summed:
            likeliest = (logits.argmax(-1) == targets).float()
            return torch.stack([functional.cross_entropy(logits, targets, reduction="none"), likeliest])
        entropy = functional.cross_entropy(logits, targets, reduction="sum")
        if hints is None or self._distill is None:
            return torch.stack([entropy, torch.zeros_like(entropy)])
        return torch.stack([entropy, self._divergence(logits, hints)])

    def _divergence(self, logits: Tensor, hints: Hints) -> Tensor:
        assert self._distill is not None  # noqa: S101  asked before
        if hints.logits is not None:
            return divergence(logits, hints.logits, self._distill.temperature)
        assert hints.ids is not None and hints.logs is not None  # noqa: S101, PT018  one of the two kinds
        return divergence_of_likeliest(logits, hints.ids, hints.logs, self._distill.temperature)


def learnt_logits(model: nn.Module, batch: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits `[T, V]`, float32, and targets `[T]` of the tokens of some rows that are learnt."""
    causal: Any = model
    kind = batch["targets"].device.type
    with torch.autocast(kind, precision, enabled=precision != torch.float32):
        hidden = causal.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        learnt = batch["targets"] != NO_TARGET
        logits: Tensor = causal.lm_head(hidden[learnt])
    return logits.float(), batch["targets"][learnt]


class Judged(NamedTuple):
    """What a model makes of rows; all `[B]`."""

    losses: Tensor
    """Summed over the learnt tokens, float64, in nats."""
    learnt: Tensor
    """Tokens, int64."""
    answers: Tensor
    """Documents that begin with what is not learnt, as a prompt is, int64."""
    right: Tensor
    """Answers whose every learnt token is the likeliest after the right ones before it, int64. Of one completion, that
    is what greedy decoding would give."""


@torch.no_grad()
def judged(task: Task, batch: dict[str, Tensor]) -> Judged:
    """Return what a task's model makes of rows, as `batch` gives them."""
    each, likeliest = task(batch, summed=False).cpu()
    targets, positions = batch["targets"].cpu(), batch["position_ids"].cpu()
    learnt = targets != NO_TARGET
    counts = learnt.sum(1)
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    losses = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, row, each.double())
    starts = positions == 0
    document = (starts.flatten().cumsum(0) - 1).view_as(starts)
    wrong = torch.zeros(int(starts.sum()), dtype=torch.int64).index_add_(0, document[learnt], 1 - likeliest.long())
    asked = torch.zeros_like(wrong).index_add_(0, document[learnt], torch.ones_like(document[learnt])) > 0
    asked &= ~learnt[starts]
    home = starts.nonzero()[:, 0]
    answers = torch.zeros_like(counts).index_add_(0, home[asked], torch.ones_like(home[asked]))
    right = torch.zeros_like(counts).index_add_(0, home[asked], (wrong[asked] == 0).long())
    return Judged(losses, counts, answers, right)
