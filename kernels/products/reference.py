"""What each matrix product means, in plain torch: the truth that every kernel is held to.

x is BF16, FP16 or float32; products are summed in float32 at least, over the
weights rounded to the dtype of x, and the result has that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul
from torch.nn.functional import pad, silu

from k2quant.kernels.products.packed.fp8 import Fp8Weight, spread
from k2quant.kernels.products.packed.weight import PackedWeight

Product = Callable[[Tensor, PackedWeight], Tensor]
"""Makes x @ weight.T."""

Weight = TypeVar("Weight")
"""Whatever a product takes for a weight."""

LARGEST_FP8 = 448.0
SMALLEST_AMAX = 1e-10
"""An activation block of zeros, or nearly so, is scaled as if its largest value were this: no 0 / 0."""


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, for x `[.., K]`."""
    return matmul(x, weight.dequantize(x.dtype))


def linear_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Return grad @ weight, `[.., K]`, for grad `[.., N]`: the gradient of `linear` for x."""
    return grad @ weight.dequantize(grad.dtype)


def fp8_quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode `[M, K]` as e4m3 codes `[M, K]` with a float32 scale for each 1x128 block, `[M, ceil(K/128)]`.

    scale = amax/448, where amax is at least 1e-10; codes = x/scale in float32, saturated, rounded half to even.
    """
    blocks = pad(x.float(), (0, -x.shape[1] % 128)).unflatten(-1, (-(-x.shape[1] // 128), 128))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX)
    scale = amax / torch.full_like(amax, LARGEST_FP8)
    codes = (blocks / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[:, : x.shape[1]].contiguous(), scale.squeeze(-1)


def fp8_linear_w8a8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Return x @ weight.T, `[.., N]`, with x rounded to FP8 in 1x128 blocks; summed in float32."""
    codes, scale = fp8_quantize_activations(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    rounded = codes.float() * spread(scale, (1, 128), codes.shape)
    return matmul(rounded, weight.dequantize(torch.float32)).to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def moe(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    ids: Tensor,
    weights: Tensor,
    *,
    product: Product | None = None,
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs.

    Args:
        x: `[T, H]`.
        gate: `[E, I, H]`.
        up: `[E, I, H]`.
        down: `[E, H, I]`.
        ids: `[T, k]` int32 or int64; an id outside 0..E-1, such as -1, is no expert and adds nothing.
        weights: `[T, k]`, the router's; any float dtype.
        product: makes each matrix product; `linear` if it is left out.

    Returns:
        `[T, H]` in the dtype of x. An expert computes down(silu(gate(x)) * up(x)) with each product rounded to that
        dtype once, SiLU and the product in float32; the weighted sum runs over k in order, in float32.
    """

    def run(expert: int, token: Tensor) -> Tensor:
        parts = gate.expert(expert), up.expert(expert), down.expert(expert)
        return expert_output(x[token], *parts, product or linear)

    return mixture(x, gate.shape[0], run, ids, weights)


def expert_output(
    x: Tensor, gate: Weight, up: Weight, down: Weight, product: Callable[[Tensor, Weight], Tensor]
) -> Tensor:
    """Return what one expert makes of x `[M, H]`, by a product with weights of any kind; see `moe`."""
    hidden = silu(product(x, gate).float()) * product(x, up).float()
    return product(hidden.to(x.dtype), down)


def mixture(x: Tensor, experts: int, run: Callable[[int, Tensor], Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """Do `moe` with experts of any kind.

    Args:
        x: `[T, H]`.
        experts: E.
        run: returns what an expert makes of some tokens, `[.., H]`; given its number and theirs.
        ids: as for `moe`.
        weights: the same.
    """
    pairs = x.new_zeros(*ids.shape, x.shape[1])
    for expert in ids[(ids >= 0) & (ids < experts)].unique().tolist():
        token, slot = torch.where(ids == expert)
        pairs[token, slot] = run(expert, token)
    kept = weights.float().masked_fill((ids < 0) | (ids >= experts), 0)
    return (pairs.float() * kept[..., None]).sum(1).to(x.dtype)


def moe_backward(
    grad: Tensor,
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    ids: Tensor,
    weights: Tensor,
    *,
    products: tuple[Product, Product] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `moe` for x, `[T, H]`, and for the router's weights, `[T, k]`, given that of its result.

    Args:
        grad: `[T, H]`.
        x: as for `moe`, like all that follow.
        gate: see there.
        up: see there.
        down: see there.
        ids: see there.
        weights: see there.
        products: x @ weight.T and grad @ weight; those of this file if left out.
    """
    forward, backward = products or (linear, linear_backward)
    grad_pairs = x.new_zeros(*ids.shape, x.shape[1])
    grad_weights = torch.zeros_like(weights)
    for expert in ids[(ids >= 0) & (ids < gate.shape[0])].unique().tolist():
        token, slot = torch.where(ids == expert)
        wg, wu, wd = (part.expert(expert) for part in (gate, up, down))
        gated, lifted = forward(x[token], wg).float(), forward(x[token], wu).float()
        sigmoid = gated.sigmoid()
        hidden = (gated * sigmoid * lifted).to(x.dtype).float()
        grad_hidden = backward(grad[token], wd).float()
        grad_weights[token, slot] = (hidden * grad_hidden).sum(-1).to(weights.dtype)
        grad_hidden = grad_hidden * weights[token, slot].float()[:, None]
        grad_gated = grad_hidden * lifted * sigmoid * (1 + gated * (1 - sigmoid))
        grad_lifted = grad_hidden * gated * sigmoid
        grad_pairs[token, slot] = backward(grad_gated.to(x.dtype), wg) + backward(grad_lifted.to(x.dtype), wu)
    return grad_pairs.float().sum(1).to(x.dtype), grad_weights
