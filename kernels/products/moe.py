"""`moe_int4` and `moe_fp8`, the routed experts of a layer, as torch operators."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.codecs.views import as_bytes, as_codes
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.linear import check_weight, check_x
from k2quant.kernels.products.weights import Fp8Weight, Int4Weight, Layout


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
    _check(x, (gate, up, down), Int4Weight, ids, weights)
    layouts = {gate.layout, up.layout, down.layout}
    if len(layouts) != 1:
        raise UsageError(f"gate, up and down: expected one layout, found {', '.join(sorted(layouts))}")
    parts = (gate.codes, gate.scale, up.codes, up.scale, down.codes, down.scale)
    return cast("Tensor", torch.ops.k2quant.moe_int4(x, *parts, ids, weights, gate.layout))


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
    _check(x, (gate, up, down), Fp8Weight, ids, weights)
    blocks = {gate.block, up.block, down.block}
    if len(blocks) != 1:
        found = ", ".join(f"{rows}x{columns}" for rows, columns in sorted(blocks))
        raise UsageError(f"gate, up and down: expected one block size, found {found}")
    parts = [tensor for part in (gate, up, down) for tensor in (as_bytes(part.codes), part.scale)]
    return cast("Tensor", torch.ops.k2quant.moe_fp8(x, *parts, ids, weights, *gate.block))


def _check(
    x: Tensor,
    parts: tuple[Int4Weight | Fp8Weight, ...],
    kind: type[Int4Weight | Fp8Weight],
    ids: Tensor,
    weights: Tensor,
) -> None:
    for name, part in zip(("gate", "up", "down"), parts, strict=True):
        check_weight(part, kind, name)
    gate, up, down = parts
    if x.ndim != 2:
        raise UsageError(f"x: expected [T, H], found {list(x.shape)}")
    check_x(x, gate, kind, dimensions=3)
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


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Codes and scale of gate, up and down."""


def _int4(parts: Parts, layout: str) -> tuple[Int4Weight, Int4Weight, Int4Weight]:
    kind = cast("Layout", layout)
    return Int4Weight(*parts[0:2], kind), Int4Weight(*parts[2:4], kind), Int4Weight(*parts[4:6], kind)


def _fp8(parts: Parts, block: tuple[int, int]) -> tuple[Fp8Weight, Fp8Weight, Fp8Weight]:
    gate, gate_scale, up, up_scale, down, down_scale = parts
    return (
        Fp8Weight(as_codes(gate), gate_scale, block),
        Fp8Weight(as_codes(up), up_scale, block),
        Fp8Weight(as_codes(down), down_scale, block),
    )


@custom_op("k2quant::moe_int4", mutates_args=())
def _moe_int4(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    ids: Tensor,
    weights: Tensor,
    layout: str,
) -> Tensor:
    return dispatch.moe(x, *_int4((gate, gate_scale, up, up_scale, down, down_scale), layout), ids, weights)


@custom_op("k2quant::moe_int4_backward", mutates_args=())
def _moe_int4_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    ids: Tensor,
    weights: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor]:
    parts = _int4((gate, gate_scale, up, up_scale, down, down_scale), layout)
    return dispatch.moe_backward(grad, x, *parts, ids, weights)


@custom_op("k2quant::moe_fp8", mutates_args=())
def _moe_fp8(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    ids: Tensor,
    weights: Tensor,
    block_rows: int,
    block_columns: int,
) -> Tensor:
    parts = _fp8((gate, gate_scale, up, up_scale, down, down_scale), (block_rows, block_columns))
    return dispatch.moe(x, *parts, ids, weights)


@custom_op("k2quant::moe_fp8_backward", mutates_args=())
def _moe_fp8_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    ids: Tensor,
    weights: Tensor,
    block_rows: int,
    block_columns: int,
) -> tuple[Tensor, Tensor]:
    parts = _fp8((gate, gate_scale, up, up_scale, down, down_scale), (block_rows, block_columns))
    return dispatch.moe_backward(grad, x, *parts, ids, weights)


@_moe_int4.register_fake
@_moe_fp8.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_moe_int4_backward.register_fake
@_moe_fp8_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights = next(part for part in reversed(rest) if isinstance(part, Tensor))
    layout = torch.contiguous_format
    return torch.empty_like(x, memory_format=layout), torch.empty_like(weights, memory_format=layout)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.rest = inputs[9:]


def _gradient(ctx: Any, grad: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_weights = backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (grad_x, *[None] * 7, grad_weights, *[None] * len(ctx.rest))


_moe_int4.register_autograd(
    lambda ctx, grad: _gradient(ctx, grad, torch.ops.k2quant.moe_int4_backward), setup_context=_keep
)
_moe_fp8.register_autograd(
    lambda ctx, grad: _gradient(ctx, grad, torch.ops.k2quant.moe_fp8_backward), setup_context=_keep
)
