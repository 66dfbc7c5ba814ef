"""A mixture of experts on quantised weights: grouped products in Triton; `moe_backward` has the gradients.

Three launches (five where pairs are brought together first, see `routing`):
    `_gate_up`  hidden[p] = silu(gate[e] x[t]) * up[e] x[t]     for every pair p = t * k + j with expert e = ids[t, j]
    `_down`     y[p] = down[e] hidden[p]
    `_combine`  out[t] = sum over j, in order, of weights[t, j] * y[t * k + j]

What is computed for a pair is stored at the pair's number, so only the two products know of blocks and slots. A pair
without an expert is never computed: its rows of hidden and y hold whatever the memory held, and are never read.

Every sum has a fixed order: equal inputs give equal bits. Nothing waits for the GPU, and grids follow from shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import round_to
from k2quant.kernels.products.gpu.linear import constants_of, fitted, parts_of, swizzled, thin, tile_columns
from k2quant.kernels.products.gpu.routing import Routing, plan
from k2quant.kernels.products.gpu.tiles import (
    dot,
    finished,
    fp4_tile,
    fp8_codes,
    fp8_scale,
    int4_tile,
    multiply,
    multiply_thin,
    thin_tiles,
    thin_x,
)
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config

COLUMNS = 1024
"""Columns that a program of `_combine` or `_activation_back` handles at a time: 16 bytes of BF16 for each of its 128
threads."""

LYING = tl.constexpr(8)
"""BLOCK_M at which a tile of the weight, not x, is the left factor: the matrix units take 16 rows on the left and 8
columns on the right, so 8 rows of x on the left would be multiplied twice. Saves 10 to 20 % of a loop's instructions,
of which there are nearly too many to keep up with the memory."""


def moe(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    ids: Tensor,
    weights: Tensor,
    config_in: Config,
    config_out: Config,
) -> Tensor:
    """Do `reference.moe`.

    Args:
        x: `[T, H]`, BF16, FP16 or float32.
        gate: `[E, I, H]`; INT4 in the layout `groups`.
        up: `[E, I, H]`, of the same kind.
        down: `[E, H, I]`.
        ids: `[T, k]`, int32 or int64; one outside 0..E-1, such as -1, is no expert.
        weights: `[T, k]`, any float dtype.
        config_in: tiles of gate and up; each program has two accumulators of `rows` x `columns`.
        config_out: tiles of down, with the same `rows`.

    Returns:
        `[T, H]` in the dtype of x.
    """
    experts = gate.shape[0]
    routing = plan(ids, experts, block_rows(config_in, config_out))
    hidden = run_gate_up(x.contiguous(), gate, up, ids, routing, config_in, products=False)[0]
    pairs = _run_down(hidden, down, routing, config_out)
    return run_combine(pairs, ids, weights, experts)


def block_rows(config_in: Config, config_out: Config) -> int:
    if config_in.rows != config_out.rows:
        raise UsageError(
            f"the configs of one mixture of experts share their blocks of rows: found {config_in.rows} rows for gate "
            f"and up, {config_out.rows} for down"
        )
    return config_in.rows


def depth_of(weight: PackedWeight, config: Config) -> int:
    """Return BLOCK_K."""
    return config.depth_for(weight.shape[-1], tile_columns(weight))


def blocks_of(routing: Routing) -> tuple[Tensor, Tensor, int]:
    """Return the arguments by which a kernel finds its block: pairs, experts, number of blocks."""
    return (routing.experts if routing.pairs is None else routing.pairs), routing.experts, routing.blocks


def run_gate_up(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    ids: Tensor,
    routing: Routing,
    config: Config,
    *,
    products: bool,
) -> tuple[Tensor, Tensor]:
    """Return hidden `[P, I]` (twice), or, for the backward pass, the two products from which it is made."""
    experts, inner, width = gate.shape
    out = torch.empty(ids.numel(), inner, dtype=x.dtype, device=x.device)
    other = torch.empty_like(out) if products else out
    depth = depth_of(gate, config)
    tile, warps = fitted(config, depth)
    launch(
        _gate_up,
        (routing.blocks * triton.cdiv(inner, tile),),
        *(x, *parts_of(gate), *parts_of(up), out, other, *blocks_of(routing), experts),
        **constants_of(gate),
        N=inner,
        K=width,
        TOP=ids.shape[1],
        BLOCK_M=routing.rows,
        BLOCK_N=tile,
        BLOCK_K=depth,
        GROUP=config.group,
        DIRECT=routing.pairs is None,
        PRODUCTS=products,
        THIN=thin(gate, x.dtype, routing.rows, depth),
        warps=warps,
        stages=config.stages,
    )
    return out, other


def _run_down(hidden: Tensor, down: PackedWeight, routing: Routing, config: Config) -> Tensor:
    """Return y `[P, H]`."""
    experts, width, inner = down.shape
    out = torch.empty(hidden.shape[0], width, dtype=hidden.dtype, device=hidden.device)
    depth = depth_of(down, config)
    tile, warps = fitted(config, depth)
    launch(
        _down,
        (routing.blocks * triton.cdiv(width, tile),),
        *(hidden, *parts_of(down), out, *blocks_of(routing), experts),
        **constants_of(down),
        N=width,
        K=inner,
        BLOCK_M=routing.rows,
        BLOCK_N=tile,
        BLOCK_K=depth,
        GROUP=config.group,
        DIRECT=routing.pairs is None,
        THIN=thin(down, hidden.dtype, routing.rows, depth),
        warps=warps,
        stages=config.stages,
    )
    return out


def run_combine(pairs: Tensor, ids: Tensor, weights: Tensor | None, experts: int) -> Tensor:
    """Return for each token the sum of its rows of pairs `[P, H]`, weighted if weights are given."""
    tokens, top = ids.shape
    width = pairs.shape[1]
    out = torch.empty(tokens, width, dtype=pairs.dtype, device=pairs.device)
    ids = ids.contiguous()
    launch(
        _combine,
        (tokens, triton.cdiv(width, COLUMNS)),
        *(pairs, ids, ids if weights is None else weights.contiguous(), out, experts),
        N=width,
        TOP=top,
        WEIGHTED=weights is not None,
        BLOCK=COLUMNS,
    )
    return out


@triton.jit
def slots(pairs_ptr, block, BLOCK_M: tl.constexpr, DIRECT: tl.constexpr):
    """Return the pairs of a block, `[BLOCK_M]` int64, -1 for padding."""
    slot = tl.arange(0, BLOCK_M)
    pair = tl.where(slot == 0, block, -1) if DIRECT else tl.load(pairs_ptr + block * BLOCK_M + slot)
    return pair.to(tl.int64)


@triton.jit
def of_expert(
    codes_ptr,
    scale_ptr,
    expert,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """Return where one expert's codes and scales begin; `expert` is int64, for K2's stacks hold 5.6e9 codes."""
    if FORMAT == "int4":
        codes_ptr += expert * N * (K // 8)
        scale_ptr += expert * N * (K // 32)
    elif FORMAT == "fp8":
        codes_ptr += expert * N * K
        scale_ptr += expert * tl.cdiv(N, SCALE_ROWS) * tl.cdiv(K, SCALE_COLUMNS)
    else:
        codes_ptr += expert * N * (K // 8)
        scale_ptr += expert * N * (K // SCALE_COLUMNS)
    return codes_ptr, scale_ptr


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return an empty sum for `_multiply`."""
    return tl.zeros((BLOCK_N, BLOCK_M) if BLOCK_M == LYING else (BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _upright(acc, BLOCK_M: tl.constexpr):
    """Return a sum of `_multiply` as `[BLOCK_M, BLOCK_N]`."""
    return acc.T if BLOCK_M == LYING else acc


@triton.jit
def _multiply(
    acc,
    x,
    codes_ptr,
    scale_ptr,
    rows,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Do `tiles.multiply`; for 8 rows of x, acc is `[BLOCK_N, 8]` and acc + tile @ x.T is returned."""
    one: tl.constexpr = SCALE_ROWS % BLOCK_N == 0
    ok = rows < N
    if BLOCK_M != LYING:
        acc = multiply(acc, x, codes_ptr, scale_ptr, rows, ok, k, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_K, one)
    elif FORMAT == "int4":
        acc = dot(int4_tile(codes_ptr, scale_ptr, rows, ok, k, N, BLOCK_K, x.dtype), x.T, acc)
    elif FORMAT != "fp8":
        tile = fp4_tile(codes_ptr, scale_ptr, rows, ok, k, K, FORMAT, SCALE_COLUMNS, BLOCK_K, x.dtype)
        acc = dot(tile, x.T, acc)
    else:
        product = dot(fp8_codes(codes_ptr, rows, ok, k, K, BLOCK_K, x.dtype), x.T, tl.zeros_like(acc))
        if one:
            acc += product * fp8_scale(scale_ptr, tl.min(rows, 0), True, k, K, SCALE_ROWS, SCALE_COLUMNS)
        else:
            acc += product * fp8_scale(scale_ptr, rows, ok, k, K, SCALE_ROWS, SCALE_COLUMNS)[:, None]
    return acc


@triton.jit(do_not_specialize=["blocks"])
def _gate_up(
    x_ptr,
    gate_ptr,
    gate_scale_ptr,
    gate_whole_ptr,
    up_ptr,
    up_scale_ptr,
    up_whole_ptr,
    out_ptr,
    other_ptr,
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
    PRODUCTS: tl.constexpr,
    THIN: tl.constexpr,
):
    """Store silu(gate x) * (up x) of a block of pairs and a tile of columns; with PRODUCTS the two factors instead."""
    block, tile = swizzled(tl.program_id(0), blocks, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    pair = slots(pairs_ptr, block, BLOCK_M, DIRECT)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_ptr, gate_scale_ptr = of_expert(gate_ptr, gate_scale_ptr, expert, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS)
    up_ptr, up_scale_ptr = of_expert(up_ptr, up_scale_ptr, expert, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS)
    x_rows = x_ptr + (pair // TOP) * K
    gate = _nothing(BLOCK_M, BLOCK_N)
    up = _nothing(BLOCK_M, BLOCK_N)
    for k in range(0, K, BLOCK_K):
        if THIN:
            gates = thin_tiles(gate_ptr, gate_scale_ptr, rows, rows < N, k, N, BLOCK_K)
            ups = thin_tiles(up_ptr, up_scale_ptr, rows, rows < N, k, N, BLOCK_K)
            for part in tl.static_range(8):
                x = thin_x(x_rows, pair >= 0, k, part, BLOCK_K)
                gate = dot(x, gates[part].T, gate)
                up = dot(x, ups[part].T, up)
        else:
            x = tl.load(x_rows[:, None] + (k + tl.arange(0, BLOCK_K))[None, :], mask=(pair >= 0)[:, None], other=0.0)
            gate = _multiply(
                gate,
                x,
                gate_ptr,
                gate_scale_ptr,
                rows,
                k,
                N,
                K,
                FORMAT,
                SCALE_ROWS,
                SCALE_COLUMNS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            up = _multiply(
                up, x, up_ptr, up_scale_ptr, rows, k, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K
            )
    # Each product is rounded once, as the two products of an unfused layer would be.
    dtype = x_ptr.dtype.element_ty
    gate = round_to(finished(_upright(gate, BLOCK_M), gate_whole_ptr + expert, FORMAT, DIVIDES), dtype)
    up = round_to(finished(_upright(up, BLOCK_M), up_whole_ptr + expert, FORMAT, DIVIDES), dtype)
    place = pair[:, None] * N + rows[None, :]
    wanted = (pair >= 0)[:, None] & (rows < N)[None, :]
    if PRODUCTS:
        tl.store(out_ptr + place, gate, mask=wanted)
        tl.store(other_ptr + place, up, mask=wanted)
    else:
        factor = gate.to(tl.float32)
        hidden = factor / (1.0 + tl.exp(-factor)) * up.to(tl.float32)
        tl.store(out_ptr + place, round_to(hidden, dtype), mask=wanted)


@triton.jit(do_not_specialize=["blocks"])
def _down(
    x_ptr,
    codes_ptr,
    scale_ptr,
    whole_ptr,
    out_ptr,
    pairs_ptr,
    experts_ptr,
    blocks,
    E,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DIRECT: tl.constexpr,
    THIN: tl.constexpr,
):
    """Store the product of a block of pairs' rows of x `[P, K]` with a tile of their expert's weight."""
    block, tile = swizzled(tl.program_id(0), blocks, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    pair = slots(pairs_ptr, block, BLOCK_M, DIRECT)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    codes_ptr, scale_ptr = of_expert(codes_ptr, scale_ptr, expert, N, K, FORMAT, SCALE_ROWS, SCALE_COLUMNS)
    x_rows = x_ptr + pair * K
    acc = _nothing(BLOCK_M, BLOCK_N)
    for k in range(0, K, BLOCK_K):
        if THIN:
            acc = multiply_thin(acc, x_rows, pair >= 0, codes_ptr, scale_ptr, rows, rows < N, k, N, BLOCK_K)
        else:
            x = tl.load(x_rows[:, None] + (k + tl.arange(0, BLOCK_K))[None, :], mask=(pair >= 0)[:, None], other=0.0)
            acc = _multiply(
                acc,
                x,
                codes_ptr,
                scale_ptr,
                rows,
                k,
                N,
                K,
                FORMAT,
                SCALE_ROWS,
                SCALE_COLUMNS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    out = finished(_upright(acc, BLOCK_M), whole_ptr + expert, FORMAT, DIVIDES)
    out = round_to(out, x_ptr.dtype.element_ty)
    wanted = (pair >= 0)[:, None] & (rows < N)[None, :]
    tl.store(out_ptr + pair[:, None] * N + rows[None, :], out, mask=wanted)


@triton.jit
def _combine(
    pairs_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    E,
    N: tl.constexpr,
    TOP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a token's sum of its pairs' rows `[P, N]`, in their order, in float32; the row of no expert is not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP):
        pair = token * TOP + j
        expert = tl.load(ids_ptr + pair)
        known = (expert >= 0) & (expert < E)
        row = tl.load(pairs_ptr + pair * N + column, mask=(column < N) & known, other=0.0).to(tl.float32)
        if WEIGHTED:
            # No expert, no weight: a weight of inf or NaN there must not spread.
            row *= tl.load(weights_ptr + pair, mask=known, other=0.0).to(tl.float32)
        total += row
    tl.store(out_ptr + token * N + column, round_to(total, out_ptr.dtype.element_ty), mask=column < N)
