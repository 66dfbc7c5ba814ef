"""Compile all that a model's forward pass needs, before its first token: later nothing is compiled any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from k2quant.kernels.products import dispatch
from k2quant.kernels.products.linear import fp8_linear_w8a8, linear
from k2quant.kernels.products.moe import moe
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import BUCKETS, bucket_of, tokens_of_k2

_CPU_ROWS = (1, 2, 256)
"""Rows of x that reach every compiled function of the CPU path."""


def warmup(
    linears: Iterable[PackedWeight],
    experts: Iterable[tuple[PackedWeight, PackedWeight, PackedWeight]] = (),
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
            moe(x, *layer, ids.to(ids_dtype), torch.zeros(height, top, dtype=weights_dtype, device=device))
            count += 1
    return count


def _rows(weight: PackedWeight, most: int) -> list[int]:
    """Return one number of rows for each configuration that there may be."""
    buckets = BUCKETS if dispatch.on_triton(weight.codes) else _CPU_ROWS
    return [bucket for bucket in buckets if bucket < most] + [most]


def _tokens(gate: PackedWeight, top: int, most: int) -> list[int]:
    """Return one number of tokens for each configuration that there may be, sorted by expert or not."""
    if not dispatch.on_triton(gate.codes):
        return _rows(gate, most)
    from k2quant.kernels.products.gpu.routing import SPARSITY_FACTOR  # only here: it loads Triton

    experts, found = gate.shape[0], {}
    for tokens in range(1, most + 1):
        pairs = tokens * top
        found[bucket_of(tokens_of_k2(pairs, experts)), pairs * SPARSITY_FACTOR <= experts] = tokens
    return list(found.values())


def _kind(weight: PackedWeight) -> tuple[object, ...]:
    return weight.format, weight.shape, weight.codes.device, weight.layout, weight.numbers


def _linear(x: Tensor, weight: PackedWeight, *, w8a8: bool) -> int:
    """Run the products of a weight; return how many there are."""
    linear(x, weight)
    if w8a8 and "w8a8" in weight.products:
        fp8_linear_w8a8(x, cast("Fp8Weight", weight))
        return 2
    return 1
