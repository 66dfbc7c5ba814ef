"""Rows of a checkpoint's weight as BF16, whatever its format."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.checkpoint.panels import read_panel
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import Weight
from k2quant.formats.transcode import Scratch, located, to_bf16
from k2quant.kernels.codecs.seam import codecs
from k2quant.kernels.codecs.values import ValueAt


def decoded_rows(checkpoint: Checkpoint, weight: Weight, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` of a weight, BF16 `[stop - start, K]`; what is no matrix counts as one column.

    Args:
        checkpoint: that holds it.
        weight: one with a format.
        start: a multiple of `panels.ROW_STEP`.
        stop: one past the last row.

    Raises:
        CheckpointError: the file cannot be read, or holds values that no weight can hold.
    """
    layout, scratch, arithmetic = weight.format, Scratch(), codecs("cpu")
    if layout is None:
        msg = f"{weight.base} is no weight"
        raise TypeError(msg)
    parts = read_panel(checkpoint, weight, start, stop, scratch, key="in")
    try:
        bits = to_bf16(layout, parts, codecs=arithmetic, scratch=scratch)
    except ValueAt as error:
        tensors = {suffix: entry.name for suffix, entry in weight.parts.items()}
        raise located(error, layout, start, tensors, weight.main.file) from error
    return torch.from_numpy(bits).view(torch.bfloat16)
