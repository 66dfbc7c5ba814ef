"""What an operator refuses: tensors that are no weights, codes or scales of the format, or do not fit each other."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, Grid, largest_code
from k2quant.kernels.codecs.ops.panels import blocks

E4M3 = torch.float8_e4m3fn


def expect(tensor: Tensor, name: str, dtype: torch.dtype, multiple: int = 1) -> None:
    """Refuse what is no matrix of this dtype, or has another number of columns."""
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise UsageError(f"{name}: expected {dtype} [R, K], found {tensor.dtype} {list(tensor.shape)}")
    if tensor.shape[1] == 0:
        raise UsageError(f"{name}: expected at least one column, found {list(tensor.shape)}")
    if tensor.shape[1] % multiple:
        raise UsageError(f"{name}: expected a multiple of {multiple} columns, found {tensor.shape[1]}")


def expect_int4(packed: Tensor, scale: Tensor) -> None:
    """Refuse words and scales that are not those of one INT4 matrix."""
    expect(packed, "packed", torch.int32, multiple=GROUP // 8)
    expect(scale, "scale", torch.bfloat16)
    expect_shape(packed, scale, (packed.shape[0], packed.shape[1] * 8 // GROUP), f"packed {list(packed.shape)}")


def expect_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Refuse codes and scales that are not those of one FP8 matrix."""
    expect_block(block)
    expect(codes, "codes", E4M3)
    expect(scale, "scale", torch.float32)
    expect_shape(codes, scale, blocks(codes, block), f"codes {list(codes.shape)} in blocks of {block[0]}x{block[1]}")


def expect_grid(grid: Grid, bits: int = 4, known: tuple[int, ...] = PACKED_BITS) -> None:
    """Refuse a grid that is unknown, or has no codes of this width."""
    if grid not in get_args(Grid):
        raise UsageError(f"grid: expected {' or '.join(get_args(Grid))}, found {grid}")
    largest_code(grid, bits, known)


def expect_block(block: tuple[int, int]) -> None:
    """Refuse what is not rows and columns of a block."""
    if not (isinstance(block, tuple) and len(block) == 2 and min(block) > 0):
        raise UsageError(f"block: expected its rows and columns, such as (128, 128), found {block}")


def expect_shape(codes: Tensor, scale: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Refuse a scale of another shape or on another device than its codes."""
    if scale.device != codes.device:
        raise UsageError(f"codes lie on {codes.device} but their scale on {scale.device}; put both on one device")
    if tuple(scale.shape) != shape:
        raise UsageError(f"scale: expected {list(shape)} for {what}, found {list(scale.shape)}")
