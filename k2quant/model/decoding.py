"""Rows of a checkpoint's weight as BF16 tensors, whatever its format."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.checkpoint.panels import read_values
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.choice import codecs


def decoded_rows(checkpoint: Checkpoint, weight: StoredWeight, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` of a weight, BF16 `[stop - start, K]`; what is no matrix counts as one column.

    Args:
        checkpoint: that holds it.
        weight: one with a format.
        start: a multiple of `panels.ROW_STEP`.
        stop: one past the last row.

    Raises:
        CheckpointError: the file cannot be read, or holds values that no weight can hold.
    """
    panel = read_values(checkpoint, weight, start, stop, codecs=codecs("cpu"), scratch=Scratch())
    return torch.from_numpy(panel.values).view(torch.bfloat16)
