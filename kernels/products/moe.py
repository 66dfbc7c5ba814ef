"""`moe`, the routed experts of a layer, by any of its names, as a torch operator; see `linear`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.linear import check_weight, check_x, operands, weight_of
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.prepare import PACKED


def moe(x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, ids: Tensor, weights: Tensor) -> Tensor:
    """Send each token through its experts, of any one format: the sum over k of weights * down(silu(gate(x)) * up(x)).

    Args:
        x: `[T, H]`, BF16, FP16 or float32.
        gate: `[E, I, H]`, from one of the functions `prepare_`.
        up: `[E, I, H]`, of the same format.
        down: `[E, H, I]`, too.
        ids: `[T, k]` int32 or int64, the experts of each token; an id outside 0..E-1, such as -1, adds nothing.
        weights: `[T, k]`, the router's, any float dtype.

    Returns:
        `[T, H]` in the dtype of x. x and weights have gradients.

    Raises:
        UsageError: the arguments do not fit each other.
    """
    return _moe(x, gate, up, down, ids, weights, *PACKED.values())


def moe_int4(x: Tensor, gate: Int4Weight, up: Int4Weight, down: Int4Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """Send each token through its experts, INT4: the sum over k of weights * down(silu(gate(x)) * up(x)).

    Args:
        x: `[T, H]`, BF16, FP16 or float32.
        gate: `[E, I, H]`, from `prepare_int4`.
        up: `[E, I, H]`.
        down: `[E, H, I]`.
        ids: `[T, k]` int32 or int64, the experts of each token; an id outside 0..E-1, such as -1, adds nothing.
        weights: `[T, k]`, the router's, any float dtype.

    Returns:
        `[T, H]` in the dtype of x. x and weights have gradients.

    Raises:
        UsageError: the arguments do not fit each other.
    """
    return _moe(x, gate, up, down, ids, weights, Int4Weight)


def moe_fp8(x: Tensor, gate: Fp8Weight, up: Fp8Weight, down: Fp8Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """Send each token through its experts, block-FP8: the sum over k of weights * down(silu(gate(x)) * up(x)).

    Args:
        x: `[T, H]`, BF16, FP16 or float32.
        gate: `[E, I, H]`, from `prepare_fp8`.
        up: `[E, I, H]`.
        down: `[E, H, I]`.
        ids: `[T, k]` int32 or int64, the experts of each token; an id outside 0..E-1, such as -1, adds nothing.
        weights: `[T, k]`, the router's, any float dtype.

    Returns:
        `[T, H]` in the dtype of x. x and weights have gradients.

    Raises:
        UsageError: the arguments do not fit each other.
    """
    return _moe(x, gate, up, down, ids, weights, Fp8Weight)


def _moe(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    ids: Tensor,
    weights: Tensor,
    *kinds: type[PackedWeight],
) -> Tensor:
    _check(x, (gate, up, down), kinds, ids, weights)
    parts = [operands(part) for part in (gate, up, down)]
    tensors = [tensor for part in parts for tensor in part[:3]]
    return cast("Tensor", torch.ops.k2quant.moe(x, *tensors, ids, weights, parts[0][3]))


def _check(
    x: Tensor,
    parts: tuple[PackedWeight, PackedWeight, PackedWeight],
    kinds: tuple[type[PackedWeight], ...],
    ids: Tensor,
    weights: Tensor,
) -> None:
    gate, up, down = parts
    check_weight(gate, "gate", *kinds)
    check_weight(up, "up", type(gate))
    check_weight(down, "down", type(gate))
    if x.ndim != 2:
        raise UsageError(f"x: expected [T, H], found {list(x.shape)}")
    check_x(x, gate, *kinds, dimensions=3)
    experts, inner, hidden = gate.shape
    if up.shape != gate.shape:
        raise UsageError(f"up: expected {list(gate.shape)} like gate, found {list(up.shape)}")
    if down.shape != (experts, hidden, inner):
        raise UsageError(
            f"down: expected {[experts, hidden, inner]} for gate {list(gate.shape)}, found {list(down.shape)}"
        )
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in {torch.int32, torch.int64}:
        raise UsageError(f"ids: expected int32 or int64 [{x.shape[0]}, k], found {ids.dtype} {list(ids.shape)}")
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise UsageError(
            f"weights: expected floats {list(ids.shape)} like ids, found {weights.dtype} {list(weights.shape)}"
        )
    devices = {part.device for part in (x, gate.codes, up.codes, down.codes, ids, weights)}
    if len(devices) != 1:
        raise UsageError(f"expected all arguments on one device, found {', '.join(sorted(map(str, devices)))}")
    if len({part.layout for part in parts}) != 1:
        found = ", ".join(sorted({part.layout for part in parts}))
        raise UsageError(f"gate, up and down: expected one layout, found {found}")
    if len({part.numbers for part in parts}) != 1:
        found = ", ".join("x".join(map(str, numbers)) for numbers in sorted({part.numbers for part in parts}))
        raise UsageError(f"gate, up and down: expected weights of one kind, found {gate.format} {found}")


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
"""Codes, scale and the scale of whole matrices of gate, up and down."""


def _weights_of(parts: Parts, kind: str) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
    gate, gate_scale, gate_whole, up, up_scale, up_whole, down, down_scale, down_whole = parts
    return (
        weight_of(gate, gate_scale, gate_whole, kind),
        weight_of(up, up_scale, up_whole, kind),
        weight_of(down, down_scale, down_whole, kind),
    )


# A list of tensors would be shorter, but its gradient takes 14 us more in each call.
@custom_op("k2quant::moe", mutates_args=())
def _moe_operator(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    gate_whole: Tensor | None,
    up: Tensor,
    up_scale: Tensor,
    up_whole: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_whole: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    kind: str,
) -> Tensor:
    stacks = gate, gate_scale, gate_whole, up, up_scale, up_whole, down, down_scale, down_whole
    parts = _weights_of(stacks, kind)
    return dispatch.moe(x, *parts, ids, weights)


@custom_op("k2quant::moe_backward", mutates_args=())
def _moe_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    gate_whole: Tensor | None,
    up: Tensor,
    up_scale: Tensor,
    up_whole: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_whole: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    stacks = gate, gate_scale, gate_whole, up, up_scale, up_whole, down, down_scale, down_whole
    parts = _weights_of(stacks, kind)
    return dispatch.moe_backward(grad, x, *parts, ids, weights)


@_moe_operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_moe_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights, layout = rest[10], torch.contiguous_format
    return torch.empty_like(x, memory_format=layout), torch.empty_like(weights, memory_format=layout)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.rest = inputs[12:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weights = torch.ops.k2quant.moe_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (grad_x, *[None] * 10, grad_weights, None)


_moe_operator.register_autograd(_gradient, setup_context=_keep)
