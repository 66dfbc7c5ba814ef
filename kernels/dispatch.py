"""Which backend makes a product: the one place where device, shape and table are looked at.

CPU: `linear_cpu`. NVIDIA GPUs with Triton: the Triton kernels, or dequantised weights and cuBLAS where the table says
that this is faster. Anything else: the reference.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels import matmul_reference as reference
from k2quant.kernels.configs import Config, Product, Table, table_for
from k2quant.kernels.weights import Fp8Weight, Int4Weight

Weight = Int4Weight | Fp8Weight

_TILE_DTYPES = (torch.bfloat16, torch.float16)
"""Products in float32 have no matrix units to gain from: cuBLAS on dequantised weights is as good."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, for x `[.., K]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _linear(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


def _linear(x: Tensor, weight: Weight) -> Tensor:
    if x.device.type == "cpu":
        from k2quant.kernels import linear_cpu

        return linear_cpu.linear(x, weight)
    if not on_triton(x):
        return reference.linear(x, weight)
    config = _config("linear", weight, x.shape[0], x)
    if config.form == "dequantize" or x.dtype not in _TILE_DTYPES:
        return x @ dequantize(weight, x.dtype).T
    from k2quant.kernels import linear_triton

    return linear_triton.linear(x, weight, config)


def linear_backward(grad: Tensor, weight: Weight) -> Tensor:
    """Return grad @ weight, `[.., K]`, for grad `[.., N]`: the gradient of `linear` for x."""
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    if grad.device.type == "cpu":
        from k2quant.kernels import linear_cpu

        out = linear_cpu.linear_backward(rows, weight)
    else:
        out = rows @ dequantize(weight, grad.dtype)
    return out.reshape(*grad.shape[:-1], weight.shape[1])


def linear_w8a8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, with x rounded to FP8 in 1x128 blocks."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if on_triton(x) and _capability(x) >= (8, 9) and weight.block[1] == 128:
        from k2quant.kernels import w8a8_triton

        out = w8a8_triton.linear_w8a8(rows, weight, _config("w8a8", weight, rows.shape[0], x))
    else:
        out = reference.fp8_linear_w8a8(rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def moe(x: Tensor, gate: Weight, up: Weight, down: Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum, `[T, H]`; see `matmul_reference.moe`."""
    if x.device.type == "cpu":
        from k2quant.kernels import linear_cpu

        return reference.moe(x, gate, up, down, ids, weights, product=linear_cpu.linear)
    if not on_triton(x):
        return reference.moe(x, gate, up, down, ids, weights)
    from k2quant.kernels import moe_triton

    inward, outward = _moe_configs(x, gate, down)
    return moe_triton.moe(x.contiguous(), gate, up, down, ids.contiguous(), weights.contiguous(), inward, outward)


def moe_backward(
    grad: Tensor, x: Tensor, gate: Weight, up: Weight, down: Weight, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `moe` for x `[T, H]` and for the router's weights `[T, k]`."""
    if x.device.type == "cpu":
        from k2quant.kernels import linear_cpu

        products = linear_cpu.linear, linear_cpu.linear_backward
        return reference.moe_backward(grad, x, gate, up, down, ids, weights, products=products)
    if not on_triton(x):
        return reference.moe_backward(grad, x, gate, up, down, ids, weights)
    from k2quant.kernels import moe_triton

    inward, outward = _moe_configs(x, gate, down)
    return moe_triton.moe_backward(
        grad.contiguous(), x.contiguous(), gate, up, down, ids.contiguous(), weights.contiguous(), inward, outward
    )


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weights `[.., N, K]`, each rounded once to `dtype`."""
    if on_triton(weight.codes) and not (isinstance(weight, Int4Weight) and weight.layout != "groups"):
        from k2quant.kernels import dequantize_triton

        return dequantize_triton.dequantize(weight, dtype)
    if weight.codes.device.type == "cpu" and len(weight.shape) == 2:
        from k2quant.kernels import linear_cpu

        return linear_cpu.dequantize(weight, dtype)
    return weight.dequantize(dtype)


def on_triton(tensor: Tensor) -> bool:
    """Return whether Triton kernels run where this tensor lies."""
    return tensor.device.type == "cuda" and _has_triton()


def require_gpu(device: str) -> torch.device:
    """Return a CUDA device with its number.

    Raises:
        UsageError: there is no such GPU, or Triton is missing.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or (":" in device and not index.isdecimal()):
        raise UsageError(f"unknown device `{device}`: expected cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(f"device `{device}` is not available: torch {torch.__version__} finds no CUDA")
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"device `{device}` is not available: there are {torch.cuda.device_count()} CUDA devices")
    if not _has_triton():
        raise UsageError("Triton is missing: pip install triton")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def table_of(device: torch.device) -> Table:
    """Return the table of a GPU."""
    return table_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _config(product: Product, weight: Weight, rows: int, x: Tensor) -> Config:
    kind = "int4" if isinstance(weight, Int4Weight) else "fp8"
    return table_of(x.device).choose(product, kind, weight.shape, rows)


def _moe_configs(x: Tensor, gate: Weight, down: Weight) -> tuple[Config, Config]:
    return _config("gate_up", gate, x.shape[0], x), _config("down", down, x.shape[0], x)
