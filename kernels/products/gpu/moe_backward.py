"""The gradients of `moe` for activations and router weights; quantised weights have none.

With g the gradient of out:
    a[p] = down[e].T g[t];  weight gradient[p] = hidden[p] . a[p]
    then through silu(gate) * up in float32, and back through gate[e].T and up[e].T; the pairs of a token are summed.

Blocks of pairs are those of `moe`. Here too every sum has a fixed order, nothing waits for the GPU, and grids follow
from shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import round_to
from k2quant.kernels.products.gpu.linear import constants_of, fitted, parts_of, swizzled
from k2quant.kernels.products.gpu.moe import (
    COLUMNS,
    block_rows,
    blocks_of,
    depth_of,
    of_expert,
    run_combine,
    run_gate_up,
    slots,
)
from k2quant.kernels.products.gpu.routing import Routing, plan
from k2quant.kernels.products.gpu.tiles import dot, weight_tile
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config


def moe_backward(
    grad: Tensor,
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    ids: Tensor,
    weights: Tensor,
    config_in: Config,
    config_out: Config,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, `[T, H]` in its dtype, and of the router's weights, `[T, k]` in theirs.

    Args:
        grad: `[T, H]`, the gradient of what `moe` returns.
        x: as given to `moe`, like the arguments that follow.
        gate: `[E, I, H]`.
        up: `[E, I, H]`.
        down: `[E, H, I]`.
        ids: `[T, k]`; a pair without an expert has the gradients zero.
        weights: `[T, k]`.
        config_in: tiles of gate and up, forward and backward.
        config_out: tiles of down, backward, with the same `rows`.
    """
    experts = gate.shape[0]
    routing = plan(ids, experts, block_rows(config_in, config_out))
    products = run_gate_up(x.contiguous(), gate, up, ids, routing, config_in, products=True)
    back = _run_back([grad.to(x.dtype).contiguous()], [down], ids, routing, config_out, torch.float32)
    grad_weights = _run_activation_back(back, *products, ids, weights, experts)
    pairs = _run_back(list(products), [gate, up], ids, routing, config_in, x.dtype)
    return run_combine(pairs, ids, None, experts), grad_weights


def _run_back(
    grads: list[Tensor],
    parts: list[PackedWeight],
    ids: Tensor,
    routing: Routing,
    config: Config,
    dtype: torch.dtype,
) -> Tensor:
    """Return the sum of the gradients that reach the inputs of `parts`, `[P, K]`.

    Args:
        grads: the gradient of each part's output: `[P, N]`, or a single `[T, N]` for a part that all pairs of a token
            share the gradient of.
        parts: one or two weights `[E, N, K]`.
        ids: `[T, k]`.
        routing: the work.
        config: `depth` columns of the result are made at a time, from `columns` rows of the weight at a time.
        dtype: of the result.
    """
    experts, rows, columns = parts[0].shape
    out = torch.empty(ids.numel(), columns, dtype=dtype, device=ids.device)
    depth = depth_of(parts[0], config)
    tile, warps = fitted(config, depth)
    launch(
        _back,
        (routing.blocks * (columns // depth),),
        *(grads[0], *parts_of(parts[0]), grads[-1], *parts_of(parts[-1]), out),
        *(*blocks_of(routing), experts),
        **constants_of(parts[0]),
        N=rows,
        K=columns,
        TOP=1 if len(parts) == 2 else ids.shape[1],
        BLOCK_M=routing.rows,
        BLOCK_N=tile,
        BLOCK_K=depth,
        GROUP=config.group,
        DIRECT=routing.pairs is None,
        TWO=len(parts) == 2,
        warps=warps,
        stages=config.stages,
    )
    return out


def _run_activation_back(back: Tensor, gate: Tensor, up: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Turn the products gate and up `[P, I]` into their gradients, in place; return that of the router's weights."""
    out = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    arguments = (back, gate, up, ids.contiguous(), weights.contiguous(), out, experts)
    launch(_activation_back, (ids.numel(),), *arguments, N=gate.shape[1], BLOCK=COLUMNS)
    return out


@triton.jit(do_not_specialize=["blocks"])
def _back(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    whole_ptr,
    grad2_ptr,
    codes2_ptr,
    scale2_ptr,
    whole2_ptr,
    out_ptr,
    pairs_ptr,
    experts_ptr,
    blocks,
    E,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DIRECT: tl.constexpr,
    TWO: tl.constexpr,
):
    """Store grad @ weight for a block of pairs and BLOCK_K columns: a sum over the weight's rows, N of them.

    Row pair // TOP of grad `[.., N]` belongs to a pair. With TWO, the product of a second pair of both is added.
    """
    block, tile = swizzled(tl.program_id(0), blocks, K // BLOCK_K, GROUP)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    pair = slots(pairs_ptr, block, BLOCK_M, DIRECT)
    codes_ptr, scale_ptr = of_expert(codes_ptr, scale_ptr, expert, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS)
    codes2_ptr, scale2_ptr = of_expert(codes2_ptr, scale2_ptr, expert, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS)
    k = tile * BLOCK_K
    grad_place = (pair // TOP)[:, None] * N
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(0, N, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        present = (pair >= 0)[:, None] & (rows < N)[None, :]
        grad = tl.load(grad_ptr + grad_place + rows[None, :], mask=present, other=0.0)
        weight = weight_tile(
            codes_ptr,
            scale_ptr,
            whole_ptr + expert,
            rows,
            rows < N,
            k,
            N,
            K,
            FORMAT,
            SCALE_ROWS,
            SCALE_COLUMNS,
            DIVIDES,
            BLOCK_K,
            grad.dtype,
        )
        acc = dot(grad, weight, acc)
        if TWO:
            grad = tl.load(grad2_ptr + grad_place + rows[None, :], mask=present, other=0.0)
            weight = weight_tile(
                codes2_ptr,
                scale2_ptr,
                whole2_ptr + expert,
                rows,
                rows < N,
                k,
                N,
                K,
                FORMAT,
                SCALE_ROWS,
                SCALE_COLUMNS,
                DIVIDES,
                BLOCK_K,
                grad.dtype,
            )
            acc = dot(grad, weight, acc)
    place = pair[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :]
    tl.store(out_ptr + place, round_to(acc, out_ptr.dtype.element_ty), mask=(pair >= 0)[:, None])


@triton.jit
def _activation_back(
    back_ptr,
    gate_ptr,
    up_ptr,
    ids_ptr,
    weights_ptr,
    grad_weights_ptr,
    E,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take one pair back through silu(gate) * up, in float32: gate and up `[P, N]` become their own gradients.

    back is the unweighted gradient of hidden, float32 `[P, N]`; its product with hidden is the weight's gradient.
    """
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= E):
        tl.store(grad_weights_ptr + pair, 0.0)
        return
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    dtype = gate_ptr.dtype.element_ty
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = pair * N + column
        back = tl.load(back_ptr + place, mask=column < N, other=0.0)
        gate = tl.load(gate_ptr + place, mask=column < N, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + place, mask=column < N, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        # hidden as the forward pass rounded it: that is what the weight multiplied.
        total += back * round_to(gate * sigmoid * up, dtype).to(tl.float32)
        back *= weight
        tl.store(up_ptr + place, round_to(back * gate * sigmoid, dtype), mask=column < N)
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(gate_ptr + place, round_to(back * up * slope, dtype), mask=column < N)
    tl.store(grad_weights_ptr + pair, round_to(tl.sum(total), grad_weights_ptr.dtype.element_ty))
