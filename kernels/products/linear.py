"""`int4_linear`, `fp8_linear` and `fp8_linear_w8a8` as torch operators.

Each is opaque to torch.compile: it picks a configuration by shape in Python, which a traced body could not. It has a
fake kernel for shapes, and a gradient for x; packed weights have none.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.codecs.views import as_bytes, as_codes
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.weights import Fp8Weight, Int4Weight, Layout

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """Multiply x by an INT4 weight: x @ weight.T.

    Args:
        x: `[.., K]`, BF16, FP16 or float32; any strides.
        weight: `[N, K]`, from `prepare_int4`, on the device of x.

    Returns:
        `[.., N]` in the dtype of x, summed in float32, with each code * scale rounded to that dtype at most once.

    Raises:
        UsageError: x does not fit the weight.
    """
    check_x(x, weight, Int4Weight)
    return cast("Tensor", torch.ops.k2quant.int4_linear(x, weight.codes, weight.scale, weight.layout))


def fp8_linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Multiply x by a block-FP8 weight, x as it is: x @ weight.T.

    Args:
        x: `[.., K]`, BF16, FP16 or float32; any strides.
        weight: `[N, K]`, from `prepare_fp8`, on the device of x.

    Returns:
        `[.., N]` in the dtype of x, summed in float32.

    Raises:
        UsageError: x does not fit the weight.
    """
    check_x(x, weight, Fp8Weight)
    return cast("Tensor", torch.ops.k2quant.fp8_linear(x, as_bytes(weight.codes), weight.scale, *weight.block))


def fp8_linear_w8a8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Multiply x, rounded to FP8 in blocks of 1x128 on the way, by a block-FP8 weight: x @ weight.T.

    Args:
        x: `[.., K]`, BF16, FP16 or float32; any strides. Its scales are amax/448, amax taken as at least 1e-10.
        weight: `[N, K]`, from `prepare_fp8`, on the device of x.

    Returns:
        `[.., N]` in the dtype of x; each 128 columns are summed apart and added in float32. The gradient is that of
        `fp8_linear`: rounding x is passed straight through. A row of x that holds an infinity becomes NaN.

    Raises:
        UsageError: x does not fit the weight.
    """
    check_x(x, weight, Fp8Weight)
    return cast("Tensor", torch.ops.k2quant.fp8_linear_w8a8(x, as_bytes(weight.codes), weight.scale, *weight.block))


def check_x(x: Tensor, weight: Int4Weight | Fp8Weight, kind: type[Int4Weight | Fp8Weight], dimensions: int = 2) -> None:
    """Raise UsageError unless x `[.., K]` fits a weight of this kind and of so many dimensions."""
    check_weight(weight, kind, "weight")
    if len(weight.shape) != dimensions:
        wanted = "[N, K]" if dimensions == 2 else "[E, N, K]"
        raise UsageError(f"weight: expected {wanted}, found {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[-1]:
        raise UsageError(
            f"x: expected [.., {weight.shape[-1]}] for a weight of {list(weight.shape)}, found {list(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise UsageError(f"x: expected bfloat16, float16 or float32, found {x.dtype}")
    if x.device != weight.codes.device:
        raise UsageError(f"x lies on {x.device} but the weight on {weight.codes.device}; move one of them")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # noqa: SLF001 - or 0 comes out
        raise UsageError("x: forward-mode gradients (jvp) are not supported; use backward")


def check_weight(weight: object, kind: type[Int4Weight | Fp8Weight], name: str) -> None:
    """Raise UsageError unless a weight is of a kind, and whole."""
    if not isinstance(weight, kind):
        prepare = "prepare_int4" if kind is Int4Weight else "prepare_fp8"
        raise UsageError(f"{name}: expected an {kind.__name__} from {prepare}, found {type(weight).__name__}")
    weight.check()


@custom_op("k2quant::int4_linear", mutates_args=())
def _int4_linear(x: Tensor, codes: Tensor, scale: Tensor, layout: str) -> Tensor:
    return dispatch.linear(x, Int4Weight(codes, scale, cast("Layout", layout)))


@custom_op("k2quant::int4_linear_backward", mutates_args=())
def _int4_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, layout: str) -> Tensor:
    return dispatch.linear_backward(grad, Int4Weight(codes, scale, cast("Layout", layout)))


@custom_op("k2quant::fp8_linear", mutates_args=())
def _fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return dispatch.linear(x, Fp8Weight(as_codes(codes), scale, (block_rows, block_columns)))


@custom_op("k2quant::fp8_linear_backward", mutates_args=())
def _fp8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return dispatch.linear_backward(grad, Fp8Weight(as_codes(codes), scale, (block_rows, block_columns)))


@custom_op("k2quant::fp8_linear_w8a8", mutates_args=())
def _fp8_linear_w8a8(x: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return dispatch.linear_w8a8(x, Fp8Weight(as_codes(codes), scale, (block_rows, block_columns)))


@_int4_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Int4Weight(codes, scale, cast("Layout", layout)).shape[0])


@_int4_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor, layout: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], Int4Weight(codes, scale, cast("Layout", layout)).shape[1])


@_fp8_linear.register_fake
@_fp8_linear_w8a8.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_fp8_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, *ctx.rest = inputs
    ctx.save_for_backward(codes, scale)


def _int4_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    grad_x = torch.ops.k2quant.int4_linear_backward(grad, *ctx.saved_tensors, *ctx.rest) if wanted else None
    return grad_x, None, None, None


def _fp8_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    grad_x = torch.ops.k2quant.fp8_linear_backward(grad, *ctx.saved_tensors, *ctx.rest) if wanted else None
    return grad_x, None, None, None, None


_int4_linear.register_autograd(_int4_gradient, setup_context=_keep_weight)
_fp8_linear.register_autograd(_fp8_gradient, setup_context=_keep_weight)
_fp8_linear_w8a8.register_autograd(_fp8_gradient, setup_context=_keep_weight)
