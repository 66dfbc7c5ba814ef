"""The history of a run as scalars of TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from k2quant.errors import MissingExtra
from k2quant.ground.extras import install
from k2quant.qat.run.history import Evaluation, Record, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """A folder of TensorBoard's, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path, *, after: int = -1) -> None:
        """Begin to write.

        Args:
            folder: of the event files; a resumed run names the same again.
            after: the last step that a resumed run keeps: TensorBoard hides what was written of later ones. -1 for
                a run that begins, perhaps anew: it keeps none, nor the evaluation before the first step.

        Raises:
            MissingExtra: tensorboard is not installed.
        """
        self._writer = _writer(folder, after + 1)

    def add(self, record: Record) -> None:
        """Write a step or an evaluation; what was not measured is left out."""
        scalars = _training(record) if isinstance(record, StepRecord) else _held_out(record)
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.step)
        if isinstance(record, Evaluation):
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _writer(folder: Path, purge_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = f"{install('qat')}, or leave TensorBoard out"
        raise MissingExtra("TensorBoard is not installed", remedy=remedy) from error
    return SummaryWriter(str(folder), purge_step=purge_step)


def _training(record: StepRecord) -> dict[str, float | None]:
    return {
        "train/loss": record.loss,
        "train/cross_entropy": record.cross_entropy,
        "train/divergence": record.divergence,
        "train/learning_rate": record.rate,
        "train/gradient_norm": record.norm,
        "train/bits": record.bits,
        "train/tokens_per_second": record.tokens / record.seconds if record.seconds else None,
    }


def _held_out(record: Evaluation) -> dict[str, float | None]:
    return {
        "held_out/fake_quantised": record.loss,
        "held_out/unrounded": record.unrounded,
        "held_out/start_rounded": record.start_rounded,
        "held_out/start": record.start,
        "held_out/answers_right": None if record.answers is None else record.answers.right / record.answers.count,
    }
