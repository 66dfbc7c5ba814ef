"""The loss on held-out rows: of the model as it will be exported, of its weights in BF16, and of the start point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from k2quant.errors import BadValue, MalformedFile
from k2quant.qat.data.packing import Rows, batch
from k2quant.qat.preparing import Prepared
from k2quant.qat.run.history import Evaluation
from k2quant.qat.training.task import Task, losses

_AT_ONCE = 8  # rows of a forward pass
_START = ("start", "start_rounded", "gap_error")


class Measures:
    """Measures one model on the same rows again and again."""

    def __init__(self, task: Task, found: Prepared, rows: Rows, device: torch.device) -> None:
        """Keep what is needed.

        Args:
            task: the model with its loss; shards are gathered when it is called, and not when a part of it is.
            found: what fake-quantises the model.
            rows: held out; there may be none.
            device: of the model.
        """
        self._task, self._prepared, self._rows, self._device = task, found, rows, device
        self._start: dict[str, float | None] = {}

    def begin(self, *, file: object) -> None:
        """Measure the start point; the prepared model has the width of the export.

        Args:
            file: the model's folder, for messages.

        Raises:
            BadValue: a loss is not finite.
        """
        if not len(self._rows.tokens):
            return
        with self._prepared.unquantised():
            plain, counts = self._losses()
        rounded, _ = self._losses()
        start, start_rounded = _mean(plain, counts), _mean(rounded, counts)
        if not (math.isfinite(start) and math.isfinite(start_rounded)):
            raise BadValue(
                "the held-out loss of the start point is not finite",
                file=file,
                found=f"{start} in BF16, {start_rounded} rounded",
                remedy="look for weights that are NaN, infinite or far too large",
            )
        self._start = {
            "start": start,
            "start_rounded": start_rounded,
            "gap_error": _error(rounded - plain, counts),
        }

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure the model as it is now; None without held-out rows.

        Raises:
            BadValue: a loss is not finite.
        """
        if not len(self._rows.tokens):
            return None
        seen, counts = self._losses()
        with self._prepared.unquantised():
            plain, _ = self._losses()
        loss, unrounded = _mean(seen, counts), _mean(plain, counts)
        if not (math.isfinite(loss) and math.isfinite(unrounded)):
            raise BadValue(
                f"the held-out loss after step {step} is not finite",
                found=f"{loss} rounded, {unrounded} in BF16",
                remedy="the last checkpoint stands; try a lower rate or a longer warm-up",
            )
        return Evaluation(step=step, loss=loss, standard_error=_error(seen, counts), unrounded=unrounded, **self._start)

    def run(self, before: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Run the model over the first rows, for whoever watches.

        Args:
            before: called with the rows of each pass, as `batch` gives them, before it is made.
        """
        for first in range(0, min(len(self._rows.tokens), _AT_ONCE), _AT_ONCE):
            rows = self._batch(first)
            before(rows)
            losses(self._task, rows)

    def state(self) -> dict[str, float | None]:
        """Return what is known of the start point."""
        return dict(self._start)

    def restore(self, state: Any, *, file: object) -> None:
        """Take over what `state` gave.

        Raises:
            MalformedFile: it gave something else.
        """
        if not isinstance(state, Mapping) or not state.keys() <= set(_START):
            raise MalformedFile("does not hold the losses of the start point", file=file, found=f"{state!r:.100}")
        if not all(value is None or type(value) is float for value in state.values()):
            raise MalformedFile("a loss of the start point is no number", file=file, found=f"{state!r:.100}")
        self._start = dict(state)

    def _losses(self) -> tuple[Tensor, Tensor]:
        """Return summed loss and learnt tokens of each row."""
        found = [losses(self._task, self._batch(first)) for first in range(0, len(self._rows.tokens), _AT_ONCE)]
        return torch.cat([loss for loss, _ in found]), torch.cat([count for _, count in found])

    def _batch(self, first: int) -> dict[str, Tensor]:
        indices = torch.arange(first, min(first + _AT_ONCE, len(self._rows.tokens)))
        return {name: tensor.to(self._device) for name, tensor in batch(self._rows, indices).items()}


def _mean(sums: Tensor, counts: Tensor) -> float:
    return float(sums.sum() / counts.sum().clamp(min=1))


def _error(sums: Tensor, counts: Tensor) -> float | None:
    """Return the standard error of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 2.11)."""
    rows = len(sums)
    if rows < 2:
        return None
    residual = sums - _mean(sums, counts) * counts
    return math.sqrt(float(residual.square().sum()) / (rows * (rows - 1))) / float(counts.double().mean().clamp(min=1))
