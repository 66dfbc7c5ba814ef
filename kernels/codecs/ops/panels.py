"""Tensors for the CPU's codecs: room for what they write, and ranges of rows shared out among threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.values import ValueAt
from k2quant.kernels.codecs.views import as_bytes
from k2quant.kernels.devices.threads import over_rows as shared_out

Pair = tuple[Tensor, Tensor]


def blocks(matrix: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a matrix has down and across."""
    return -(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])


def new_bf16(codes: Tensor, columns: int) -> Tensor:
    """Return room for BF16, with as many rows as `codes`, on its device."""
    return codes.new_empty(codes.shape[0], columns, dtype=torch.bfloat16)


def new_int4(weights: Tensor) -> Pair:
    """Return room for words and scales of INT4."""
    rows, columns = weights.shape
    return (
        weights.new_empty(rows, columns // 8, dtype=torch.int32),
        weights.new_empty(rows, columns // GROUP, dtype=torch.bfloat16),
    )


def new_fp4(weights: Tensor, block: int) -> Pair:
    """Return room for codes and scales of FP4, one scale for so many columns: bytes, both."""
    rows, columns = weights.shape
    return (
        weights.new_empty(rows, columns // 2, dtype=torch.uint8),
        weights.new_empty(rows, columns // block, dtype=torch.uint8),
    )


def new_fp8(weights: Tensor, block: tuple[int, int]) -> Pair:
    """Return room for codes, as bytes, and scales of FP8."""
    return weights.new_empty(weights.shape, dtype=torch.uint8), weights.new_empty(
        blocks(weights, block), dtype=torch.float32
    )


def part(scale: NDArray[np.float32], first: int, last: int, block_rows: int) -> NDArray[np.float32]:
    """Return the scales of rows first..last, which begin with a block."""
    return scale[first // block_rows : -(-last // block_rows)]


def stored(encoded: tuple[Tensor, Tensor, Any]) -> Pair:
    """Return FP8 codes, as bytes, and scales without the figures that come with them."""
    return as_bytes(encoded[0]), encoded[1]


def over_rows(rows: int, height: int, work: Callable[[int, int], object]) -> None:
    """Share rows out among threads, in multiples of a block's height; an error counts rows from the first."""

    def located(first: int, last: int) -> None:
        try:
            work(first, last)
        except ValueAt as error:
            row = error.row + {"weight": first, "scale": first // height, "tensor scale": 0}[error.of]
            raise ValueAt(row=row, column=error.column, what=error.what, of=error.of) from None

    shared_out(rows, height, located)
