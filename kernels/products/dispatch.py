"""Which backend makes a product, by device, shape and table.

CPU: `cpu/linear`. NVIDIA GPUs with Triton: the Triton kernels, or dequantised weights and cuBLAS where the table says
that this is faster. Anything else: the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from k2quant.kernels.devices import gpus
from k2quant.kernels.products import reference
from k2quant.kernels.products.cpu import linear as linear_cpu
from k2quant.kernels.products.cpu import moe as moe_cpu
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config, Product, Table, table_for, tokens_of_k2

P = ParamSpec("P")
R = TypeVar("R")

_TILE_DTYPES = (torch.bfloat16, torch.float16)
"""Products in float32 have no matrix units to gain from: cuBLAS on dequantised weights is as good."""

_FLOAT32_TILE = Config(rows=16, columns=32, depth=32, warps=4, stages=1)
"""For experts in float32, which cuBLAS does not group: larger tiles overflow the registers."""

on_triton = gpus.on_triton


def _in_given_dtypes(function: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out: an operator computes in the dtypes that it is given and says that it returns."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        device = cast("Tensor", args[0]).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return plain


@_in_given_dtypes
def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, for x `[.., K]`."""
    if x.ndim == 2 and x.is_contiguous():
        return _linear(x, weight)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return _linear(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


def _linear(x: Tensor, weight: PackedWeight) -> Tensor:
    if on_triton(x):
        config = _config("linear", weight, x.shape[0], x.device)
        if config.form == "dequantize" or x.dtype not in _TILE_DTYPES:
            return x @ dequantize(weight, x.dtype).T
        from k2quant.kernels.products.gpu import linear as linear_triton

        return linear_triton.linear(x, weight, config)
    if x.device.type == "cpu":
        return linear_cpu.linear(x, weight)
    return reference.linear(x, weight)


@_in_given_dtypes
def linear_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Return grad @ weight, `[.., K]`, for grad `[.., N]`: the gradient of `linear` for x."""
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).contiguous()
    if grad.device.type == "cpu" and not on_triton(grad):
        out = linear_cpu.linear_backward(rows, weight)
    else:
        out = rows @ dequantize(weight, grad.dtype)
    return out.reshape(*grad.shape[:-1], weight.shape[1])


@_in_given_dtypes
def linear_w8a8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, with x rounded to FP8 in 1x128 blocks."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    if on_triton(x) and _capability(x) >= (8, 9) and weight.block[1] == 128:
        from k2quant.kernels.products.gpu import w8a8 as w8a8_triton

        out = w8a8_triton.linear_w8a8(rows, weight, _config("w8a8", weight, rows.shape[0], x.device))
    else:
        out = reference.fp8_linear_w8a8(rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@_in_given_dtypes
def moe(x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum, `[T, H]`; see `reference.moe`."""
    if on_triton(x):
        from k2quant.kernels.products.gpu import moe as moe_triton

        configs = _moe_configs(x, gate, down, ids)
        return moe_triton.moe(x.contiguous(), gate, up, down, ids.contiguous(), weights.contiguous(), *configs)
    if x.device.type == "cpu":
        return moe_cpu.moe(x, gate, up, down, ids, weights)
    return reference.moe(x, gate, up, down, ids, weights)


@_in_given_dtypes
def moe_backward(
    grad: Tensor, x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `moe` for x `[T, H]` and for the router's weights `[T, k]`."""
    if on_triton(x):
        from k2quant.kernels.products.gpu import moe_backward as moe_backward_triton

        parts = grad.contiguous(), x.contiguous(), gate, up, down, ids.contiguous(), weights.contiguous()
        return moe_backward_triton.moe_backward(*parts, *_moe_configs(x, gate, down, ids))
    if x.device.type == "cpu":
        products = linear_cpu.linear, linear_cpu.linear_backward
        return reference.moe_backward(grad, x, gate, up, down, ids, weights, products=products)
    return reference.moe_backward(grad, x, gate, up, down, ids, weights)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weights `[.., N, K]`, each rounded once to `dtype`."""
    if on_triton(weight.codes) and weight.layout == weight.gpu_layout:
        from k2quant.kernels.products.gpu import dequantize as dequantize_triton

        return dequantize_triton.dequantize(weight, dtype)
    if weight.codes.device.type == "cpu" and len(weight.shape) == 2:
        return linear_cpu.dequantize(weight, dtype)
    return weight.dequantize(dtype)


@lru_cache(maxsize=16)
def table_of(device: torch.device) -> Table:
    """Return the table of a GPU."""
    return table_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _config(product: Product, weight: PackedWeight, rows: int, device: torch.device) -> Config:
    return table_of(device).choose(product, weight.format, weight.shape, rows)


def _moe_configs(x: Tensor, gate: PackedWeight, down: PackedWeight, ids: Tensor) -> tuple[Config, Config]:
    """Return the configurations of both products of a layer of experts, with equal blocks of rows."""
    if x.dtype not in _TILE_DTYPES:
        return _FLOAT32_TILE, _FLOAT32_TILE
    tokens = tokens_of_k2(ids.numel(), gate.shape[0])
    inward = _config("gate_up", gate, tokens, x.device)
    return inward, replace(_config("down", down, tokens, x.device), rows=inward.rows)
