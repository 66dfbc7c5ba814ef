"""The routed experts of a layer on a CPU: tokens sorted by expert, one product an expert, one sum at the end.

The bits are those of `reference.moe` with the products of `cpu/linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from k2quant.kernels.products.cpu.linear import linear_grouped
from k2quant.kernels.products.packed.weight import PackedWeight


def moe(x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, ids: Tensor, weights: Tensor) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, `[T, H]`; see `reference.moe`."""
    experts, top = gate.shape[0], ids.shape[1]
    known = (ids >= 0) & (ids < experts)
    numbers = torch.where(known, ids, experts).flatten()
    counts = numbers.bincount(minlength=experts + 1)[:experts].tolist()
    order = numbers.argsort(stable=True)[: sum(counts)]
    rows = x.index_select(0, order // top)
    hidden = silu(linear_grouped(rows, gate, counts).float()) * linear_grouped(rows, up, counts).float()
    pairs = x.new_zeros(ids.numel(), x.shape[1])
    pairs[order] = linear_grouped(hidden.to(x.dtype), down, counts)
    kept = weights.float().masked_fill(~known, 0)
    return (pairs.view(*ids.shape, x.shape[1]).float() * kept[..., None]).sum(1).to(x.dtype)
