"""`linear` of packed weights, by any of its names, and `fp8_linear_w8a8`, as torch operators.

Each is opaque to torch.compile: it picks a configuration by shape in Python, which a traced body could not. It has a
fake kernel for shapes, and a gradient for x; packed weights have none. One operator serves every format: a weight goes
through it as its `operands`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.weight import Layout, PackedWeight
from k2quant.kernels.products.prepare import PACKED

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Operands = tuple[Tensor, Tensor, Tensor | None, str]
"""A weight as an operator takes it: codes as whole numbers, scale, the scale of a whole matrix where there is one, and
format, layout and numbers in one word.

`fp8/rows/128/128`, say. The numbers as a list of their own would take a microsecond more in each call, and two where x
has a gradient.
"""


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply x by a packed weight of any format: x @ weight.T.

    Args:
        x: `[.., K]`, BF16, FP16 or float32; any strides.
        weight: `[N, K]`, from one of the functions `prepare_`, on the device of x.

    Returns:
        `[.., N]` in the dtype of x, summed in float32.

    Raises:
        UsageError: x does not fit the weight.
    """
    check_x(x, weight, *PACKED.values())
    return cast("Tensor", torch.ops.k2quant.linear(x, *operands(weight)))


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
    return cast("Tensor", torch.ops.k2quant.linear(x, *operands(weight)))


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
    return cast("Tensor", torch.ops.k2quant.linear(x, *operands(weight)))


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
    return cast("Tensor", torch.ops.k2quant.fp8_linear_w8a8(x, *operands(weight)))


def check_x(x: Tensor, weight: PackedWeight, *kinds: type[PackedWeight], dimensions: int = 2) -> None:
    """Raise UsageError unless x `[.., K]` fits a weight of one of these kinds and of so many dimensions."""
    check_weight(weight, "weight", *kinds)
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


def check_weight(weight: PackedWeight, name: str, *kinds: type[PackedWeight]) -> None:
    """Raise UsageError unless a weight is of one of these kinds, and whole."""
    if not isinstance(weight, kinds):
        wanted = " or ".join(f"an {kind.__name__} from prepare_{kind.format}" for kind in kinds)
        raise UsageError(f"{name}: expected {wanted}, found {type(weight).__name__}")
    weight.check()


def operands(weight: PackedWeight) -> Operands:
    """Return a weight as an operator takes it."""
    kind = f"{weight.format}/{weight.layout}"
    for number in weight.numbers:
        kind += f"/{len(range(number))}"  # under torch.compile a number may be a symbol, which a text cannot hold
    return weight.bits, weight.scale, weight.whole, kind


def weight_of(bits: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> PackedWeight:
    """Undo `operands`."""
    packed, layout, numbers = _parsed(kind)
    return packed.of(bits, scale, layout, numbers, whole)


@lru_cache(maxsize=256)
def _parsed(kind: str) -> tuple[type[PackedWeight], Layout, tuple[int, ...]]:
    name, layout, *numbers = kind.split("/")
    return PACKED[name], cast("Layout", layout), tuple(map(int, numbers))


@custom_op("k2quant::linear", mutates_args=())
def _linear(x: Tensor, codes: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> Tensor:
    return dispatch.linear(x, weight_of(codes, scale, whole, kind))


@custom_op("k2quant::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> Tensor:
    return dispatch.linear_backward(grad, weight_of(codes, scale, whole, kind))


@custom_op("k2quant::fp8_linear_w8a8", mutates_args=())
def _fp8_linear_w8a8(x: Tensor, codes: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> Tensor:
    return dispatch.linear_w8a8(x, cast("Fp8Weight", weight_of(codes, scale, whole, kind)))


@_linear.register_fake
@_fp8_linear_w8a8.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_of(codes, scale, whole, kind).shape[0])


@_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor, whole: Tensor | None, kind: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight_of(codes, scale, whole, kind).shape[1])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, whole, *ctx.rest = inputs
    ctx.save_for_backward(codes, scale, whole)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    grad_x = torch.ops.k2quant.linear_backward(grad, *ctx.saved_tensors, *ctx.rest) if wanted else None
    return grad_x, None, None, None, None


for _operator in (_linear, _fp8_linear_w8a8):
    _operator.register_autograd(_gradient, setup_context=_keep_weight)
