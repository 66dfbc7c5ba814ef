"""Compile all that a model's forward pass needs, before its first token: later nothing is compiled any more."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from k2quant.kernels.products import dispatch
from k2quant.kernels.products.linear import fp8_linear, fp8_linear_w8a8, int4_linear
from k2quant.kernels.products.moe import moe_fp8, moe_int4
from k2quant.kernels.products.tables.configs import BUCKETS, bucket_of
from k2quant.kernels.products.weights import Fp8Weight, Int4Weight, Weight

_CPU_ROWS = (1, 2, 256)
"""Rows of x that reach every compiled function of the CPU path."""


def warmup(
    linears: Iterable[Weight],
    experts: Iterable[tuple[Weight, Weight, Weight]] = (),
    *,
    top: int = 8,
    rows: int = BUCKETS[-1],
    dtype: torch.dtype = torch.bfloat16,
    w8a8: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype = torch.float32,
) -> int:
    """Run every product once for each kernel that a number of rows may choose, on zeros.

    Only what the forward pass runs is compiled: gradients are compiled when they are first asked for.

    Args:
        linears: weights `[N, K]`; of equal ones one is run.
        experts: gate, up and down of a layer of experts each.
        top: experts of a token.
        rows: the most rows of x, or tokens, that will come.
        dtype: dtype of x.
        w8a8: run `fp8_linear_w8a8` too, on the FP8 weights among `linears`.
        ids_dtype: int32 or int64, of the experts' ids.
        weights_dtype: dtype of the router's weights.

    Returns:
        How many products were run.
    """
    count = 0
    for weight in {_kind(weight): weight for weight in linears}.values():
        for height in _rows(weight, rows):
            x = torch.zeros(height, weight.shape[1], dtype=dtype, device=weight.codes.device)
            count += _linear(x, weight, w8a8=w8a8)
    for layer in {tuple(map(_kind, layer)): layer for layer in experts}.values():
        device = layer[0].codes.device
        for height in _tokens(layer[0], top, rows):
            x = torch.zeros(height, layer[0].shape[2], dtype=dtype, device=device)
            ids = torch.arange(height * top, device=device).reshape(height, top) % layer[0].shape[0]
            _moe(x, layer, ids.to(ids_dtype), torch.zeros(height, top, dtype=weights_dtype, device=device))
            count += 1
    return count


def _rows(weight: Weight, most: int) -> list[int]:
    """Return one number of rows for each configuration that there may be."""
    buckets = BUCKETS if dispatch.on_triton(weight.codes) else _CPU_ROWS
    return [bucket for bucket in buckets if bucket < most] + [most]


def _tokens(gate: Weight, top: int, most: int) -> list[int]:
    """Return one number of tokens for each configuration that there may be, sorted by expert or not."""
    if not dispatch.on_triton(gate.codes):
        return _rows(gate, most)
    from k2quant.kernels.products.gpu.routing import SPARSITY_FACTOR  # only here: it loads Triton

    experts, found = gate.shape[0], {}
    for tokens in range(1, most + 1):
        pairs = tokens * top
        # As `dispatch` has it: tables speak of Kimi K2's tokens.
        bucket = bucket_of(-(-pairs * dispatch.EXPERTS // (dispatch.TOP * experts)))
        found[bucket, pairs * SPARSITY_FACTOR <= experts] = tokens
    return list(found.values())


def _kind(weight: Weight) -> tuple[object, ...]:
    rest = weight.layout if isinstance(weight, Int4Weight) else weight.block
    return type(weight), weight.shape, weight.codes.device, rest


def _linear(x: Tensor, weight: Weight, *, w8a8: bool) -> int:
    """Run the products of a weight; return how many there are."""
    if isinstance(weight, Int4Weight):
        int4_linear(x, weight)
        return 1
    fp8_linear(x, weight)
    if w8a8:
        fp8_linear_w8a8(x, weight)
    return 1 + w8a8


def _moe(x: Tensor, layer: tuple[Weight, Weight, Weight], ids: Tensor, weights: Tensor) -> None:
    gate, up, down = layer
    if isinstance(gate, Int4Weight) and isinstance(up, Int4Weight) and isinstance(down, Int4Weight):
        moe_int4(x, gate, up, down, ids, weights)
    elif isinstance(gate, Fp8Weight) and isinstance(up, Fp8Weight) and isinstance(down, Fp8Weight):
        moe_fp8(x, gate, up, down, ids, weights)
