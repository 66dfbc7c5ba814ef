"""Loss and answers on held-out rows: of the model as it will be exported, of its weights in BF16, of its start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from k2quant.data.packing import Rows, batch
from k2quant.errors import BadValue, MalformedFile
from k2quant.qat.preparing import Prepared
from k2quant.qat.run.history import Answers, Evaluation
from k2quant.qat.training.task import Judged, Task, judged

_AT_ONCE = 8  # rows of a forward pass
_LOSSES = ("start", "start_rounded", "gap_error")
_RIGHT = ("start_right", "start_rounded_right")


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
        self._right: dict[str, int] = {}

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
            plain = self._judged()
        rounded, counts = self._judged(), plain.learnt
        start, start_rounded = _mean(plain.losses, counts), _mean(rounded.losses, counts)
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
            "gap_error": _error(rounded.losses - plain.losses, counts),
        }
        self._right = dict(zip(_RIGHT, (int(plain.right.sum()), int(rounded.right.sum())), strict=True))

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure the model as it is now; None without held-out rows.

        Raises:
            BadValue: a loss is not finite.
        """
        if not len(self._rows.tokens):
            return None
        seen = self._judged()
        with self._prepared.unquantised():
            plain = self._judged()
        counts = seen.learnt
        loss, unrounded = _mean(seen.losses, counts), _mean(plain.losses, counts)
        if not (math.isfinite(loss) and math.isfinite(unrounded)):
            raise BadValue(
                f"the held-out loss after step {step} is not finite",
                found=f"{loss} rounded, {unrounded} in BF16",
                remedy="the last checkpoint stands; try a lower rate or a longer warm-up",
            )
        return Evaluation(
            step=step,
            loss=loss,
            standard_error=_error(seen.losses, counts),
            unrounded=unrounded,
            answers=self._answers(seen, plain),
            **self._start,
        )

    def _answers(self, seen: Judged, plain: Judged) -> Answers | None:
        """Return how many answers are right; None where the rows hold text alone, which answers nothing."""
        if not (count := int(seen.answers.sum())):
            return None
        start, rounded = (self._right.get(name) for name in _RIGHT)
        return Answers(
            count=count,
            right=int(seen.right.sum()),
            unrounded=int(plain.right.sum()),
            start_rounded=rounded,
            start=start,
        )

    def run(self, before: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Run the model over the first rows, for whoever watches.

        Args:
            before: called with the rows of each pass, as `batch` gives them, before it is made.
        """
        for first in range(0, min(len(self._rows.tokens), _AT_ONCE), _AT_ONCE):
            rows = self._batch(first)
            before(rows)
            judged(self._task, rows)

    @property
    def batches(self) -> int:
        """Forward passes over the held-out rows."""
        return -(-len(self._rows.tokens) // _AT_ONCE)

    def state(self) -> dict[str, float | int | None]:
        """Return what is known of the start point."""
        return {**self._start, **self._right}

    def restore(self, state: Any, *, file: object) -> None:
        """Take over what `state` gave.

        Raises:
            MalformedFile: it gave something else.
        """
        if not isinstance(state, Mapping) or not state.keys() <= {*_LOSSES, *_RIGHT}:
            raise MalformedFile("does not hold the losses of the start point", file=file, found=f"{state!r:.100}")
        right = {name: value for name, value in state.items() if name in _RIGHT}
        start = {name: value for name, value in state.items() if name not in _RIGHT}
        if not all(value is None or type(value) is float for value in start.values()):
            raise MalformedFile("a loss of the start point is no number", file=file, found=f"{state!r:.100}")
        if not all(type(value) is int and value >= 0 for value in right.values()):
            raise MalformedFile("right answers of the start point are no count", file=file, found=f"{state!r:.100}")
        self._start, self._right = start, right

    def _judged(self) -> Judged:
        """Return what the model makes of each row."""
        found = [judged(self._task, self._batch(first)) for first in range(0, len(self._rows.tokens), _AT_ONCE)]
        return Judged(*map(torch.cat, zip(*found, strict=True)))

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
