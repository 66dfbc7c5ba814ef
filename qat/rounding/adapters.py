"""Low-rank updates within the rounding: W + scaling * B A, summed so that the order of sums does not matter.

The products are summed in float64, added to the weight there, and rounded to BF16 once, as `k2quant merge` does: what
the forward pass sees is what is exported, on whatever device and in whatever pieces, for sums in another order differ
in their last bits of 53 and BF16 keeps 8. The gate of `exporting` compares the result all the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from k2quant.kernels.codecs import reference
from k2quant.qat.config import Adapter
from k2quant.qat.rounding.estimators import PIECE
from k2quant.qat.rounding.shards import whole
from k2quant.qat.rounding.targets import Target

CHILD = "adapter"
"""Name of the child module that holds the two matrices of each parameter."""


class LowRank(nn.Module):
    """The matrices A `[.., r, K]` and B `[.., N, r]` of one parameter `[.., N, K]`; B begins with zeros."""

    def __init__(self, master: Tensor, adapter: Adapter, seed: int) -> None:
        """Make them.

        Args:
            master: the parameter.
            adapter: rank and scaling.
            seed: of A, which is drawn as peft draws it: uniform, Kaiming with a = sqrt(5).
        """
        super().__init__()
        *stack, rows, width = master.shape
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(width)
        a = torch.empty(*stack, adapter.rank, width).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(master.device))
        self.b = nn.Parameter(torch.zeros(*stack, rows, adapter.rank, device=master.device))
        self.scaling = adapter.scaling

    def merged(self, master: Tensor) -> Tensor:
        """Return bf16(W + scaling * B A), BF16 in the shape of W, which is whole; B and A may be sharded."""
        return merged(master, whole(self.a), whole(self.b), self.scaling)


def merged(master: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return bf16(W + scaling * B A) for W `[.., N, K]`, A `[.., r, K]` and B `[.., N, r]`.

    W is rounded to BF16 first: a base is shipped so.
    """
    out = torch.empty_like(master, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    stacks = (out, master, a, b) if master.ndim > 2 else tuple(x.unsqueeze(0) for x in (out, master, a, b))
    step = max(PIECE // stacks[1].shape[-1], 1)
    for target, weight, low, high in zip(*(stack.flatten(0, -3) for stack in stacks), strict=True):
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            update = high[rows].double() @ low.double()
            target[rows] = updated(weight[rows], update, scaling)
    return out


def updated(weights: Tensor, update: Tensor, scaling: float) -> Tensor:
    """Return bf16(W + scaling * D) for weights and a float64 update D of the same shape; W is rounded to BF16 first."""
    return reference.double_to_bf16(weights.to(torch.bfloat16).double() + scaling * update)


class _Adapted(Function):
    """Values made of a merged weight; gradients of the two matrices alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, values: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scaling = scaling
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (a, b), grad = ctx.saved_tensors, grads[0].to(torch.float32)
        of_a = ctx.scaling * (b.transpose(-1, -2) @ grad)
        of_b = ctx.scaling * (grad @ a.transpose(-1, -2))
        return of_a, of_b, None, None


def adapted(module: LowRank, values: Tensor) -> Tensor:
    """Return `values` with a straight-through gradient to an adapter's matrices."""
    result: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
        module.a, module.b, values, module.scaling
    )
    return result


def low_rank(target: Target) -> LowRank | None:
    """Return the adapter of a target, if it has one."""
    children = target.module._modules.get(CHILD)  # noqa: SLF001  a child that may not be there
    found = children._modules.get(target.parameter) if children is not None else None  # noqa: SLF001
    return found if isinstance(found, LowRank) else None
