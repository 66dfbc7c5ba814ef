"""A contestant in the usual style: a Triton kernel for INT4 whose K tile is one group of 32 columns.

Peers' Triton kernels clamp their K tile to the group, so that a tile has one scale a row. This one is written for the
benchmark, from that description: the checkpoint's own layout, a shift and a mask for each code, no parts of K.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.devices.rounding import INTERPRETED
from k2quant.kernels.tuning.timing import time_eager, time_graph
from suites.products.inputs import Bank, Call

TILES = ((16, 32, 2, 4), (16, 64, 4, 4), (16, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3))
"""Rows of x, rows of the weight, warps and stages; the fastest is taken."""


@triton.jit
def _product(
    x_ptr,
    packed_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile `[ROWS, COLUMNS]` of x @ weight.T."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, 32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in tl.range(0, K // 32):
        k = group * 32 + lane
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < M)[:, None], other=0.0)
        words = tl.load(packed_ptr + column[:, None] * (K // 8) + k[None, :] // 8, mask=(column < N)[:, None], other=0)
        scale = tl.load(scale_ptr + column * (K // 32) + group, mask=column < N, other=0.0)
        codes = (((words >> (lane % 8 * 4)[None, :]) & 15) - 8).to(tl.float32)
        if INTERPRETED:
            total += tl.dot(x.to(tl.float32), tl.trans(codes * scale.to(tl.float32)[:, None]))
        else:
            total += tl.dot(x, tl.trans(codes.to(tl.bfloat16) * scale[:, None]))
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * N + column[None, :], total, mask=inside)


def calls(bank: Bank, x: Tensor) -> list[Call]:
    """Return a call for each copy of the weights, with the tile that is fastest here."""
    pairs = bank.copies(
        "group tiles",
        bank.plain.checkpoint,
        lambda pair: (pair[0].clone(), pair[1].clone()),
        bank.weight.nbytes,
    )
    fitting = [tile for tile in TILES if tile[0] <= max(16, x.shape[0])]
    seconds = {tile: _seconds([partial(_run, x, pair[0], pair[1], tile) for pair in pairs]) for tile in fitting}
    best = min(seconds, key=lambda tile: seconds[tile])
    return [partial(_run, x, pair[0], pair[1], best) for pair in pairs]


def _seconds(calls: list[Call]) -> float:
    """Return the seconds of a call, on a GPU without what Python adds."""
    if torch.cuda.is_available():
        return time_graph(calls[:20], samples=5, warm_up_seconds=0.01).median
    return time_eager(calls[0], samples=1, calls=1).median


def _run(x: Tensor, packed: Tensor, scale: Tensor, tile: tuple[int, int, int, int]) -> Tensor:
    rows, columns, warps, stages = tile
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    grid = triton.cdiv(x.shape[0], rows), triton.cdiv(packed.shape[0], columns)
    kernel = cast("Any", _product)
    sizes = *out.shape, x.shape[1]
    kernel[grid](x, packed, scale, out, *sizes, rows, columns, num_warps=warps, num_stages=stages)
    return out
