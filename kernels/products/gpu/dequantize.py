"""Write quantised weights out on a GPU: for the products where cuBLAS on plain weights is faster, and for gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.devices.launch import launch
from k2quant.kernels.products.gpu.linear import constants_of, parts_of, tile_columns
from k2quant.kernels.products.gpu.tiles import weight_tile
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config

_ROWS, _DEPTH = 64, 128


@triton.jit
def _dequantize(
    codes_ptr,
    scale_ptr,
    whole_ptr,
    out_ptr,
    codes_stride,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile of one expert: program (tile of rows, tile of columns, expert)."""
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    tile = weight_tile(
        codes_ptr + expert * codes_stride,
        scale_ptr + expert * scale_stride,
        whole_ptr + expert,
        rows,
        rows < N,
        k,
        N,
        K,
        FORMAT,
        SCALE_ROWS,
        SCALE_COLUMNS,
        DIVIDES,
        BLOCK_K,
        out_ptr.dtype.element_ty,
    )
    place = (expert * N + rows)[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :]
    tl.store(out_ptr + place, tile, mask=(rows < N)[:, None])


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weights `[.., N, K]`, each rounded once to `dtype`. It is in a GPU's layout."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    rows, columns = weight.shape[-2:]
    depth = Config(depth=_DEPTH).depth_for(columns, tile_columns(weight))
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    parts = parts_of(weight)
    launch(
        _dequantize,
        (triton.cdiv(rows, _ROWS), columns // depth, experts),
        *parts,
        out,
        parts[0].numel() // experts,
        weight.scale.numel() // experts,
        N=rows,
        K=columns,
        **constants_of(weight),
        BLOCK_N=_ROWS,
        BLOCK_K=depth,
        stages=1,
    )
    return out
