"""Compile all that a model's products need, before its first token: later nothing is compiled any more."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from k2quant.kernels.configs import BUCKETS
from k2quant.kernels.linear_ops import fp8_linear, int4_linear
from k2quant.kernels.moe_ops import moe_fp8, moe_int4
from k2quant.kernels.weights import Fp8Weight, Int4Weight

_CPU_ROWS = (1, 2, 256)
"""Rows of x that reach every compiled function of the CPU path."""

Weight = Int4Weight | Fp8Weight


def warmup(
    linears: Iterable[Weight],
    experts: Iterable[tuple[Weight, Weight, Weight]] = (),
    *,
    top: int = 8,
    rows: int = BUCKETS[-1],
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Run every product once for each bucket of rows, on zeros.

    Args:
        linears: weights `[N, K]`; of equal ones one is run.
        experts: gate, up and down of a layer of experts each.
        top: experts of a token.
        rows: the most rows of x, or tokens, that will come.
        dtype: dtype of x.

    Returns:
        How many products were run.
    """
    count = 0
    for weight in {_kind(weight): weight for weight in linears}.values():
        for height in _rows(weight, rows):
            _linear(torch.zeros(height, weight.shape[1], dtype=dtype, device=weight.codes.device), weight)
            count += 1
    for layer in {tuple(map(_kind, layer)): layer for layer in experts}.values():
        for height in _rows(layer[0], rows):
            _moe(height, layer, top, dtype)
            count += 1
    return count


def _rows(weight: Weight, most: int) -> list[int]:
    buckets = _CPU_ROWS if weight.codes.device.type == "cpu" else BUCKETS
    return [bucket for bucket in buckets if bucket < most] + [most]


def _kind(weight: Weight) -> tuple[object, ...]:
    rest = weight.layout if isinstance(weight, Int4Weight) else weight.block
    return type(weight), weight.shape, weight.codes.device, rest


def _linear(x: torch.Tensor, weight: Weight) -> None:
    if isinstance(weight, Int4Weight):
        int4_linear(x, weight)
    else:
        fp8_linear(x, weight)


def _moe(tokens: int, layer: tuple[Weight, Weight, Weight], top: int, dtype: torch.dtype) -> None:
    gate, up, down = layer
    device = gate.codes.device
    x = torch.zeros(tokens, gate.shape[2], dtype=dtype, device=device)
    ids = torch.arange(tokens * top, device=device).reshape(tokens, top) % gate.shape[0]
    weights = torch.zeros(tokens, top, device=device)
    if isinstance(gate, Int4Weight) and isinstance(up, Int4Weight) and isinstance(down, Int4Weight):
        moe_int4(x, gate, up, down, ids, weights)
    elif isinstance(gate, Fp8Weight) and isinstance(up, Fp8Weight) and isinstance(down, Fp8Weight):
        moe_fp8(x, gate, up, down, ids, weights)
